"""Environments and their wrappers.

An environment here has `observation_space` (a `gym.spaces.Dict`),
`action_space`, `reset() -> obs`, `step(action) -> (obs, reward, done, info)`
and `close()`. Images, `obs['image']`, `obs['image_2']`, ..., are uint8
[64, 64, 3]; all others are vectors. `info['discount']`, where present, is the
factor that applies to everything after this step: 0 if the task really ended
there, 1 if only a time limit did. `info['missed']`, where time does not wait
for the agent, counts the ticks since the last step for which no action came.

An *environment step* is one step of the simulator, an *agent step* one action
of the agent; the action repeat lies between the two.

This module never imports TensorFlow, nor anything that does: Mesa's software
OpenGL and TensorFlow crash in one process, so `Async` keeps environments in
workers. suites.py has them by the names of tasks.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import sys
import traceback

import numpy as np

import spaces
from cli import UserError, nearest
from replay import Collect as Collect
from spaces import OneHotBox as OneHotBox
from spaces import gym
from worker_calls import RenderError, TaskError
from worker_calls import WorkerError as WorkerError
from worker_calls import WorkerLost as WorkerLost
from workers import Async as Async
from workers import Wrapper

# What dm_control.suite.ALL_TASKS holds. It is written out because importing
# dm_control loads OpenGL, which the training process must not do.
_SUITE = {
  'acrobot': 'swingup swingup_sparse',
  'ball_in_cup': 'catch',
  'cartpole': (
    'balance balance_sparse swingup swingup_sparse two_poles three_poles'
  ),
  'cheetah': 'run',
  'dog': 'stand walk trot run fetch',
  'finger': 'spin turn_easy turn_hard',
  'fish': 'upright swim',
  'hopper': 'stand hop',
  'humanoid': 'stand walk run run_pure_state',
  'humanoid_CMU': 'stand walk run',
  'lqr': 'lqr_2_1 lqr_6_2',
  'manipulator': 'bring_ball bring_peg insert_ball insert_peg',
  'pendulum': 'swingup',
  'point_mass': 'easy hard',
  'quadruped': 'walk run escape fetch',
  'reacher': 'easy hard',
  'stacker': 'stack_2 stack_4',
  'swimmer': 'swimmer6 swimmer15',
  'walker': 'stand walk run',
}
DMC_TASKS = {
  f'{domain}_{task}': (domain, task)
  for domain, tasks in _SUITE.items()
  for task in tasks.split()
}
# The paper and the 2020 release call this domain 'cup'.
DMC_TASKS['cup_catch'] = ('ball_in_cup', 'catch')


# Games for two players: the emulator ends the process when it loads them.
_FOR_TWO = {'combat', 'joust', 'maze_craze', 'warlords'}


@functools.cache
def atari_games():
  """Names of the games whose ROM `ale_py` brings, such as 'space_invaders'."""
  package = importlib.util.find_spec('ale_py')
  if package is None:
    return []
  folder = pathlib.Path(package.origin).parent / 'roms'
  return sorted({path.stem for path in folder.glob('*.bin')} - _FOR_TWO)


def check_name(name, names, prefix=''):
  """Raises TaskError, with the nearest names, unless it is one of them."""
  if name not in names:
    task, names = f'{prefix}{name}', [f'{prefix}{n}' for n in names]
    raise TaskError(f'There is no task {task!r}{nearest(task, names)}')


def refuse_tensorflow(task):
  """Raises TaskError where TensorFlow lives in this process."""
  if 'tensorflow' in sys.modules:
    raise TaskError(
      f'Task {task!r} may render with OpenGL, which crashes in one process '
      'with TensorFlow: use --parallel process.'
    )


# ---------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------


class DeepMindControl:
  """A task of the DeepMind control suite.

  Observations are images of cameras, uint8 [*size, 3], and the task's own
  arrays in float32. Actions are float32 within the bounds that the suite gives.
  Without images nothing is rendered, and OpenGL is not touched.

  Args:
    name: '<domain>_<task>', such as 'walker_walk' or 'ball_in_cup_catch'.
    size: height and width of the images in pixels.
    cameras: indices; the first is `image`, the next `image_2`. None takes 0,
      or 2 for the quadruped, whose camera 0 does not follow it.
    seed: int or None, for the start states and whatever else is random.
    inputs, record: see `spaces.View`.
    detail: of images: 'full' as the suite draws them, 'low' (see `LOW_DETAIL`),
      or 'auto': low where OpenGL renders in software.

  Raises:
    TaskError: no such task, camera or observation, or TensorFlow lives in this
      process already.
    RenderError: OpenGL does not work.
  """

  def __init__(
    self,
    name,
    size=(64, 64),
    cameras=None,
    seed=None,
    inputs='image',
    record='state',
    detail='auto',
  ):
    check_name(name, DMC_TASKS, 'dmc_')
    renders = spaces.names_image(f'{inputs},{record}')
    if renders:
      refuse_tensorflow(f'dmc_{name}')
    if renders and detail != 'full':
      # Of Mesa; a small image of low detail gains nothing by threads.
      os.environ.setdefault('LP_NUM_THREADS', '0')
    domain, task = DMC_TASKS[name]
    self._size = tuple(size)
    suite = _import_suite(renders)
    # Models that are drawn at random (LQR's) are the same for all seeds.
    self._env = suite.load(domain, task, task_kwargs={'random': 0})
    self.reseed(seed)
    if not renders:
      _refuse_drawing(self._env.physics)
    cameras = cameras or [2 if domain == 'quadruped' else 0]
    self._cameras = {
      spaces.image_name(index): camera for index, camera in enumerate(cameras)
    }
    self._check_cameras(f'dmc_{name}')
    view = spaces.View(f'dmc_{name}', self._offers(), inputs, record)
    self._names, self.about = view.names, view.about
    self.observation_space = view.space
    self.action_space = self._action_space()
    if renders:
      try:
        self._set_detail(detail)
        self._images()
      except Exception as error:
        raise _render_error(error) from error

  def reseed(self, seed):
    self._env.task.random.seed(seed)

  def reset(self):
    self._now = self._env.reset()
    return self.observe()

  def step(self, action):
    reward, done, info = self.advance(action)
    return self.observe(), reward, done, info

  def advance(self, action):
    """Steps like `step`, but spares the rendering; see `observe`."""
    action = spaces.check_action(action, self.action_space)
    self._now = now = self._env.step(action)
    discount = 1 if now.discount is None else now.discount
    info = {'discount': np.float32(discount)}
    return float(now.reward or 0), now.last(), info

  def observe(self):
    """Returns the observation of the present state."""
    vectors = {
      key: np.asarray(value, np.float32)
      for key, value in self._now.observation.items()
      if key in self._names
    }
    return {**self._images(), **vectors}

  def render(self, camera=None):
    """Returns the image of the present state, uint8 [*size, 3]."""
    camera = self._cameras['image'] if camera is None else camera
    return self._env.physics.render(*self._size, camera_id=camera)

  def close(self):
    self._env.close()

  def _set_detail(self, detail):
    """Before the first image, which fixes it."""
    view = self._env.physics.model.vis
    # The buffer's default, 640x480, costs time and changes no pixel.
    view.global_.offheight, view.global_.offwidth = self._size
    if detail == 'low' or (detail == 'auto' and renders_in_software()):
      for name, value in LOW_DETAIL.items():
        setattr(view.quality, name, value)

  def _images(self):
    return {
      name: self.render(camera)
      for name, camera in self._cameras.items()
      if name in self._names
    }

  def _check_cameras(self, task):
    count = self._env.physics.model.ncam
    for camera in self._cameras.values():
      if camera >= count:
        raise TaskError(
          f'--cameras {camera}: {task} has the cameras 0 to {count - 1}'
        )

  def _offers(self):
    size = 'x'.join(map(str, self._size))
    image = spaces.image_space(self._size)
    offers = {
      name: spaces.Offer(image, f'camera {camera}, {size}')
      for name, camera in self._cameras.items()
    }
    for key, spec in self._env.observation_spec().items():
      space = gym.spaces.Box(-np.inf, np.inf, spec.shape, np.float32)
      offers[key] = spaces.Offer(space, f'{key} {list(spec.shape)}')
    return offers

  def _action_space(self):
    spec = self._env.action_spec()
    low = np.broadcast_to(spec.minimum, spec.shape).astype(np.float32)
    high = np.broadcast_to(spec.maximum, spec.shape).astype(np.float32)
    # The suite writes 1e10, MuJoCo's largest number, where there is no bound.
    low = np.where(low <= -1e9, -np.inf, low).astype(np.float32)
    high = np.where(high >= 1e9, np.inf, high).astype(np.float32)
    return gym.spaces.Box(low, high, dtype=np.float32)


# Software spends most of an image's time on a shadow map of 2048x2048 and
# on spheres of 16 stacks (docs/performance.md).
LOW_DETAIL = dict(shadowsize=512, numstacks=6)


@functools.cache
def renders_in_software():
  """Whether OpenGL draws on the CPU, by what it calls itself."""
  from dm_control import _render
  from OpenGL import GL

  renderer = _render.Renderer(1, 1)
  try:
    with renderer.make_current() as context:
      name = context.call(GL.glGetString, GL.GL_RENDERER).decode().lower()
  finally:
    renderer.free()
  words = 'llvmpipe', 'softpipe', 'swrast', 'software', 'swr'
  return any(word in name for word in words)


def _refuse_drawing(physics):
  """Lets a task see that nothing is drawn, where it would draw at a reset."""
  physics.__class__ = type('Physics', (type(physics),), dict(contexts=None))


def _import_suite(renders):
  """Imports dm_control, telling trouble with OpenGL from all other trouble."""
  if importlib.util.find_spec('dm_control') is None:
    raise ImportError(
      'This task needs dm_control: pip install -r requirements.txt, and on '
      'Python 3.13 also pip install --no-deps dm-control (see README.md).'
    )
  changes = {}
  if not renders and 'dm_control' not in sys.modules:
    changes.update(MUJOCO_GL='disabled')  # or dm_control loads OpenGL
  with graphics_errors(), _environment(**changes):
    from dm_control import suite

  return suite


@contextlib.contextmanager
def graphics_errors():
  """Turns errors of OpenGL into a RenderError; others pass."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    places = [x.filename for x in traceback.extract_tb(error.__traceback__)]
    graphics = ('_render', 'OpenGL', 'gl_context')
    if any(name in place for name in graphics for place in places):
      raise _render_error(error) from error
    raise


