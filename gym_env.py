"""Environments of Gym or Gymnasium: registered ones, or made by a function.

These are the users' own: nothing is taken for granted but `reset` and `step`.
What an environment shows is looked at once, when it is made, and `about` says
in words what the agent gets of it.
"""

import collections.abc
import contextlib
import inspect

import numpy as np

import gym_make
import opengl
import spaces
from cli import UserError
from gym_spaces import Source, called, find_vectors, flatten, is_kind, sizes_of
from spaces import gym
from worker_calls import TaskError

SIZE = spaces.IMAGE_SHAPE[:2]


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
    log_info: names of numbers in `info`, with commas between them. `told` in
      the `info` of a step has those of its episode so far: each as it was told
      last, and the largest, NAME_max.

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
    log_info='',
  ):
    self._task = f'custom_{name}' if function else f'gym_{name}'
    self._seed = seed
    self._tells = list(filter(None, log_info.split(',')))
    wanted = f'{inputs},{record}'
    if function:
      self._env, self._limit = _call(function, self._task), None
    else:
      draws = spaces.names_image(wanted)
      self._env, self._limit = gym_make.make(name, args or {}, draws)
    spec = getattr(self._env, 'spec', None)
    declared = getattr(spec, 'max_episode_steps', None)
    given = (args or {}).get('max_episode_steps')
    self.longest = given or self._limit or declared
    self._plain_render = self._bytes = False
    self._seeding = _seeding(self._env)
    parts = flatten(self._env.observation_space)
    self._unusable = set()
    self._sources = self._find_images(parts, wanted)
    vectors, others = find_vectors(parts, self._sources, self._unusable)
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
    about.update(self._missed(info), **self._tell(info))
    return self._number(reward), done, about

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

  def _tell(self, info):
    """What `info` has said in this episode of the numbers in `log_info`."""
    for name in self._tells:
      try:
        array = np.asarray(info.get(name))
      except ValueError:  # lists of other lengths
        continue
      number = array.size == 1 and array.dtype.kind in 'biuf'
      if number and np.isfinite(array).all():
        value = float(array.reshape(()))
        self._told[name] = value
        top = f'{name}_max'
        self._told[top] = max(value, self._told.get(top, value))
    return {'told': dict(self._told)} if self._tells else {}

  def observe(self):
    """Returns the observation of the present state."""
    return {name: self._read(self._sources[name]) for name in self._names}

  def close(self):
    self._env.close()

  # Seeds

  def _reset(self, seed):
    result = self._seeded_reset(seed)
    new = isinstance(result, tuple) and len(result) == 2
    if new and is_kind(self._env.observation_space, 'Tuple'):
      new = not self._env.observation_space.contains(result)
    info = result[1] if new else ()
    self._obs = result[0] if isinstance(info, dict | None) else result
    self._steps, self._told = 0, {}
    if sizes_of(self._env.action_space) != sizes_of(self._acts):
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
      if not is_kind(space, 'Box') or 0 in space.shape:
        continue
      low, high = np.min(space.low), np.max(space.high)
      try:
        layout = spaces.image_layout(space.shape, space.dtype, low, high)
      except ValueError as error:
        reason = f'{called(path)} cannot be used: {error}'
        if space.dtype != np.uint8 and low >= 0 and high < 255:
          self._unusable.add(path)  # a map of depths, perhaps
        continue
      if layout:
        found[path] = layout
    if reason and not found and spaces.names_image(wanted):
      raise TaskError(f'{self._task}: {reason}.')
    paths = sorted(found, key=lambda path: path[-1:] != ('image',))
    images = {
      spaces.image_name(i): Source(path, called(path), layout=found[path])
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
    if is_kind(space, 'Discrete'):
      return gym.spaces.Discrete(int(space.n))
    if is_kind(space, 'MultiDiscrete'):
      return gym.spaces.MultiDiscrete(np.ravel(space.nvec))
    if is_kind(space, 'MultiBinary'):
      return gym.spaces.MultiDiscrete([2] * int(np.prod(space.shape)))
    if is_kind(space, 'Box') and np.prod(space.shape, dtype=int):
      low, high = np.ravel(space.low), np.ravel(space.high)
      return gym.spaces.Box(low, high, dtype=space.dtype)
    raise TaskError(
      f'{self._task} has actions {space}; they must be Discrete, '
      'MultiDiscrete, MultiBinary or a Box.'
    )

  def _own_action(self, action):
    """The action as the environment's own space has it."""
    space = self._acts
    if is_kind(space, 'Discrete'):
      return int(action) + int(getattr(space, 'start', 0))
    action = np.reshape(action, space.shape)
    if is_kind(space, 'MultiDiscrete'):
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
