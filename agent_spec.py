"""What an agent sees and does, by environments, episodes or another process.

No TensorFlow here.
"""

import contextlib
import typing

import numpy as np

import replay
import runfile
import spaces
from cli import UserError
from worker_calls import TaskError, WorkerLost


class Spec(typing.NamedTuple):
  """What an agent sees and does.

  Attributes:
    inputs: {name: shape} of the observations that it sees.
    actions: its action space.
    about: the same in words, a list of sentences.
  """

  inputs: dict
  actions: object
  about: list


def find(run, envs):
  """`Spec` of the agent of a run, with or without environments.

  Raises:
    UserError: the episodes of an offline run are not for it.
    TaskError: environments show or take something else than the first.
  """
  stored = run.config.offline and replay.describe(run.datadir)
  if envs:
    spec = _of_environments(run.config, envs)
  elif stored:
    spec = _of_episodes(run, *stored)
  else:
    spec = of_actor(run.config.logdir)
  if stored:
    _check_repeat(run)
  return spec


# --- Of environments ---------------------------------------------------------


def of_environment(config, env):
  """`Spec` of an agent for an environment; TaskError for images of others."""
  shown = env.observation_space.spaces
  shapes = {k: v.shape for k, v in shown.items()}
  for name in filter(spaces.is_image, shown):
    kind = shown[name].dtype, shapes[name]
    if kind != (np.uint8, spaces.IMAGE_SHAPE):
      raise TaskError(
        f'{config.task} shows {name} as {kind[0]} {list(kind[1])}; its class '
        f'must make images uint8 {list(spaces.IMAGE_SHAPE)}'
      )
  return Spec(_input_shapes(config, shapes), env.action_space, env.about)


def _of_environments(config, envs):
  """`Spec` of an agent for all environments of a run."""
  first, *others = envs
  spec = of_environment(config, first)
  outline = spaces.outline(first.observation_space, first.action_space)
  for env in others:
    env.expect(outline)
    with contextlib.suppress(WorkerLost):  # which its first reset replaces
      _ = env.about
  return spec


def _input_shapes(config, shapes):
  """{name: shape} of what the agent sees, of all observations'."""
  offers = {k: v for k, v in shapes.items() if k not in spaces.TRANSITION_KEYS}
  names = spaces.choose(config.task, offers, config.inputs)
  return {name: offers[name] for name in names}


# --- Of episodes -------------------------------------------------------------


def _of_episodes(run, shapes, choices):
  """`Spec` of an agent for the episodes of a folder, see `replay.describe`."""
  if len(shapes['action']) != 1:
    raise UserError(
      f'an action in {run.datadir} has shape {list(shapes["action"])}, not '
      '[A]: numbers within [-1, 1], or choices as one-hot vectors'
    )
  size = shapes['action'][0]
  record = dict(choices=[size]) if choices else dict(size=size)
  stored = _stored_actions(run)
  if choices > 1 and not stored:
    raise UserError(
      f'the actions in {run.datadir} are {choices} choices side by side, but '
      'not which: put the config.json of their run beside the folder'
    )
  inputs = _input_shapes(run.config, shapes)
  for name in spaces.odd_images(inputs):
    raise UserError(
      f'{name} in {run.datadir} has shape {list(inputs[name])}, and an agent '
      f'sees {list(spaces.IMAGE_SHAPE)}: convert the images, or choose others '
      'by --inputs'
    )
  acts = f'one-hot vectors of {size}' if choices else f'numbers, {size} each'
  about = [
    f'The agent sees {", ".join(inputs)}, of the episodes; their actions are '
    f'{acts}.'
  ]
  return Spec(inputs, stored or spaces.action_space(record), about)


def _stored_actions(run):
  """The action space that the run of the episodes wrote; None without one."""
  try:
    return runfile.load_spaces(run.datadir.parent)[1]
  except UserError:
    return None


def _check_repeat(run):
  """UserError where the episodes have another --action_repeat than this run."""
  try:
    origin = runfile.load_config(run.datadir.parent)
  except UserError:
    return  # a folder of episodes alone
  if origin.action_repeat != run.config.action_repeat:
    raise UserError(
      f'the episodes of --offline {run.config.offline} were made with '
      f'--action_repeat {origin.action_repeat}; give that'
    )


def check_choices(run, spec):
  """UserError where a task of choices would learn from actions of numbers."""
  several = spec.actions.shape[0] > 1  # one choice alone is always 1
  if not several or not getattr(spec.actions, 'discrete', False):
    return
  if not replay.describe(run.datadir)[1]:
    raise UserError(
      f'the actions in {run.datadir} are numbers, and {run.config.task} takes '
      f'one-hot vectors of {spec.actions.shape[0]}'
    )


# --- Of another process ------------------------------------------------------


def of_actor(logdir):
  """`Spec` that a process with environments has written."""
  for folder in (logdir / runfile.ACT, logdir):
    if (folder / 'config.json').exists():
      inputs, actions = runfile.load_spaces(folder)
      if inputs:
        about = [f'The agent sees {", ".join(inputs)}, of another process.']
        return Spec(inputs, actions, about)
  raise UserError(
    f'no config.json in --logdir {logdir} says what the agent sees: start '
    'the same command with --role act first'
  )
