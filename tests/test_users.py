"""What users bring: environments as people write them, and their modules.

Real environments of Gymnasium, and of Gym where the two differ, most of them
in real workers.
"""

import functools
import importlib
import json
import os
import pathlib
import signal
import socket
import sys
import time

import gymnasium
import numpy as np
import pytest

import cli
import episode_files
import gym_env
import gym_make
import processes
import spaces
import suites
import worker_calls
import worker_process
import wrappers
from spaces import gym
from worker_calls import RenderError, TaskError, WorkerError, WorkerLost

pytestmark = pytest.mark.slow

S = gymnasium.spaces
PIXELS = S.Box(0, 255, (64, 64, 3), np.uint8)
ROOT = os.path.dirname(os.path.abspath(wrappers.__file__))


class Base(gymnasium.Env):
  """Shows its time in every pixel, and refuses what is no action of it."""

  metadata = {'render_modes': ['rgb_array']}
  observation_space = PIXELS
  action_space = S.Box(-1, 1, (2,), np.float32)
  length = 20

  def __init__(self, render_mode=None):
    self.render_mode, self.time, self.actions = render_mode, 0, []

  def obs(self):
    space = self.observation_space
    return np.full(space.shape, self.time, space.dtype)

  def reset(self, seed=None, options=None):
    super().reset(seed=seed)
    self.time = 0
    return self.obs(), {}

  def step(self, action):
    if not self.action_space.contains(action):
      raise AssertionError(f'{action!r} is outside of {self.action_space}')
    self.actions.append(action)
    self.time += 1
    return self.obs(), self.reward(), False, self.time >= self.length, {}

  def reward(self):
    return 1.0

  def render(self):
    return np.full((64, 64, 3), 200, np.uint8)


def register(kind, name=None, library=gymnasium):
  """Registers an environment; returns the task that it is."""
  name = f'{name or kind.__name__}-v0'
  if name not in library.envs.registration.registry:
    library.register(name, entry_point=kind)
  return f'gym_{name}'


def make(kind, library=gymnasium, repeat=1, **kwargs):
  return suites.make_task(
    register(kind, library=library), repeat, 100, **kwargs
  )


def innermost(env):
  while hasattr(env, '_env'):
    env = env._env
  return env


def variant(base=Base, **attributes):
  """A class with other attributes, of a name of its own."""
  variant.count += 1
  return type(f'Variant{variant.count}', (base,), attributes)


variant.count = 0


# --- Optional methods -------------------------------------------------------


class NoSeed(Base):
  def reset(self):
    self.time = 0
    return self.obs(), {}


class OldNoSeed(gym.Env):
  """Crafter's interface: no seed, four values, nothing more."""

  observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
  action_space = gym.spaces.Discrete(2)

  def reset(self):
    self.time = 0
    return np.zeros((64, 64, 3), np.uint8)

  def step(self, action):
    self.time += 1
    return np.zeros((64, 64, 3), np.uint8), 1.0, self.time == 9, {}


class TakesAll(gymnasium.Wrapper):
  """Hands everything on, so that its signature says nothing."""

  def reset(self, **kwargs):
    return self.env.reset(**kwargs)


@pytest.mark.parametrize(
  'kind, library',
  [
    (NoSeed, gymnasium),
    (OldNoSeed, gym),
    (lambda **kwargs: TakesAll(NoSeed(**kwargs)), gymnasium),
  ],
)
def test_what_cannot_be_seeded_runs_and_says_so(kind, library):
  name = 'Wrapped' if kind.__name__ == '<lambda>' else None
  task = register(kind, name, library)
  env = suites.make_task(task, 1, 100, seed=3)
  for _ in range(2):
    assert env.reset()['image'][0, 0, 0] == 0
    done = False
    while not done:
      action = np.eye(2)[0] if library is gym else np.zeros(2)
      _, _, done, _ = env.step(action.astype(np.float32))
  assert sum('cannot be seeded' in line for line in env.about) == 1
  assert not any('seeded' in x for x in make(Base, seed=3).about)


class PlainRender(Base):
  observation_space = S.Box(-1, 1, (5,), np.float32)

  def __init__(self):
    super().__init__()


class NoCamera(PlainRender):
  def render(self):
    raise RuntimeError('no camera is attached')


class NoFrames(PlainRender):
  def render(self):
    return []


@pytest.mark.parametrize(
  'kind, why', [(NoCamera, 'no camera is att'), (NoFrames, 'list index out')]
)
def test_what_cannot_draw_has_no_images_and_says_what_to_do(kind, why):
  words = f'has no images.*cannot be used: {why}.*--inputs state .*rgb_array'
  with pytest.raises(TaskError, match=words):
    make(kind)
  assert make(kind, inputs='state').reset()['state'].shape == (5,)


class OldRender(PlainRender):
  def render(self, mode='human'):
    return super().render() if mode == 'rgb_array' else None


class ModernRender(Base):
  observation_space = S.Box(-1, 1, (5,), np.float32)

  def render(self):
    return super().render() if self.render_mode == 'rgb_array' else None


@pytest.mark.parametrize('kind', [PlainRender, OldRender, ModernRender])
def test_rendering_of_all_versions(kind):
  env = make(kind)
  assert (env.reset()['image'] == 200).all()
  assert 'what the environment renders' in env.about[0]
  assert env.about[1] == 'Not used: the observation (float32 [5]).'


# --- Actions ----------------------------------------------------------------

TOP = np.finfo(np.float32).max
HALF = np.float16


def box(low, high, dtype=np.float32):
  low, high = np.array(low, dtype), np.array(high, dtype)
  return S.Box(low, high, dtype=dtype)


@pytest.mark.parametrize(
  'space, least, middle, most',
  [
    (box([-2, 0], [4, 10]), [-2, 0], [1, 5], [4, 10]),
    # Each finite side counts by itself.
    (box([0, -np.inf], [np.inf, 3]), [0, -1], [1, 1], [2, 3]),
    (box([-7, 5], [np.inf, np.inf]), [-7, 5], [-3, 6], [1, 7]),
    (box([-np.inf] * 2, [-4, 0]), [-6, -2], [-5, -1], [-4, 0]),
    # Bounds this large are none.
    (box([-TOP, -1e9], [TOP, 1e9]), [-1, -1], [0, 0], [1, 1]),
    (box([-65504], [65504], HALF), [-1], [0], [1]),
    (box([-1e30], [1e300], np.float64), [-1], [0], [1]),
    # The range of these two is beyond float32, or rounded to nothing in it.
    (box([-9e8], [9e8]), [-9e8], [0], [9e8]),
    (box([0.1], [0.7]), [0.1], [0.4], [0.7]),
    (box([[1], [2]], [[3], [6]]), [[1], [2]], [[2], [4]], [[3], [6]]),
  ],
)
def test_boxes_of_all_bounds(space, least, middle, most):
  to = spaces.BoxMap(space)
  rng = np.random.default_rng(0)
  for sign, expected in ((-1, least), (0, middle), (1, most)):
    action = np.full(space.shape, sign, np.float32)
    np.testing.assert_allclose(to(action), expected, rtol=1e-3)
  for scale in (1, 1, 3):  # beyond [-1, 1] as well
    action = to(scale * rng.uniform(-1, 1, space.shape).astype(np.float32))
    assert space.contains(action) and np.isfinite(action).all()