@contextlib.contextmanager
def _environment(**changes):
  """Changes variables of the process, which workers inherit, for a while."""
  before = {name: os.environ.get(name) for name in changes}
  os.environ.update(changes)
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name)
      os.environ.update({} if value is None else {name: value})


def _render_error(error):
  chosen = os.environ.get('MUJOCO_GL') or 'unset'
  reason = str(error).strip().split('\n')[0].rstrip('.')
  reason = reason or type(error).__name__
  return RenderError(
    f'Cannot render with OpenGL (MUJOCO_GL is {chosen}): {reason}. '
    'Install the Debian packages libegl1, libopengl0, libgl1-mesa-dri and set '
    'MUJOCO_GL=egl, or install libosmesa6 and set MUJOCO_GL=osmesa. '
    'If MUJOCO_GL is not set, both are tried. What draws nothing works with '
    'MUJOCO_GL=disabled.'
  )


class Atari:
  """A game of the Arcade Learning Environment, after Machado et al. (2018).

  Each frame repeats the last action instead of the given one with probability
  `sticky`. The image is the larger of the last two frames, pixel by pixel (the
  console draws some objects in every other frame only), in color, resized to
  64x64. A game begins with 1 to `noops` frames without action.

  Args:
    name: a game of `atari_games()`.
    action_repeat: frames for each action.
    size: height and width of the image in pixels.
    noops: largest number of frames without action at the start, or 0.
    life_done: end an episode, with discount 0, when a life is lost; the next
      episode then goes on in the same game.
    sticky: probability of a repeated action.
    all_actions: all 18 actions rather than those that the game uses.
    seed: int or None.

  Raises:
    TaskError: no such game.
  """

  def __init__(
    self,
    name,
    action_repeat=4,
    size=(64, 64),
    noops=30,
    life_done=False,
    sticky=0.25,
    all_actions=False,
    seed=None,
    inputs='image',
    record='',
  ):
    check_name(name, atari_games(), 'atari_')
    import ale_py
    import ale_py.roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    self._ale = ale_py.ALEInterface()
    self._ale.setFloat('repeat_action_probability', sticky)
    self._rom = ale_py.roms.get_rom_path(name)
    self._random = np.random.RandomState(seed)
    self._load()
    legal, minimal = self._ale.getLegalActionSet, self._ale.getMinimalActionSet
    self._actions = legal() if all_actions else minimal()
    self._repeat, self._size = action_repeat, tuple(size)
    self._noops, self._life_done = noops, life_done
    height, width = self._ale.getScreenDims()
    screen = (
      f'the screen, {height}x{width}, the larger of the last two frames, '
      f'resized to {"x".join(map(str, size))}'
    )
    offers = dict(image=spaces.Offer(spaces.image_space(size), screen))
    view = spaces.View(f'atari_{name}', offers, inputs, record)
    self.about, self.observation_space = view.about, view.space
    self._goes_on = False  # whether the next episode continues this game
    self._reseeded = False
    self.action_space = gym.spaces.Discrete(len(self._actions))

  def _load(self):
    self._ale.setInt('random_seed', self._random.randint(2**31))
    self._ale.loadROM(self._rom)  # only now does the emulator take the seed

  def reseed(self, seed):
    self._random.seed(seed)
    self._reseeded = True

  def reset(self):
    if not self._goes_on:
      if self._reseeded:
        self._load()
        self._reseeded = False
      self._ale.reset_game()
      frames = 1 + self._random.randint(self._noops) if self._noops else 0
      for _ in range(frames):
        self._ale.act(0)
        if self._ale.game_over():
          self._ale.reset_game()
    self._goes_on = False
    self._lives = self._ale.lives()
    return self._observe([self._ale.getScreenRGB()])

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'Action {action!r} is not one of {self.action_space}.')
    reward, frames = 0.0, []
    for index in range(self._repeat):
      reward += self._ale.act(self._actions[action])
      over = self._ale.game_over()
      if over or index >= self._repeat - 2:
        frames.append(self._ale.getScreenRGB())
      if over:
        break
    lives = self._ale.lives()
    self._goes_on = self._life_done and lives < self._lives and not over
    self._lives = lives
    done = over or self._goes_on
    info = {'discount': np.float32(0 if done else 1), 'lives': lives}
    return self._observe(frames), reward, done, info

  def close(self):
    pass

  def _observe(self, frames):
    return {'image': spaces.resize(np.max(frames, 0), self._size)}


