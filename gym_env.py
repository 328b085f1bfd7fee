"""Environments of Gym or Gymnasium: registered ones, or made by a function.

These are the users' own: nothing is taken for granted but `reset` and `step`.
What an environment shows is looked at once, when it is made, and `about` says
in words what the agent gets of it.
"""

import collections.abc
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import sys
import typing

import numpy as np

import opengl
import spaces
from cli import UserError, nearest
from spaces import gym
from worker_calls import TaskError

SIZE = spaces.IMAGE_SHAPE[:2]
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


class GymEnv:
  """An environment of Gymnasium, or else of Gym.

  `image` is the observation or a part of it, where there is one that is an
  image (see `spaces.image_layout`), else what the environment renders; further
  ones are `image_2` and so on. All else that is made of numbers is a vector,
  called by its keys with `/` between them, or `state` where there are none.
  `terminated` sets the discount to 0; a time limit of the registration, and
  `truncated`, end the episode with 1. Steps of four values, as in older
  versions of Gym, are understood.

  Args:
    name: the id; 'module:id' imports the module first.
    function: makes the environment, of any name; None for a registered one.
    seed: int or None.
    args: arguments of the constructor of a registered one, by name.
    inputs, record: see `spaces.View`.

  Attributes:
    about: what the agent sees, and what else there is, a list of sentences.
    longest: steps of its longest episodes, where they are known, else None.

  Raises:
    TaskError: not registered, wrong arguments, no such observation, no images
      where they are wanted, or actions of an unknown kind.
  """

  def __init__(
    self,
    name,
    seed=None,
    args=None,
    inputs='image',
    record='',
    function=None,
  ):
    self._task = f'custom_{name}' if function else f'gym_{name}'
    self._seed = seed
    wanted = f'{inputs},{record}'
    if function:
      self._env, self._limit = _call(function, self._task), None
    else:
      draws = spaces.names_image(wanted)
      self._env, self._limit = make(name, args or {}, draws)
    spec = getattr(self._env, 'spec', None)
    declared = getattr(spec, 'max_episode_steps', None)
    given = (args or {}).get('max_episode_steps')
    self.longest = given or self._limit or declared
    self._plain_render = self._bytes = False
    self._seeding = _seeding(self._env)
    parts = _flatten(self._env.observation_space)
    self._unusable = set()
    self._sources = self._find_images(parts, wanted)
    vectors, others = _find_vectors(parts, self._sources, self._unusable)
    self._sources.update(vectors)
    self._acts = self._env.action_space
    self.action_space = self._action_space(self._acts)
    # What it makes only once, it may make by the seed of its first reset.
    first = np.random.SeedSequence().entropy % 2**31 if seed is None else seed
    self._reset(first)
    words = wanted.split(',')
    offers = {k: self._offer(k, words) for k in self._sources}
    view = spaces.View(self._task, offers, inputs, record, others)
    self._names, self.observation_space = view.names, view.space
    self.about = view.about
    if not self._seeding:
      self.about.append(
        'The environment cannot be seeded: its episodes differ in every run.'
      )

  def reseed(self, seed):
    self._seed = seed

  def reset(self):
    self._reset(self._seed)
    self._seed = None  # the streams go on
    return self.observe()

  def step(self, action):
    reward, done, info = self.advance(action)
    return self.observe(), reward, done, info

  def advance(self, action):
    """Steps like `step`, but spares the image; see `observe`."""
    result = self._env.step(self._own_action(action))
    if not isinstance(result, tuple | list) or len(result) not in (4, 5):
      raise ValueError(
        f'{self._task}: step() gave no tuple of five (observation, reward, '
        'terminated, truncated, info) or, as Gym had it, of four values.'
      )
    self._obs, reward, ended, *truncated, info = result
    info = self._info(info)
    ended = self._truth('terminated', ended)
    cut = truncated[0] if truncated else info.get('TimeLimit.truncated', False)
    cut = self._truth('truncated', cut)
    ended = ended and not (cut and not truncated)
    self._steps += 1
    done = ended or cut or self._steps == self._limit
    about = {'discount': np.float32(0 if ended else 1)}
    return self._number(reward), done, {**about, **self._missed(info)}

  def _info(self, info):
    """What a step says besides, a dictionary; ValueError for no such thing."""
    if info is None or (isinstance(info, (tuple, list, str)) and not info):
      return {}
    if not isinstance(info, collections.abc.Mapping):
      raise ValueError(
        f'{self._task}: step() gave a {type(info).__name__} for info, '
        'which is a dictionary.'
      )
    return info

  def _missed(self, info):
    """What `info` says of missed ticks, where that is a whole number."""
    missed = info.get('missed')
    if isinstance(missed, bool) or not isinstance(missed, (int, np.integer)):
      return {}
    if missed < 0:
      raise ValueError(
        f"{self._task} gave info['missed'] {missed}; it counts ticks, from 0."
      )
    return {'missed': int(missed)}

  def observe(self):
    """Returns the observation of the present state."""
    return {name: self._read(self._sources[name]) for name in self._names}

  def close(self):
    self._env.close()

  # Seeds

  def _reset(self, seed):
    result = self._seeded_reset(seed)
    new = isinstance(result, tuple) and len(result) == 2
    if new and _is(self._env.observation_space, 'Tuple'):
      new = not self._env.observation_space.contains(result)
    info = result[1] if new else ()
    self._obs = result[0] if isinstance(info, dict | None) else result
    self._steps = 0
    if _sizes(self._env.action_space) != _sizes(self._acts):
      raise TaskError(
        f'{self._task} takes actions {self._env.action_space} now, and took '
        f'{self._acts} when it was made; they must stay as they are'
      )

  def _seeded_reset(self, seed):
    if seed is not None and self._seeding == 'reset':
      try:
        return self._env.reset(seed=seed)
      except TypeError as error:  # a wrapper that takes all there is
        if "'seed'" not in str(error) and 'keyword' not in str(error):
          raise
        self._seeding = _other_seeding(self._env)
    if seed is not None and self._seeding == 'seed':
      self._env.seed(seed)
    return self._env.reset()

  # Observations

  def _find_images(self, parts, wanted):
    """{name: Source} of the observations that are images, or of what is drawn.

    The first is that which is called image, if there is one.
    """
    found, reason = {}, None
    for path, space in parts.items():
      if not _is(space, 'Box') or 0 in space.shape:
        continue
      low, high = np.min(space.low), np.max(space.high)
      try:
        layout = spaces.image_layout(space.shape, space.dtype, low, high)
      except ValueError as error:
        reason = f'{_called(path)} cannot be used: {error}'
        if space.dtype != np.uint8 and low >= 0 and high < 255:
          self._unusable.add(path)  # a map of depths, perhaps
        continue
      if layout:
        found[path] = layout
    if reason and not found and spaces.names_image(wanted):
      raise TaskError(f'{self._task}: {reason}.')
    paths = sorted(found, key=lambda path: path[-1:] != ('image',))
    images = {
      spaces.image_name(i): Source(path, _called(path), layout=found[path])
      for i, path in enumerate(paths)
    }
    drawn = Source(None, 'what the environment renders')
    return images or dict(image=drawn)

  def _read(self, source):
    """The observation of a source at the present state."""
    try:
      if source.convert:
        return source.convert(source.find(self._obs))
      image, layout = self._image(source)
      return spaces.resize(layout.read(image), SIZE)
    except ValueError as error:
      raise ValueError(f'{self._task}, {source.text}: {error}') from error

  def _image(self, source):
    """The image of the present state, and its layout."""
    if source.layout:
      return source.find(self._obs), source.layout
    image = self._render()
    return image, self._rendered_layout(image)

  def _offer(self, name, wanted):
    """A source as `spaces.View` takes it; only what is wanted is drawn."""
    source = self._sources[name]
    if source.convert:
      return spaces.Offer(source.space, source.text)
    space, text = spaces.image_space(SIZE), source.text
    if name not in wanted:
      return spaces.Offer(space, f'{text} ({name})')
    with self._drawing(source):
      image, layout = self._image(source)
      shape = layout.read(image).shape
    text = f'{text}, {layout}'
    if shape[:2] != SIZE:
      text += f'; resized to {"x".join(map(str, SIZE))}'
    return spaces.Offer(space, text)

  @contextlib.contextmanager
  def _drawing(self, source):
    """Turns what is wrong with the first image into a TaskError."""
    try:
      with opengl.graphics_errors():
        yield
    except UserError:
      raise
    except Exception as error:
      if not source.layout:
        raise self._no_images(error) from error
      if not isinstance(error, ValueError):
        raise
      raise TaskError(f'{self._task}, {source.text}: {error}') from error

  def _render(self):
    """What the environment draws, of any version of Gym."""
    if self._plain_render or getattr(self._env, 'render_mode', None):
      image = self._env.render()
    else:
      try:
        image = self._env.render(mode='rgb_array')
      except TypeError as error:
        if "'mode'" not in str(error) and 'argument' not in str(error):
          raise
        self._plain_render = True
        image = self._env.render()
    return np.asarray(image[-1] if isinstance(image, list) else image)

  def _rendered_layout(self, image):
    """Floats are up to 1 until a frame has more; ValueError if it is none."""
    floats = image.dtype.kind in 'fb'
    self._bytes = self._bytes or (floats and np.max(image) > 1.1)
    high = 1 if floats and not self._bytes else 255
    layout = spaces.image_layout(image.shape, image.dtype, 0, high)
    if not layout:
      raise ValueError(
        f'shape {image.shape}, type {image.dtype}; {spaces.EXPECTED}'
      )
    return layout

  def _no_images(self, reason):
    vectors = any(source.convert for source in self._sources.values())
    others = '--inputs state needs none; else ' if vectors else ''
    return TaskError(
      f'{self._task} has no images. Its observations are '
      f'{self._env.observation_space}, and what it renders cannot be used: '
      f'{str(reason).rstrip(".") or type(reason).__name__}. {others}render() '
      "must give an image, made with render_mode='rgb_array'."
    )

  # Actions and rewards

  def _action_space(self, space):
    """What `OneHotAction` or `NormalizeActions` can wrap."""
    if _is(space, 'Discrete'):
      return gym.spaces.Discrete(int(space.n))
    if _is(space, 'MultiDiscrete'):
      return gym.spaces.MultiDiscrete(np.ravel(space.nvec))
    if _is(space, 'MultiBinary'):
      return gym.spaces.MultiDiscrete([2] * int(np.prod(space.shape)))
    if _is(space, 'Box') and np.prod(space.shape, dtype=int):
      low, high = np.ravel(space.low), np.ravel(space.high)
      return gym.spaces.Box(low, high, dtype=space.dtype)
    raise TaskError(
      f'{self._task} has actions {space}; they must be Discrete, '
      'MultiDiscrete, MultiBinary or a Box.'
    )

  def _own_action(self, action):
    """The action as the environment's own space has it."""
    space = self._acts
    if _is(space, 'Discrete'):
      return int(action) + int(getattr(space, 'start', 0))
    action = np.reshape(action, space.shape)
    if _is(space, 'MultiDiscrete'):
      action = action + getattr(space, 'start', 0)
    return action.astype(space.dtype)

  def _truth(self, name, value):
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in 'biuf' or array not in (0, 1):
      raise ValueError(
        f'{self._task} gave {name} {value!r}; it is True or False.'
      )
    return bool(array.reshape(()))

  def _number(self, reward):
    array = np.asarray(reward)
    if array.size != 1 or array.dtype.kind not in 'biuf':
      shown = f'of shape {array.shape}' if array.size != 1 else repr(reward)
      raise ValueError(
        f'{self._task} gave a reward {shown}; a reward is one number.'
      )
    return float(array.reshape(()))


