"""Registered environments of Gymnasium or Gym, made by their ids."""

import copy
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sys

from cli import nearest
from worker_calls import TaskError

# Packages that register environments, by the beginning of their ids.
PACKAGES = {
  'ALE/': 'ale_py',
  'BabyAI-': 'minigrid',
  'Crafter': 'crafter',
  'Meta-World/': 'metaworld',
  'MiniGrid-': 'minigrid',
}
# What the same suites are called elsewhere, by the beginning of a task's name.
FORMS = {
  'ale_': 'gym_ale_py:ALE/Pong-v5 or atari_pong',
  'babyai_': 'gym_minigrid:BabyAI-GoToObj-v0',
  'crafter_': 'gym_crafter:CrafterReward-v1',
  'metaworld_': 'gym_metaworld:Meta-World/MT1 with '
  """--env_args '{"env_name": "reach-v3"}'""",
  'minigrid_': 'gym_minigrid:MiniGrid-Empty-8x8-v0',
}


def right_form(task):
  """How a name of another program is written here, None if not known."""
  task = re.sub(r'^gym(nasium)?[_/]', '', task, flags=re.IGNORECASE)
  lower = task.lower()
  form = next((v for k, v in FORMS.items() if lower.startswith(k)), None)
  package = _package(task)
  if package:
    return f'gym_{package}:{task}'
  if re.search(r'-v\d+$', task):
    return form or f'gym_{task}'
  return form


def _package(key):
  return next((v for k, v in PACKAGES.items() if key.startswith(k)), None)


def make(name, args, draws=True):
  """Makes an environment by its id, without the wrappers that `make` adds.

  Those would refuse steps of four values, and their time limit cannot be told
  from a true end.

  Args:
    name: the id, or 'module:id'.
    args: arguments of its constructor, by name.
    draws: whether it will be asked to render.

  Returns:
    The environment, and its time limit in steps (None for none).

  Raises:
    TaskError: there is none, or it does not take the arguments.
  """
  module, _, key = name.rpartition(':')
  if module:
    _import(name, module)
  names = []
  for library in ('gymnasium', 'gym'):  # the maintained one first
    if importlib.util.find_spec(library) is None:
      continue
    library = importlib.import_module(library)
    registry = library.envs.registration.registry
    names += set(registry) - set(names)
    if key in registry:
      return _construct(library, registry[key], args, draws)
  raise _unknown(key, names)


def _import(name, module):
  if '/' in module or module.startswith('.'):
    raise TaskError(
      f'gym_{name}: {module} is a path; the name of a module is wanted, such '
      'as package.module'
    )
  if os.getcwd() not in sys.path:  # last: in this process ours go first
    sys.path.append(os.getcwd())
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    hint = 'the current folder and those of PYTHONPATH were searched'
    if error.name in PACKAGES.values():
      hint = f'pip install {error.name}'
    raise TaskError(f'gym_{name}: {error}; {hint}.') from error
  _check_whose(name, module.partition('.')[0])


def _check_whose(name, module):
  """TaskError where a module of ours came in the place of the user's."""
  own = os.path.dirname(os.path.abspath(__file__))
  file = getattr(sys.modules[module], '__file__', None) or ''
  rest = [path for path in map(os.path.abspath, sys.path) if path != own]
  ours = os.path.dirname(os.path.abspath(file)) == own
  if ours and importlib.machinery.PathFinder.find_spec(module, rest):
    raise TaskError(
      f"gym_{name}: {module} is the name of one of this program's own modules, "
      'which has taken the place of yours: rename yours, or leave it to '
      '--parallel process'
    )


def _unknown(key, names):
  package = _package(key)
  hint = nearest(key, names)
  if package:
    hint = f'; perhaps in its package: --task gym_{package}:{key}'
  return TaskError(
    f'There is no environment {key!r} in Gym{hint or "."} For one of your own, '
    '--task gym_package.module:Id-v0 imports package.module first.'
  )


def _construct(library, spec, args, draws):
  bare = copy.copy(spec)
  bare.order_enforce, bare.max_episode_steps = False, None
  make = functools.partial(library.make, bare, disable_env_checker=True)
  try:
    env = _render_arrays(make, args) if draws else make(**args)
    return env, None if 'max_episode_steps' in args else spec.max_episode_steps
  except TypeError as error:
    if 'argument' not in str(error):
      raise
    given = f"--env_args '{json.dumps(args)}'" if args else 'no --env_args'
    raise TaskError(
      f'gym_{spec.id} cannot be made with {given}: {error}'
    ) from error


def _render_arrays(make, args):
  if 'render_mode' in args:
    return make(**args)
  try:
    return make(render_mode='rgb_array', **args)
  except Exception as error:  # of what does not know the argument, or the mode
    try:
      return make(**args)
    except Exception:
      if 'render_mode' in str(error):
        raise
    raise error