class DeepMindLab:
  """A level of DeepMind Lab, through its Python package `deepmind_lab`.

  The package must be built by hand; this class has been run against a
  stand-in with the same interface only. Each episode has a seed of its own,
  drawn from `seed`. When a level ends, by time as most do or not, the discount
  is 0: the package does not tell.

  Args:
    level: a level of DMLab-30, such as 'rooms_watermaze', or any other by its
      path, such as 'lt_chasm'; 'collect' is short for
      'rooms_collect_good_objects_train', the paper's task.
    action_repeat: frames for each action.
    size: height and width of the image in pixels.
    seed: int or None.
    test: use the levels that Lab holds out for testing: those that end in
      '_test' rather than '_train', and other random layouts.
  """

  # Look right (in pixels), look up, strafe right, forward, fire, jump, crouch:
  # the set of IMPALA (Espeholt et al., 2018), which the paper uses as well.
  ACTIONS = (
    (0, 0, 0, 1, 0, 0, 0),  # forward
    (0, 0, 0, -1, 0, 0, 0),  # backward
    (0, 0, -1, 0, 0, 0, 0),  # strafe left
    (0, 0, 1, 0, 0, 0, 0),  # strafe right
    (-20, 0, 0, 0, 0, 0, 0),  # look left
    (20, 0, 0, 0, 0, 0, 0),  # look right
    (-20, 0, 0, 1, 0, 0, 0),  # look left, forward
    (20, 0, 0, 1, 0, 0, 0),  # look right, forward
    (0, 0, 0, 0, 1, 0, 0),  # fire
  )

  def __init__(
    self,
    level,
    action_repeat=4,
    size=(64, 64),
    seed=None,
    test=False,
    inputs='image',
    record='',
  ):
    require_lab(level)
    import deepmind_lab

    config = {'height': str(size[0]), 'width': str(size[1])}
    config['logLevel'] = 'WARN'
    if test:  # the seed that Lab's documentation sets aside for testing
      config.update(allowHoldOutLevels='true', mixerSeed=str(0x600D5EED))
    path = lab_level(level, test)
    self._lab = deepmind_lab.Lab(path, ['RGB_INTERLEAVED'], config=config)
    self._random = np.random.RandomState(seed)
    self._repeat, self._size = action_repeat, tuple(size)
    image = spaces.Offer(spaces.image_space(size), 'the screen')
    view = spaces.View(f'dmlab_{level}', dict(image=image), inputs, record)
    self.about, self.observation_space = view.about, view.space
    self.action_space = gym.spaces.Discrete(len(self.ACTIONS))

  def reseed(self, seed):
    self._random.seed(seed)

  def reset(self):
    self._lab.reset(seed=self._random.randint(2**31 - 1))
    self._image = self._lab.observations()['RGB_INTERLEAVED']
    return {'image': self._image.copy()}

  def step(self, action):
    raw = np.array(self.ACTIONS[action], np.intc)
    reward = self._lab.step(raw, num_steps=self._repeat)
    done = not self._lab.is_running()
    if not done:  # after the end there are no observations
      self._image = self._lab.observations()['RGB_INTERLEAVED']
    info = {'discount': np.float32(0 if done else 1)}
    return {'image': self._image.copy()}, float(reward), done, info

  def close(self):
    self._lab.close()