def _call(function, task):
  """The environment that a user's function makes."""
  env = function()
  needed = 'observation_space', 'action_space', 'reset', 'step'
  missing = [name for name in needed if not hasattr(env, name)]
  if missing:
    raise TaskError(
      f'{task}: its function gave a {type(env).__name__} without '
      f'{", ".join(missing)}; it must be an environment of Gymnasium or Gym.'
    )
  if hasattr(env, 'num_envs'):
    raise TaskError(
      f'{task}: its function gave several environments in one, a '
      f'{type(env).__name__}; it must give one, and --envs runs several.'
    )
  return env


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


def _seeding(env):
  """How an environment is seeded: by 'reset', by 'seed', or by None."""
  try:
    parameters = inspect.signature(env.reset).parameters.values()
  except (TypeError, ValueError):  # not of Python: it is tried
    return 'reset'
  if any(p.name == 'seed' or p.kind == p.VAR_KEYWORD for p in parameters):
    return 'reset'
  return _other_seeding(env)


def _other_seeding(env):
  return 'seed' if callable(getattr(env, 'seed', None)) else None


# --- Spaces of Gym or of Gymnasium -------------------------------------------


def _is(space, kind):
  """Whether a space is of a kind, by its name, in either library."""
  return any(c.__name__ == kind for c in type(space).__mro__)