def test_boxes_contain_their_rounded_ends():
  rng = np.random.default_rng(0)
  for dtype in (np.float16, np.float32, np.float64):
    for _ in range(300):
      ends = np.sort(rng.normal(0, 10, (2, 3)).astype(dtype), 0)
      space = S.Box(ends[0], ends[1], dtype=dtype)
      for sign in (-1.0, 1.0):
        assert space.contains(spaces.BoxMap(space)(np.full(3, sign, 'f')))


@pytest.mark.parametrize(
  'low, high, dtype, values',
  [
    (0, 3, np.int64, [0, 1, 2, 3]),
    (-1, 1, np.int8, [-1, 0, 1]),
    (250, 255, np.uint8, range(250, 256)),
    (-(2**63), 2**63 - 1, np.int64, [-1, 0, 1]),
    (5, 2**63 - 1, np.int64, [5, 6, 7]),
  ],
)
def test_integer_boxes_are_equal_bins(low, high, dtype, values):
  space = S.Box(low, high, (1,), dtype)
  to = spaces.BoxMap(space)
  actions = [to(np.array([x])) for x in np.linspace(-1, 1, 60_001)]
  assert all(map(space.contains, actions))
  found, counts = np.unique(actions, return_counts=True)
  assert found.tolist() == list(values)
  assert np.ptp(counts) <= 2


class Mirror(Base):
  """The action comes back as the reward, in digits."""

  def reward(self):
    return digits(np.ravel(self.actions[-1]))


def digits(numbers):
  return float(sum(n * 10**i for i, n in enumerate(numbers)))