def require_lab(level):
  """Raises TaskError unless the package of DeepMind Lab is there."""
  if importlib.util.find_spec('deepmind_lab') is None:
    raise TaskError(
      f'Task {"dmlab_" + level!r} needs the Python package deepmind_lab, which '
      'is not on PyPI: build it from https://github.com/google-deepmind/lab.'
    )


# fmt: off
_LAB30 = (
  'explore_goal_locations_large', 'explore_goal_locations_small',
  'explore_object_locations_large', 'explore_object_locations_small',
  'explore_object_rewards_few', 'explore_object_rewards_many',
  'explore_obstructed_goals_large', 'explore_obstructed_goals_small',
  'language_answer_quantitative_question', 'language_execute_random_task',
  'language_select_described_object', 'language_select_located_object',
  'lasertag_one_opponent_large', 'lasertag_one_opponent_small',
  'lasertag_three_opponents_large', 'lasertag_three_opponents_small',
  'natlab_fixed_large_map', 'natlab_varying_map_randomized',
  'natlab_varying_map_regrowth',
  'psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition',
  'psychlab_sequential_comparison', 'psychlab_visual_search',
  'rooms_collect_good_objects_train', 'rooms_collect_good_objects_test',
  'rooms_exploit_deferred_effects_train', 'rooms_watermaze',
  'rooms_exploit_deferred_effects_test', 'rooms_keys_doors_puzzle',
  'rooms_select_nonmatching_object', 'skymaze_irreversible_path_hard',
  'skymaze_irreversible_path_varied',
)
# fmt: on