def _sizes(space):
  """Kind and sizes of an action space; its bounds may be others."""
  kinds = 'Discrete', 'MultiDiscrete', 'MultiBinary', 'Box'
  names = 'n', 'nvec', 'shape', 'start'
  sizes = [np.ravel(getattr(space, name, None)).tolist() for name in names]
  return [_is(space, kind) for kind in kinds], sizes


def _flatten(space, path=()):
  """{keys: space} of all within a space; the keys lead to its part."""
  if _is(space, 'Dict'):
    items = space.spaces.items()
  elif _is(space, 'Tuple'):
    items = enumerate(space.spaces)
  else:
    return {path: space}
  parts = {}
  for key, part in items:
    parts.update(_flatten(part, (*path, key)))
  return parts


@dataclasses.dataclass(frozen=True)
class Source:
  """Where an observation comes from.

  Attributes:
    path: keys that lead to its part of the environment's own observation.
    text: what it is, in words.
    layout: of an image; None for one that is rendered.
    space, convert: of a vector: what it is, and the function to it.
  """

  path: tuple | None
  text: str
  layout: spaces.Layout | None = None
  space: gym.spaces.Box | None = None
  convert: typing.Callable | None = None

  def find(self, obs):
    """Its part of an observation; ValueError if there is none."""
    part = obs
    for key in self.path:
      try:
        part = part[key]
      except (KeyError, IndexError, TypeError):
        raise ValueError(
          f'The observation has no {key!r}, which its space has: it is a '
          f'{type(part).__name__}.'
        ) from None
    return part