@pytest.mark.parametrize(
  'space, choices, start',
  [
    (S.MultiDiscrete([3, 2]), (3, 2), 0),
    (S.MultiDiscrete([[3], [2]]), (3, 2), 0),
    (S.MultiDiscrete([3, 2], start=[4, 5]), (3, 2), [4, 5]),
    (S.MultiBinary(3), (2, 2, 2), 0),
    (S.MultiBinary([2, 1]), (2, 2), 0),
    (S.Discrete(3, start=2), (3,), 2),
  ],
)
def test_choices_are_one_hot_vectors_side_by_side(space, choices, start):
  env = make(variant(Mirror, action_space=space))
  assert env.action_space.choices == choices and env.action_space.discrete
  assert env.action_space.shape == (sum(choices),)
  env.reset()
  for number in range(12):
    index = np.array([number // 2**i % n for i, n in enumerate(choices)])
    parts = [np.eye(n)[i] for i, n in zip(index, choices, strict=True)]
    action = np.concatenate(parts).astype(np.float32)
    np.testing.assert_array_equal(env.action_space.encode(index), action)
    _, reward, _, _ = env.step(action)
    assert reward == digits(index + start)
  with pytest.raises(ValueError, match='not one-hot'):
    env.step(np.ones(sum(choices), np.float32))


def test_one_hot_space_of_several_choices():
  space = spaces.OneHotBox([3, 2])
  samples = np.stack([space.sample() for _ in range(400)])
  assert all(map(space.contains, samples)) and samples.dtype == np.float32
  np.testing.assert_allclose(
    samples.mean(0), [1 / 3] * 3 + [1 / 2] * 2, atol=0.1
  )
  for wrong in ([1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0.5, 0.5, 0, 1, 0]):
    assert not space.contains(np.array(wrong))
  many = space.encode(np.array([[2, 0], [1, 1]]))
  assert many.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
  assert space.decode(many[1]).tolist() == [1, 1]
  assert space.decode(many).tolist() == [[2, 0], [1, 1]]
  batch = many[None].repeat(3, 0)
  np.testing.assert_array_equal(space.encode(space.decode(batch)), batch)


# --- Images -----------------------------------------------------------------


def colors(height=64, width=48):
  """An image in which each pixel and channel has a number of its own."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGE = colors()
GRAY = IMAGE[..., :1]
OTHER = 255 - IMAGE
UNIT = IMAGE / np.float32(255)
ALPHA = np.full((64, 48, 1), 7, np.uint8)


def stack(*images, axis=-1):
  return np.concatenate(images, axis)


@pytest.mark.parametrize(
  'array, high, expected, words',
  [
    (IMAGE, 255, IMAGE, '64x48x3'),
    (GRAY, 255, GRAY, 'gray'),
    (GRAY[..., 0], 255, GRAY, '64x48, gray'),
    (IMAGE.transpose(2, 0, 1), 255, IMAGE, 'channels first'),
    (GRAY.transpose(2, 0, 1), 255, GRAY, 'channels first, gray'),
    (UNIT, 1, IMAGE, 'from 0 to 1'),
    (UNIT.transpose(2, 0, 1), 1, IMAGE, 'channels first, from 0 to 1'),
    (IMAGE.astype(np.float64), 255, IMAGE, '64x48x3'),
    (IMAGE.astype(np.int64), 255, IMAGE, '64x48x3'),
    (IMAGE > 127, 1, 255 * (IMAGE > 127), 'from 0 to 1'),
    (stack(IMAGE, ALPHA), 255, IMAGE, 'RGBA without its alpha'),
    (stack(OTHER, OTHER, IMAGE), 255, IMAGE, 'the newest of 3 frames'),
    (
      stack(OTHER, IMAGE).transpose(2, 0, 1),
      *(255, IMAGE, 'channels first, the newest of 2 frames'),
    ),
    (
      stack(IMAGE, GRAY).transpose(2, 0, 1),
      *(255, GRAY, 'gray, the newest of 4 frames'),
    ),
    (np.stack([OTHER, IMAGE]), 255, IMAGE, 'the newest of 2 frames'),
  ],
)
def test_images_of_all_layouts(array, high, expected, words):
  layout = spaces.image_layout(array.shape, array.dtype, 0, high)
  np.testing.assert_array_equal(layout.read(array), expected)
  assert layout.read(array).dtype == np.uint8
  assert words in str(layout)


FLOATS = IMAGE.astype(np.float32)


@pytest.mark.parametrize(
  'dtype, high, array, expected',
  [
    (np.uint8, 255, UNIT, None),
    (np.uint8, 255, IMAGE > 127, None),
    (np.uint8, 255, FLOATS, IMAGE),
    (np.uint8, 255, FLOATS / 2, np.rint(FLOATS / 2)),
    (np.uint8, 255, 0 * FLOATS, 0 * IMAGE),
    (np.uint8, 255, IMAGE.astype(np.int64), IMAGE),
    (np.float32, 1, IMAGE, None),
    (np.uint8, 1, IMAGE, None),
    (np.float32, 1, IMAGE > 127, 255 * (IMAGE > 127)),
    (np.float32, 1, IMAGE // 128, 255 * (IMAGE // 128)),
    (np.float32, 255, FLOATS, IMAGE),
    (np.float32, 255, FLOATS / 2, np.rint(FLOATS / 2)),
    (np.float32, 255, IMAGE, IMAGE),
  ],
)
def test_images_of_other_types_than_announced(dtype, high, array, expected):
  layout = spaces.image_layout(array.shape, dtype, 0, high)
  if expected is None:
    words = f'is {array.dtype}, .*says {np.dtype(dtype)}, up to {high}'
    with pytest.raises(ValueError, match=words):
      layout.read(array)
  else:
    np.testing.assert_array_equal(layout.read(array), expected)


@pytest.mark.parametrize(
  'dtype, high, array',
  [
    (np.float32, 1, FLOATS),
    (np.float32, 1, FLOATS / 255 - 0.5),
    (np.float32, 1, FLOATS / 200),
    (np.float32, 255, FLOATS - 128),
    (np.int64, 255, IMAGE.astype(np.int64) + 60),
    (np.float32, 1, np.full_like(FLOATS, np.nan)),
  ],
)
def test_images_beyond_their_bounds_are_errors(dtype, high, array):
  layout = spaces.image_layout(array.shape, dtype, 0, high)
  with pytest.raises(ValueError, match='where 0 to|not finite'):
    layout.read(array)


def test_a_depth_beside_an_image_is_not_used():
  """It is no image of 0 to 1 or 255, and no vector of a robot."""
  kind = dictionary(
    rgb=PIXELS,
    depth=S.Box(0, 10, (64, 64, 1), np.float32),
    pose=S.Box(-1, 1, (3,), np.float32),
  )
  env = make(kind, inputs='image,state')
  assert {*env.observation_space.spaces} == {'image', 'pose', 'reward'}
  assert "Cannot be used: the observation 'depth'" in ' '.join(env.about)


def test_frames_of_floats_a_little_above_one_stay_bright():
  near = np.full((64, 64, 3), 0.5, np.float32)
  near[0, 0] = 1.05
  kind = variant(
    observation_space=S.Box(-1, 1, (2,), np.float32),
    obs=lambda self: np.zeros(2, np.float32),
    render=lambda self: near if self.time % 2 else np.minimum(near, 1),
  )
  env = make(kind)
  env.reset()
  for _ in range(4):
    image = env.step(np.zeros(2, np.float32))[0]['image']
    assert image[9, 9].tolist() == [128] * 3 and image[0, 0, 0] == 255


def test_images_a_little_beyond_their_bounds_are_clipped():
  near = FLOATS / 255 * 1.1 - 0.05
  layout = spaces.image_layout(near.shape, np.float32, 0, 1)
  read = layout.read(near)
  assert read.min() == 0 and read.max() == 255
  np.testing.assert_allclose(read, np.clip(near * 255, 0, 255), atol=0.51)


@pytest.mark.parametrize(
  'shape, dtype, low, high',
  [
    ((128,), np.uint8, 0, 255),
    ((7, 7, 3), np.uint8, 0, 255),  # MiniGrid's, which are no pixels
    ((20, 30), np.float32, -np.inf, np.inf),
    ((20, 30), np.int64, 0, 10),  # a map of what is where
    ((19, 19), np.uint8, 0, 2),  # a board
    ((20, 30), np.float32, 0, 5),
    ((5, 3), np.float32, 0, 1),
  ],
)
def test_what_is_no_image(shape, dtype, low, high):
  assert spaces.image_layout(shape, dtype, low, high) is None


@pytest.mark.parametrize(
  'space',
  [
    S.Box(-np.inf, np.inf, (64, 64, 3), np.float32),
    S.Box(-1, 1, (3, 64, 64), np.float32),
    S.Box(0, 5, (64, 64, 1), np.float32),  # a depth, perhaps
    S.Box(0, 254, (64, 64, 3), np.int64),
    S.Box(0, 255, (64, 64, 40), np.uint8),
    S.Box(0, 255, (2, 2, 64, 64, 3), np.uint8),
  ],
)
def test_other_images_are_an_error_and_not_rendered(space):
  with pytest.raises(TaskError) as error:
    make(variant(observation_space=space))
  text = str(error.value)
  assert '[height, width, 3]' in text and 'channels first' in text
  assert str(space.shape) in text or f'{space.dtype} from' in text


def dictionary(**parts):
  """An environment with a dictionary of observations."""
  return variant(
    observation_space=S.Dict(parts),
    obs=lambda self: {k: v.sample() for k, v in parts.items()},
  )


def test_which_observation_is_the_image():
  small = S.Box(0, 255, (32, 32, 3), np.uint8)
  env = make(dictionary(front=small, image=PIXELS, speed=S.Box(-1, 1, (2,))))
  assert env.about == [
    "The agent sees the observation 'image', 64x64x3.",
    "Not used: the observation 'front' (image_2), "
    "the observation 'speed' (float32 [2]).",
  ]
  env = make(dictionary(left=small, goal=S.Discrete(4)))
  assert env.about == [
    "The agent sees the observation 'left', 32x32x3; resized to 64x64.",
    "Not used: the observation 'goal' (one of 4).",
  ]


def test_images_within_dictionaries_and_tuples():
  space = S.Dict(
    {'camera': S.Dict({'rgb': PIXELS}), 'pair': S.Tuple([S.Discrete(2)])}
  )
  env = make(
    variant(
      observation_space=space,
      obs=lambda self: {
        'camera': {'rgb': np.full((64, 64, 3), self.time, np.uint8)},
        'pair': (0,),
      },
    )
  )
  assert env.reset()['image'][0, 0, 0] == 0
  assert env.step(np.zeros(2))[0]['image'][0, 0, 0] == 1
  assert "the observation 'camera/rgb'" in env.about[0]
  assert "'pair/0' (one of 2)" in env.about[1]


def test_an_image_of_another_shape_than_announced_is_an_error():
  kind = variant(obs=lambda self: np.zeros((32, 64, 3), np.uint8))
  words = r'the observation: An image .*\(32, 64, 3\), not \(64, 64, 3\)'
  with pytest.raises(TaskError, match=words):
    make(kind)


def test_the_suite_says_what_is_not_used():
  env = wrappers.Async(
    functools.partial(suites.make_task, 'dmc_walker_walk', 2, 100)
  )
  try:
    assert env.about[0] == 'The agent sees camera 0, 64x64.'
    for name in ('orientations [14]', 'height []', 'velocity [9]'):
      assert name in env.about[1]
  finally:
    env.close()


# --- Wrappers and rewards ---------------------------------------------------


class Endless(Base):
  length = 10**9


class OldEndless(gym.Env):
  observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
  action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

  def reset(self, seed=None, options=None):
    super().reset(seed=seed)
    return np.zeros((64, 64, 3), np.uint8), {}

  def step(self, action):
    return np.zeros((64, 64, 3), np.uint8), 1.0, False, False, {}


@pytest.mark.parametrize(
  'library, base', [(gymnasium, Endless), (gym, OldEndless)]
)
def test_the_users_own_wrappers_stay(library, base):
  """What the entry point puts around counts, as does the registration."""

  def limited():
    return library.wrappers.TimeLimit(base(), 7)

  name = f'Limited{base.__name__}-v0'
  library.register(name, entry_point=limited, max_episode_steps=50)
  env = suites.make_task(f'gym_{name}', 1, 100)
  env.reset()
  ends = [env.step(np.zeros(2, np.float32)) for _ in range(7)]
  assert [end[2] for end in ends] == [False] * 6 + [True]
  assert ends[-1][3]['discount'] == 1
  kept = innermost(env)
  assert type(kept).__name__ == 'TimeLimit' and isinstance(kept.env, base)
  name = f'Registered{base.__name__}-v0'
  library.register(name, entry_point=base, max_episode_steps=5)
  env = suites.make_task(f'gym_{name}', 1, 100)
  for _ in range(2):
    env.reset()
    ends = [env.step(np.zeros(2, np.float32)) for _ in range(5)]
    assert [end[2] for end in ends] == [False] * 4 + [True]
  assert type(innermost(env)) is base


@pytest.mark.parametrize(
  'reward', [1, True, np.float32(1), np.array(1.0), np.array([[1]], np.int8)]
)
def test_rewards_of_one_element(reward):
  env = make(variant(reward=lambda self: reward))
  env.reset()
  assert env.step(np.zeros(2, np.float32))[1] == 1.0


@pytest.mark.parametrize(
  'reward, words',
  [
    (np.zeros(3), r'reward of shape \(3,\)'),
    (np.zeros(0), r'reward of shape \(0,\)'),
    (None, 'reward None'),
    ('much', "reward 'much'"),
  ],
)
def test_other_rewards_name_task_and_shape(reward, words):
  kind = variant(reward=lambda self: reward)
  env = make(kind)
  env.reset()
  with pytest.raises(ValueError, match=f'{kind.__name__}.*{words}'):
    env.step(np.zeros(2, np.float32))  # of one episode, which is dropped


# --- Errors of environments -------------------------------------------------


class Gone(Base):
  """Fails after 5 episodes, and then cannot be made again."""

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path, self.count = pathlib.Path(path), 0
    if self.path.exists():
      self.action_space = S.Text(4)

  def step(self, action):
    self.count += 1
    if self.count > 5 * self.length:
      self.path.touch()
      raise RuntimeError('the device is gone')
    return super().step(action)


class OnePort(Base):
  """Takes a port of its host, as a robot does."""

  length = 10

  def __init__(self, port, render_mode=None):
    super().__init__(render_mode)
    self.server = socket.create_server(('127.0.0.1', port))


class Growing(Base):
  """Shows one number more each time it is made, and fails after 3 episodes."""

  length = 5
  count = 0

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    with open(path, 'a') as file:
      file.write('.')
      size = file.tell()
    self.observation_space = S.Box(-99, 99, (size,), np.float32)

  def step(self, action):
    self.count += 1
    if self.count > 3 * self.length:
      raise RuntimeError('the device is gone')
    return super().step(action)


class Flaky(Base):
  """Raises an error at every step whose number is in a file."""

  length = 5
  count = 0

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path = path

  def step(self, action):
    with open(self.path, 'a+') as file:
      file.seek(0)
      count = len(file.read())
      file.write('.')
    if count in range(*bounds(self.path)):
      raise RuntimeError(f'unstable at {count}')
    return super().step(action)


def bounds(path):
  return json.loads(open(f'{path}.bounds').read())


def collect(tmp_path, bounds, episodes, tolerant=True, number=0, proven=None):
  """Runs episodes of `Flaky`; returns them and what was reported."""
  path = tmp_path / 'steps'
  (tmp_path / 'steps.bounds').write_text(json.dumps(bounds))
  register(Flaky)
  entry = functools.partial(
    suites.make_task,
    *('gym_test_users:Flaky-v0', 1, 100, 0),
    args={'path': str(path)},
  )
  finished, errors = [], []
  env = wrappers.Collect(
    wrappers.Async(entry),
    [finished.append],
    lost=errors.append,
    tolerant=tolerant,
    proven=proven,
  )
  env.number(number)
  try:
    while len(finished) < episodes:
      env.reset()
      done = False
      while not done:
        _, _, done, _ = env.step(np.zeros(2, np.float32))
  finally:
    env.close()
  return finished, errors


def test_an_error_after_a_whole_episode_drops_its_episode(tmp_path):
  finished, errors = collect(tmp_path, [7, 8], 3)
  assert [len(e['reward']) for e in finished] == [6, 6, 6]
  (error,) = errors
  assert 'unstable at 7' in str(error)
  assert "RuntimeError(f'unstable at {count}')" in error.traceback


def test_an_error_before_the_first_whole_episode_is_raised(tmp_path):
  with pytest.raises(WorkerError, match='unstable at 3'):
    collect(tmp_path, [3, 4], 3)


def test_with_env_errors_stop_any_error_is_raised(tmp_path):
  with pytest.raises(WorkerError, match='unstable at 7'):
    collect(tmp_path, [7, 8], 3, tolerant=False)


@pytest.mark.parametrize('last, raised', [(100, True), (9, False)])
def test_five_errors_in_a_row_are_raised(tmp_path, last, raised):
  if raised:
    with pytest.raises(WorkerError, match='unstable at 9'):
      collect(tmp_path, [5, last], 3)
  else:
    finished, errors = collect(tmp_path, [5, last], 2)
    assert len(finished) == 2 and len(errors) == 4


def test_episodes_of_earlier_runs_count(tmp_path):
  """A run that resumes is not at its first whole episode."""
  finished, errors = collect(tmp_path, [3, 4], 2, number=4)
  assert len(finished) == 2 and 'unstable at 3' in str(errors[0])


def test_episodes_of_other_environments_count(tmp_path):
  """Those of training, for an error in the first evaluation."""
  finished, errors = collect(tmp_path, [3, 4], 1, proven=lambda: True)
  assert len(finished) == len(errors) == 1
  with pytest.raises(WorkerError, match='unstable at'):
    collect(tmp_path, [0, 99], 1, proven=lambda: False)


class FlakyEvaluation(Base):
  """The second that is used fails in its first episode, once."""

  length = 5

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path, self.turn = pathlib.Path(path), None

  def step(self, action):
    if self.turn is None:
      with self.path.open('a') as file:
        file.write('.')
        self.turn = file.tell()
    if self.turn == 2:
      raise RuntimeError('the motor is hot')
    return super().step(action)


class Changing(Base):
  """Every third episode is too short to be learned from."""

  count = 0

  def reset(self, seed=None, options=None):
    self.count += 1
    self.length = 20 if self.count % 3 else 4
    return super().reset(seed=seed)


# --- What workers print -----------------------------------------------------


class Chatty(Base):
  def step(self, action):
    print('step', self.time, 'ü' * 3000)
    sys.stderr.write('no end of line' if self.time == 3 else 'end\n')
    if self.time == 4:
      os.write(1, b'last words \xff')
      os.kill(os.getpid(), signal.SIGKILL)
    return super().step(action)


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_what_workers_print_is_in_a_file_that_the_error_names(
  tmp_path, strategy
):
  path = tmp_path / 'a [1]%s' / 'workers.log'
  path.parent.mkdir()
  log = worker_calls.open_log(path)
  make = functools.partial(suites.make_task, 'gym_test_users:Chatty-v0', 1, 100)
  env = wrappers.Async(make, strategy, log=log, name='train 3')
  try:
    env.reset()
    with pytest.raises(WorkerLost) as error:
      for _ in range(6):
        env.step(np.zeros(2, np.float32))
  finally:
    env.close()
    log.close()
  text = path.read_text()
  for step in range(4):
    assert f'train 3: step {step} ü' in text
  assert str(path) in str(error.value)
  if strategy == 'process':
    assert 'last words' in text and 'last words' in str(error.value)
  assert max(map(len, text.splitlines())) < worker_calls.Output.LINE + 100


def test_the_file_is_bounded(tmp_path):
  log = worker_calls.open_log(tmp_path / 'workers.log')
  output = worker_calls.Output(log, 'x')
  for number in range(300):
    output.write(f'{number} '.encode() + 20_000 * b'x')
  log.close()
  sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
  assert set(sizes) == {'workers.log', 'workers.log.1'}
  assert 10**6 < sum(sizes.values()) <= 2 * 10**6
  assert '299 ' in (tmp_path / 'workers.log').read_text()


def test_without_room_for_it_workers_go_on(tmp_path, capfd):
  log = worker_calls.open_log(tmp_path / 'no such folder' / 'workers.log')
  log.baseFilename = '/dev/full'
  output = worker_calls.Output(log, 'x')
  output.write(b'words\n' * 10_000)
  assert 'words' in output.lost('died')[1][1]
  assert capfd.readouterr().err == ''


# --- Modules of the user ----------------------------------------------------

MODULE = """
import gymnasium
import numpy as np
import cli, configs, gym_env, models, spaces, tools, workers, wrappers

for module in (cli, configs, gym_env, models, spaces, tools, workers, wrappers):
  assert module.MINE, module

class Mine(gymnasium.Env):
  observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
  action_space = gymnasium.spaces.MultiDiscrete([2, 3])

  def reset(self, seed=None, options=None):
    import wrappers  # only now
    return np.full((64, 64, 3), wrappers.MINE, np.uint8), {}

  def step(self, action):
    return np.zeros((64, 64, 3), np.uint8), 1.0, True, False, {}

gymnasium.register('Mine-v7', Mine)
"""


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_the_users_modules_go_before_ours(tmp_path, monkeypatch, strategy):
  """And the current folder is searched, as with `python -m`."""
  (tmp_path / 'my_envs.py').write_text(MODULE)
  names = ('tools', 'models', 'configs', *worker_process.OWN)
  for name in names:
    (tmp_path / f'{name}.py').write_text('MINE = 9')
  if strategy == 'ray':  # it keeps the folder that it is started in
    import ray_cluster

    ray_cluster.connect()
  monkeypatch.chdir(tmp_path)
  make = functools.partial(
    suites.make_task, 'gym_my_envs:Mine-v7', 1, 10, seed=0
  )
  env = wrappers.Async(make, strategy)
  try:
    assert isinstance(env.action_space, spaces.OneHotBox)
    for _ in range(2):
      assert (env.reset()['image'] == 9).all()
      _, reward, done, _ = env.step(np.array([0, 1, 0, 0, 1], np.float32))
      assert (reward, done) == (1.0, True)
  finally:
    env.close()


def own_modules():
  """Modules of ours that a worker has, but for the test's."""
  suites.make_task('toy_reach').reset()
  folders = {n: getattr(m, '__file__', None) for n, m in sys.modules.items()}
  own = {n for n, f in folders.items() if f and os.path.dirname(f) == ROOT}
  return own, sys.path


def test_our_modules_and_their_place_in_a_worker():
  from worlds import in_worker

  own, path = in_worker(own_modules)
  for_actors = {'ray_cluster', 'ray_workers'}
  assert own == set(worker_process.OWN) - for_actors
  assert path[-1] == ROOT and ROOT not in path[:-1]


# --- Starting ---------------------------------------------------------------


class SlowStart(Base):
  def __init__(self, seconds, render_mode=None):
    super().__init__(render_mode)
    time.sleep(seconds)


class SlowAgain(Base):
  """Takes the seconds in a file to start, and writes its process there."""

  length = 10

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    path = pathlib.Path(path)
    seconds = float(path.read_text())
    path.with_suffix('.pid').write_text(str(os.getpid()))
    time.sleep(seconds)


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_starting_has_a_limit_of_its_own(strategy):
  task = 'gym_test_users:SlowStart-v0'
  make = functools.partial(suites.make_task, task, 1, 100, args={'seconds': 3})
  env = wrappers.Async(make, strategy, 2, 100)
  assert env.reset()['image'].shape == (64, 64, 3)
  env.close()
  make.keywords['args']['seconds'] = 60
  env = wrappers.Async(make, strategy, 100, 3)
  with pytest.raises(WorkerLost, match='3 seconds.* --start_timeout'):
    env.reset()
  env.close()


class Slow(Base):
  def step(self, action):
    time.sleep(60)


def test_a_slow_step_names_its_flag():
  make = functools.partial(suites.make_task, 'gym_test_users:Slow-v0', 1, 9)
  env = wrappers.Async(make, 'process', 2, 100)
  env.reset()
  with pytest.raises(WorkerLost, match='2 seconds.* --worker_timeout'):
    env.step(np.zeros(2, np.float32))
  env.close()


# --- Arguments and names ----------------------------------------------------


class Map(Base):
  def __init__(self, map_name, render_mode=None):
    super().__init__(render_mode)
    self.map_name = map_name


def test_arguments_of_the_constructor():
  env = make(Map, args={'map_name': '4x4'})
  assert innermost(env).map_name == '4x4'
  for args, words in (
    ({}, "no --env_args: .*'map_name'"),
    ({'map': 1}, """--env_args '{"map": 1}': .*'map'"""),
    ({'map_name': 1, 'size': 2}, "--env_args .*'size'"),
  ):
    with pytest.raises(TaskError, match=words):
      make(Map, args=args)


class NoMode(Base):
  """Does not know how to render."""

  def __init__(self, size=3):
    super().__init__()


def test_a_wrong_argument_is_named_where_there_is_no_render_mode():
  assert make(NoMode, args={'size': 4}).reset()['image'].shape == (64, 64, 3)
  with pytest.raises(TaskError, match="argument 'sise'"):
    make(NoMode, args={'sise': 4})


@pytest.mark.parametrize('steps', [5, 20])
def test_another_limit_than_the_registered_one(steps):
  task = f'gym_{Endless.__name__}Limited-v0'
  if task[4:] not in gymnasium.registry:
    gymnasium.register(task[4:], entry_point=Endless, max_episode_steps=10)
  for args, expected in (({}, 10), ({'max_episode_steps': steps}, steps)):
    env = suites.make_task(task, 1, 100, args=args)
    env.reset()
    ends = [env.step(np.zeros(2, np.float32))[2:] for _ in range(expected)]
    assert [done for done, _ in ends] == [False] * (expected - 1) + [True]
    assert ends[-1][1]['discount'] == 1
    assert not any('cut after' in line for line in env.about)
    short = suites.make_task(task, 1, 3, args=args).about
    assert (
      f'Episodes are cut after 3 of {expected} steps (--time_limit).' in short
    )


class Broken(Base):
  def __init__(self, render_mode=None):
    raise TypeError('unsupported operand')


def test_an_error_within_a_constructor_is_its_own():
  with pytest.raises(TypeError, match='operand'):
    make(Broken)


@pytest.mark.parametrize(
  'task, form',
  [
    ('crafter_reward', 'gym_crafter:CrafterReward-v1'),
    ('CrafterReward-v1', 'gym_crafter:CrafterReward-v1'),
    ('metaworld_reach-v3', 'gym_metaworld:'),
    ('metaworld_door_open', '--env_args'),
    ('minigrid_empty', 'gym_minigrid:MiniGrid-Empty-8x8-v0'),
    ('MiniGrid-Empty-5x5-v0', 'gym_minigrid:MiniGrid-Empty-5x5-v0'),
    ('ALE/Pong-v5', 'gym_ale_py:ALE/Pong-v5'),
    ('CartPole-v1', 'gym_CartPole-v1'),
    ('Gym_CartPole-v1', 'written gym_CartPole-v1'),
    ('gymnasium_CartPole-v1', 'written gym_CartPole-v1'),
    ('gym/CartPole-v1', 'written gym_CartPole-v1'),
    ('dmc_walker_wlak', 'dmc_walker_walk'),
  ],
)
def test_names_of_other_suites_get_the_right_form(task, form):
  with pytest.raises(cli.UserError) as error:
    suites.check_task(task)
  assert form in str(error.value)


def test_an_id_without_its_package_gets_the_right_form():
  with pytest.raises(TaskError) as error:
    suites.make_task('gym_MiniGrid-Empty-5x5-v0')
  assert '--task gym_minigrid:MiniGrid-Empty-5x5-v0' in str(error.value)
  with pytest.raises(TaskError, match='pip install'):
    gym_make.make('metaworld:Meta-World/MT1', {})
  with pytest.raises(TaskError, match='current folder'):
    gym_make.make('no_such_module_of_mine:X-v0', {})


# fmt: off
for _kind in (
  Changing, Chatty, Flaky, FlakyEvaluation, Gone, Growing, OnePort, Slow,
  SlowAgain, SlowStart,
):
  # fmt: on
  register(_kind)


# --- What environments do to their own ---------------------------------------


class Reusing(Base):
  """Writes over the array that it gave, as many do."""

  observation_space = S.Box(-99, 99, (2,), np.float32)
  given = np.zeros(2, np.float32)

  def obs(self):
    self.given[:] = self.time
    return self.given


@pytest.mark.parametrize('strategy', ['none', 'thread', 'process'])
def test_an_array_that_is_used_again_is_copied(strategy):
  kind = functools.partial(suites.make_task, 'custom_reuse', 1, 5, 0)
  kind = functools.partial(kind, function=Reusing, inputs='state')
  env = wrappers.Collect(wrappers.Async(kind, strategy))
  env.reset()
  for _ in range(5):
    info = env.step(np.zeros(2, np.float32))[3]
  env.close()
  assert info['episode']['state'][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
  'keys, names',
  [
    (['/joint_states', 'a..b'], ['a.b', 'joint_states']),
    (['/'], ['state']),
    (['a/b', 'b', ('a', 'b')], ['a/b', 'a/b_', 'b']),
    (['a\0b', 'a\nb', ' c '], ['a b', 'a b_', 'c']),
    (['a\udcff', 'a?'], ['a?', 'a?_']),
    (['ä' * 40_000], ['ä' * 30_000]),
  ],
)
def test_any_key_is_the_name_of_an_array_in_a_file(tmp_path, keys, names):
  """Topics of ROS, for instance, begin with a slash."""
  parts = {}
  for key in keys:
    inner, key = (parts, key) if isinstance(key, str) else ({}, key)
    if isinstance(key, str):
      inner[key] = S.Box(-1, 1, (2,), np.float32)
    else:
      parts[key[0]] = S.Dict({key[1]: S.Box(-1, 1, (2,), np.float32)})
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = wrappers.Collect(
    suites.make_task('custom_keys', 1, 5, 0, function=kind, inputs='state'),
    [lambda episode: episode_files.save_episodes(tmp_path, [episode])],
  )
  env.reset()
  for _ in range(5):
    env.step(np.zeros(2, np.float32))
  assert sorted(env.observation_space.spaces) == sorted([*names, 'reward'])
  (path,) = tmp_path.glob('*.npz')
  rows = episode_files.EpisodeFile(path).read(0, 6)
  assert {*names, 'action', 'reward', 'discount'} == set(rows)


def test_an_observation_without_entries_is_no_hindrance():
  parts = dict(none=S.Box(-1, 1, (0,)), some=S.Box(-1, 1, (2,)))
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = suites.make_task('custom_none', function=kind)
  assert env.observation_space['image'].shape == (64, 64, 3)
  env = suites.make_task('custom_none', function=kind, inputs='state')
  assert env.observation_space['some'].shape == (2,)
  with pytest.raises(TaskError, match='no number.*among image, some'):
    suites.make_task('custom_none', function=kind, inputs='none')
  with pytest.raises(TaskError, match='--inputs state: there is no n'):
    kind = variant(observation_space=parts['none'])
    suites.make_task('custom_none', function=kind, inputs='state')


def test_too_many_choices_are_no_input():
  parts = dict(
    large=S.Discrete(2**31 - 1),
    several=S.MultiDiscrete([9_000, 9_000]),
    small=S.Discrete(3),
  )
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = suites.make_task('custom_large', function=kind, inputs='state')
  assert sorted(env.observation_space.spaces) == ['reward', 'small']
  words = r"large: .* has no such.*cannot be used: .*large. \(one of 2147"
  with pytest.raises(TaskError, match=words):
    suites.make_task('custom_large', function=kind, inputs='large')


@pytest.mark.parametrize('choice', [-1, 3])
def test_a_choice_that_there_is_not_is_an_error(choice):
  kind = variant(observation_space=S.Discrete(3), obs=lambda self: choice)
  env = make(kind, inputs='state')
  words = rf'the observation \(one of 3\): {choice} is none of the choices'
  with pytest.raises(ValueError, match=words):
    env.reset()


@pytest.mark.parametrize(
  'space', [S.Discrete(3, start=5), S.MultiDiscrete([3], start=[5])]
)
@pytest.mark.parametrize('choice', [np.nan, np.inf, 5.5, [5, 6]])
def test_what_is_no_number_of_a_choice_is_an_error(space, choice):
  kind = variant(observation_space=space, obs=lambda self: choice)
  env = make(kind, inputs='state')
  with pytest.raises(ValueError, match='choices'):
    env.reset()


@pytest.mark.parametrize('choice', [6, 6.0, np.uint8(6), [6], np.array([[6]])])
def test_choices_of_all_types(choice):
  space = S.Discrete(3, start=5)
  kind = variant(observation_space=space, obs=lambda self: choice)
  assert make(kind, inputs='state').reset()['state'].tolist() == [0, 1, 0]


def test_a_module_of_the_current_folder_without_a_worker(tmp_path, monkeypatch):
  (tmp_path / 'bare_module.py').write_text(
    'import gymnasium\n'
    "gymnasium.register('Bare-v0', entry_point=\n"
    "  'gymnasium.envs.classic_control:CartPoleEnv')\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  env = suites.make_task('gym_bare_module:Bare-v0', inputs='state')
  assert env.reset()['state'].shape == (4,)


def test_a_module_of_our_name_is_refused_without_a_worker(tmp_path):
  from processes import run_script

  (tmp_path / 'arguments.py').write_text(
    'import gymnasium\n'
    "gymnasium.register('Other-v0', entry_point=\n"
    "  'gymnasium.envs.classic_control:CartPoleEnv')\n"
  )
  code = """
    import functools
    import sys
    import suites
    import worker_calls
    import workers
    make = functools.partial(
      suites.make_task, 'gym_arguments:Other-v0', inputs='state')
    env = workers.Async(make, sys.argv[1])
    try:
      print(env.reset()['state'].shape)
    except worker_calls.TaskError as error:
      print(error)
    env.close()
  """
  env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
  done = run_script(code, 'thread', env=env)
  assert 'arguments is the name of one of this program' in done.stdout
  assert run_script(code, 'process', env=env).stdout == '(4,)\n'


@pytest.mark.parametrize('module', ['./mine', '../mine', '/mine', '.mine'])
def test_a_path_is_no_module(module):
  with pytest.raises(TaskError, match='is a path; the name of a'):
    suites.make_task(f'gym_{module}:Id-v0')


class Lengthening(Base):
  """A vector of another length than its space says, now and then."""

  observation_space = S.Box(-99, 99, (2,), np.float32)

  def obs(self):
    return np.zeros(2 + (self.time == 3), np.float32)


def test_a_vector_of_another_shape_than_announced_is_an_error():
  env = make(Lengthening, inputs='state')
  env.reset()
  with pytest.raises(ValueError, match=r'shape \(3,\); its space says \(2,\)'):
    for _ in range(3):
      env.step(np.zeros(2, np.float32))


def test_several_environments_in_one_are_refused():
  with pytest.raises(TaskError, match='gave several environments in'):
    suites.make_task(
      'custom_several',
      function=lambda: gymnasium.make_vec('CartPole-v1', num_envs=2),
      inputs='state',
    )


@pytest.mark.parametrize('missed', [None, 'ball', 1.5])
def test_what_is_missed_may_be_something_else(missed):
  info = {'missed': missed}
  kind = variant(step=lambda self, action: (*Base.step(self, action)[:4], info))
  env = make(kind)
  env.reset()
  assert 'missed' not in env.step(np.zeros(2, np.float32))[3]


@pytest.mark.parametrize(
  'missed, taken', [(0, 0), (np.int8(3), 3), (True, None)]
)
def test_what_is_missed_is_a_whole_number(missed, taken):
  assert stepping(info={'missed': missed})[3].get('missed') == taken


def stepping(*, five=True, info=None, **changes):
  """What a step gives of an environment that says such things."""
  said = list({'terminated': False, 'truncated': False, **changes}.values())
  said = said if five else said[:1]
  kind = variant(
    step=lambda self, action: (self.obs(), 1.0, *said, info or {})
  )
  env = make(kind)
  env.reset()
  return env.step(np.zeros(2, np.float32))


def test_fewer_ticks_than_none_are_an_error():
  with pytest.raises(ValueError, match=r"Variant.* gave info\['missed'\] -1"):
    stepping(info={'missed': -1})


@pytest.mark.parametrize(
  'value, done', [(np.bool_(True), True), (1, True), (np.zeros(1), False)]
)
def test_what_says_that_an_episode_has_ended(value, done):
  assert stepping(terminated=value)[2] is done
  assert stepping(truncated=value)[2] is done
  cut = {'TimeLimit.truncated': value}
  assert stepping(five=False, info=cut, terminated=True)[3] == {
    'discount': float(done)
  }


@pytest.mark.parametrize('value', ['False', np.nan, 2, None, [1, 0]])
@pytest.mark.parametrize('name', ['terminated', 'truncated'])
def test_what_is_no_truth_is_an_error(name, value):
  with pytest.raises(ValueError, match=f'gave {name} .*; it is True or False'):
    stepping(**{name: value})


@pytest.mark.parametrize('result', [None, (1, 2.0, False), (PIXELS,) * 6])
def test_steps_of_other_numbers_of_values_are_errors(result):
  env = make(variant(step=lambda self, action: result))
  env.reset()
  with pytest.raises(ValueError, match=r'Variant.*step\(\) gave no tuple of f'):
    env.step(np.zeros(2, np.float32))


def test_no_info_is_an_empty_one():
  kind = variant(
    reset=lambda self, seed=None, options=None: (
      Base.reset(self, seed=seed)[0],
      None,
    ),
    step=lambda self, action: (*Base.step(self, action)[:4], None),
  )
  env = make(kind)
  assert env.reset()['image'].shape == (64, 64, 3)
  assert env.step(np.zeros(2, np.float32))[1] == 1.0


@pytest.mark.parametrize('info', [False, np.False_, 'none', 3])
def test_what_is_no_info_is_an_error(info):
  """As the last of four values that have `truncated` there."""
  env = make(
    variant(step=lambda self, action: (*Base.step(self, action)[:3], info))
  )
  env.reset()
  with pytest.raises(ValueError, match=r'Variant.*gave a \w+ for info'):
    env.step(np.zeros(2, np.float32))


@pytest.mark.parametrize(
  'obs, words',
  [
    (dict(pose=np.zeros(2)), "no 'goal', .*: it is a dict"),
    (None, "no '(pose|goal)', .*: it is a NoneType"),
    (np.zeros(4), "no '(pose|goal)', .*: it is a ndarray"),
  ],
)
def test_an_observation_without_a_part_is_an_error(obs, words):
  pair = S.Box(-1, 1, (2,), np.float32)
  kind = variant(
    observation_space=S.Dict(pose=pair, goal=pair), obs=lambda self: obs
  )
  with pytest.raises(ValueError, match=f'Variant.*the observation.*{words}'):
    make(kind, inputs='state').reset()


class OwnBox:
  """A space of the user's own, of which each is another."""

  dtype, shape = np.dtype(np.float32), (2,)

  def __init__(self, scale):
    self.low, self.high = np.full((2, 2), [[-scale], [scale]], np.float32)


OwnBox.__name__ = 'Box'


def test_bounds_and_spaces_may_be_made_anew():
  kind = variant(
    action_space=property(lambda self: OwnBox(1 + self.time)),
    step=lambda self, action: (self.obs(), 1.0, False, False, {}),
  )
  env = make(kind)
  for _ in range(2):
    env.reset()
    env.step(np.ones(2, np.float32))


def test_an_action_space_that_changes_is_an_error():
  def reset(self, seed=None, options=None):
    self.episodes = getattr(self, 'episodes', 0) + 1
    self.action_space = S.Discrete(3 if self.episodes < 3 else 2)
    return Base.reset(self, seed=seed)

  env = make(variant(reset=reset, action_space=S.Discrete(3)))
  env.reset()
  with pytest.raises(TaskError, match=r'Discrete\(2\) now, and took Discrete'):
    env.reset()


class Level(Base):
  """Draws its level once, by the seed of its first reset."""

  observation_space = S.Box(0, 1, (1,), np.float32)
  level = None

  def obs(self):
    if self.level is None:
      self.level = self.np_random.uniform()
    return np.array([self.level], np.float32)


def test_a_level_of_the_first_reset_is_that_of_the_seed():
  levels = [
    make(Level, inputs='state', seed=seed).reset()['state'].item()
    for seed in (7, 7, 8)
  ]
  assert levels[0] == levels[1] != levels[2]


class Numbered(Base):
  """Has a number of its own where Gym had a method."""

  def __init__(self, render_mode=None):
    super().__init__(render_mode)
    self.seed = 3

  def reset(self):
    self.time = 0
    return self.obs(), {}


def test_a_seed_that_is_no_method():
  env = make(Numbered, seed=1)
  assert env.reset()['image'].shape == (64, 64, 3)
  assert any('cannot be seeded' in line for line in env.about)


def test_a_reset_that_is_not_of_python():
  """Neither tells its arguments, nor takes any."""
  env = gym_env.GymEnv('x', seed=1, function=Base)
  env._env.reset = functools.partial(next, iter([(PIXELS.sample(), {})] * 9))
  assert gym_env._seeding(env._env) == 'reset'
  env._seeding = 'reset'
  assert env.reset()['image'].any() and env._seeding is None


class Strict(Base):
  """Draws nothing for programs, and checks what it is asked."""

  metadata = {'render_modes': ['human']}

  def __init__(self, render_mode=None):
    assert render_mode is None or render_mode in self.metadata['render_modes']
    super().__init__(render_mode)


def test_a_mode_of_rendering_that_is_refused_is_not_needed_for_images():
  assert make(Strict).reset()['image'].shape == (64, 64, 3)


class Pair(OldEndless):
  """An array and a dictionary, which is no info."""

  observation_space = gym.spaces.Tuple(
    [
      gym.spaces.Box(-1, 1, (3,), np.float32),
      gym.spaces.Dict(speed=gym.spaces.Box(-1, 1, (1,), np.float32)),
    ]
  )

  def reset(self):
    return np.ones(3, np.float32), dict(speed=np.zeros(1, np.float32))

  def step(self, action):
    return self.reset(), 1.0, False, {}


def test_a_pair_of_observations_is_not_taken_for_an_info():
  env = make(Pair, gym, inputs='0,1/speed')
  obs = env.reset()
  assert (obs['0'] == 1).all() and obs['1/speed'].shape == (1,)


class Fading(PlainRender):
  """Draws floats up to 255, some of them nearly black."""

  def render(self):
    value = (100.0, 1.0, 50.0)[self.time % 3]
    return np.full((64, 64, 3), value, np.float32)


def test_dark_frames_of_floats_are_dark():
  env = make(Fading)
  seen = [env.reset()['image'][0, 0, 0]]
  for _ in range(2):
    seen.append(env.step(np.zeros(2, np.float32))[0]['image'][0, 0, 0])
  assert seen == [100, 1, 50]


class NoFrame(PlainRender):
  """Draws no image in the second episode."""

  episodes = 0
  length = 3

  def reset(self, seed=None, options=None):
    NoFrame.episodes += 1
    return super().reset(seed=seed)

  def render(self):
    return super().render() if self.episodes != 3 else np.zeros(3)


def test_a_frame_that_is_none_drops_its_episode():
  """The first reset is of the constructor."""
  make_it = functools.partial(
    suites.make_task, 'custom_x', 1, 100, 0, function=NoFrame
  )
  errors = []
  env = wrappers.Collect(
    wrappers.Async(make_it), lost=errors.append, tolerant=True
  )
  env.number(0)
  try:
    for _ in range(3):
      env.reset()
      done = False
      while not done:
        _, _, done, _ = env.step(np.zeros(2, np.float32))
  finally:
    env.close()
  assert errors and 'shape (3,)' in str(errors[0])  # in each worker


class NoGraphics(Base):
  def __init__(self, render_mode=None):
    super().__init__(render_mode)
    from OpenGL import platform

    platform.fails_here()


def test_trouble_of_gymnasium_with_graphics_is_told_as_such(tmp_path):
  env = dict(os.environ, MUJOCO_GL='glfw')
  env.pop('DISPLAY', None)
  code = """
    import os
    import sys
    import suites
    import worker_calls
    os.chdir(sys.argv[1])  # where MuJoCo leaves a log
    try:
      suites.make_task('gym_HalfCheetah-v5', 1)
    except worker_calls.RenderError as error:
      print(error)
  """
  done = processes.run_script(code, str(tmp_path), env=env)
  assert 'OpenGL (MUJOCO_GL is glfw)' in done.stdout, done.stderr


def test_the_users_trouble_is_not_that_of_graphics(tmp_path, monkeypatch):
  """Whatever folders and files are called."""
  folder = tmp_path / 'my_OpenGL_render'
  folder.mkdir()
  (folder / 'gl_context_render.py').write_text('def go():\n  raise KeyError(7)')
  monkeypatch.syspath_prepend(folder)

  class Failing(Base):
    def __init__(self, render_mode=None):
      super().__init__(render_mode)
      importlib.import_module('gl_context_render').go()

  with pytest.raises(KeyError):
    make(Failing)


def test_trouble_with_graphics_is_told_as_such(monkeypatch):
  from OpenGL import platform

  code = compile(
    'def fails_here(): raise RuntimeError("no EGL")', platform.__file__, 'exec'
  )
  space = {}
  exec(code, space)
  monkeypatch.setattr(
    platform, 'fails_here', space['fails_here'], raising=False
  )
  with pytest.raises(RenderError, match='no EGL.*MUJOCO_GL=disabled'):
    make(NoGraphics)