def lab_level(name, test=False):
  """The path of a level in DeepMind Lab, of the held-out one for `test`."""
  if name == 'collect':
    name = 'rooms_collect_good_objects_train'
  if test and name.endswith('_train'):
    name = f'{name.removesuffix("_train")}_test'
  return f'contributed/dmlab30/{name}' if name in _LAB30 else name


# ---------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------


class ActionRepeat(Wrapper):
  """Repeats each action for `amount` environment steps.

  Rewards add up and discounts multiply; stops where the episode ends. An `env`
  with `advance` and `observe` renders only what is returned.
  """

  def __init__(self, env, amount):
    super().__init__(env)
    if amount < 1:
      raise ValueError(f'The action repeat must be at least 1, not {amount}.')
    self._amount = amount

  def step(self, action):
    unseen = hasattr(self._env, 'advance')
    total, discount, missed = 0.0, 1.0, 0
    for _ in range(self._amount):
      if unseen:
        reward, done, info = self._env.advance(action)
      else:
        obs, reward, done, info = self._env.step(action)
      total += reward
      discount *= info.get('discount', 1.0)
      missed += info.get('missed', 0)
      if done:
        break
    if unseen:
      obs = self._env.observe()
    if 'discount' in info:
      info = {**info, 'discount': np.float32(discount)}
    if 'missed' in info:
      info = {**info, 'missed': missed}
    return obs, total, done, info