MOST_CHOICES = 10_000  # of a discrete observation, as each is a number
LONGEST = 60_000  # bytes of a name; the file of an episode holds a few more
# What episodes hold besides, and what `numpy.savez` takes for itself.
RESERVED = (*spaces.TRANSITION_KEYS, 'file', 'allow_pickle')


def _find_vectors(parts, images, unusable):
  """{name: Source} of what is made of numbers, and in words what is not.

  Images that are `unusable`, a set of paths, are not taken for vectors.
  """
  found, others = {}, []
  taken = [source.path for source in images.values()]
  for path, space in parts.items():
    if path in taken:
      continue
    box, convert = _vector(space)
    if not box or path in unusable:
      others.append(f'{_called(path)} ({_outline(space)})')
      continue
    name = _array_name(path)
    while name in found:
      name += '_'
    text = f'{_called(path)} ({_outline(space)})'
    found[name] = Source(path, text, space=box, convert=convert)
  return found, others


def _array_name(path):
  """What the part of an observation is called as a flag and in a file."""
  name = '/'.join(map(str, path)).replace('\\', '/')
  name = re.sub(r'[\0-\x1f\x7f]', ' ', name)  # a name in a file ends at \0
  name = name.encode('utf8', 'replace')[:LONGEST].decode('utf8', 'ignore')
  name = re.sub(r'\.{2,}', '.', name).strip('/ ') or 'state'
  if name in RESERVED or spaces.is_image(name) or ',' in name:
    name = f'obs/{name.replace(",", "/")}'
  return name


def _vector(space):
  """The Box of a space as float32, and the function to it; (None, None)."""
  for kind, count in (('Discrete', 'n'), ('MultiDiscrete', 'nvec')):
    if _is(space, kind) and np.sum(getattr(space, count)) <= MOST_CHOICES:
      box = spaces.OneHotBox(getattr(space, count))
      start = np.ravel(getattr(space, 'start', 0))
      return box, functools.partial(_one_hot, box=box, start=start)
  if _is(space, 'Box') or _is(space, 'MultiBinary'):
    box = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    return box, functools.partial(_array, shape=space.shape)
  return None, None


def _one_hot(value, box, start):
  return box.encode(np.ravel(value) - start)


def _array(value, shape):
  """A float32 copy, as many an environment writes over what it gave."""
  array = np.array(value, np.float32)
  if array.shape != shape:
    raise ValueError(
      f'An observation has shape {array.shape}; its space says {shape}.'
    )
  return array


def _called(path):
  name = '/'.join(map(str, path))
  return f'the observation {name!r}' if path else 'the observation'


def _outline(space):
  """Kind and size of a space, shortly."""
  if _is(space, 'Box'):
    return f'{space.dtype} {list(space.shape)}'
  if _is(space, 'Discrete'):
    return f'one of {space.n}'
  return type(space).__name__