class NormalizeActions(Wrapper):
  """Maps actions in [-1, 1] onto the Box of `env` (see `spaces.BoxMap`)."""

  def __init__(self, env):
    super().__init__(env)
    self._map = spaces.BoxMap(env.action_space)
    self.action_space = gym.spaces.Box(
      -1.0, 1.0, env.action_space.shape, np.float32
    )

  def step(self, action):
    return self._env.step(
      self._map(spaces.check_action(action, self.action_space))
    )


class TimeLimit(Wrapper):
  """Ends episodes after `duration` agent steps.

  An episode that only this limit ends keeps the discount of the environment,
  or 1 if that gives none: what comes after it would still have counted.
  """

  def __init__(self, env, duration):
    super().__init__(env)
    if duration < 1:
      raise ValueError(f'The time limit must be 1 step at least: {duration}.')
    self._duration = duration
    self._step = None

  def reset(self):
    self._step = 0
    return self._env.reset()

  def step(self, action):
    if self._step is None:
      raise RuntimeError('The episode is over: call reset() first.')
    obs, reward, done, info = self._env.step(action)
    self._step += 1
    if self._step >= self._duration:
      info = {'discount': np.float32(0 if done else 1), **info}
      done = True
    if done:
      self._step = None
    return obs, reward, done, info


class ObsDict(Wrapper):
  """Puts the observation of `env` under `key` of a dictionary."""

  def __init__(self, env, key='obs'):
    super().__init__(env)
    self._key = key
    self.observation_space = gym.spaces.Dict({key: env.observation_space})

  def reset(self):
    return {self._key: self._env.reset()}

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    return {self._key: obs}, reward, done, info


class OneHotAction(Wrapper):
  """Takes one-hot vectors where `env` takes numbers: Discrete, MultiDiscrete.

  Several choices are one-hot vectors side by side. `step` raises ValueError
  for what is not.
  """

  def __init__(self, env):
    super().__init__(env)
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
      self.action_space = spaces.OneHotBox(space.n)
    elif isinstance(space, gym.spaces.MultiDiscrete):
      self.action_space = spaces.OneHotBox(space.nvec)
    else:
      raise TypeError(f'{space} is not a Discrete action space.')
    self._single = isinstance(space, gym.spaces.Discrete)

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'Action {action} is not one-hot.')
    index = self.action_space.decode(action)
    return self._env.step(int(index[0]) if self._single else index)


class RewardObs(Wrapper):
  """Adds the reward to the observation, float32 []; it is 0 after a reset."""

  def __init__(self, env):
    super().__init__(env)
    parts = dict(env.observation_space.spaces)
    parts['reward'] = gym.spaces.Box(-np.inf, np.inf, (), np.float32)
    self.observation_space = gym.spaces.Dict(parts)

  def reset(self):
    return {**self._env.reset(), 'reward': np.zeros((), np.float32)}

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    return {**obs, 'reward': np.array(reward, np.float32)}, reward, done, info


class CheckFinite(Wrapper):
  """Refuses rewards and observations that are not finite in float32.

  Args:
    env: an environment with dictionaries as observations.
    name: of the task, for the error.
  """

  def __init__(self, env, name):
    super().__init__(env)
    self._name = name

  def reset(self):
    obs = self._env.reset()
    self._check(obs)
    return obs

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    self._check({**obs, 'the reward': reward})
    return obs, reward, done, info

  def _check(self, values):
    for key, value in values.items():
      value = np.asarray(value)
      if value.dtype.kind == 'f' and not np.isfinite(_stored(value)).all():
        raise FloatingPointError(
          f'{self._name} gave {key} that is not finite: {value}'
        )


def _stored(value):
  """As float32, where what is too large becomes infinite."""
  with np.errstate(over='ignore'):
    return value.astype(np.float32)


class EpisodeSeeds(Wrapper):
  """Seeds each episode by its number, so that any of them can be run again.

  Args:
    env: an environment with `reseed(seed)`, which says what the next `reset`
      starts from.
    seed: int; episode n gets a seed made of this and n.
  """

  def __init__(self, env, seed):
    super().__init__(env)
    self._seed = seed
    self._number = 0

  def reset(self, number=None):
    """Begins episode `number`, else that after the last; they count from 0."""
    self._number = self._number if number is None else number
    sequence = np.random.SeedSequence([self._seed, self._number])
    self._env.reseed(int(sequence.generate_state(1)[0] >> 1))
    self._number += 1
    return self._env.reset()
