"""Atari on the real emulator, Gym and Gymnasium, DeepMind Lab's adapter.

DeepMind Lab must be built by hand and is not here: its adapter is tested
against a stand-in with the interface of its Python package.
"""

import functools
import sys
import textwrap

import ale_py
import ale_py.roms
import numpy as np
import PIL.Image
import pytest

import atari_env
import lab_env
import spaces
import suites
import wrappers
from spaces import gym
from worker_calls import TaskError

# ---------------------------------------------------------------------------
# Atari
# ---------------------------------------------------------------------------


def emulator(game, sticky=0.0, seed=0):
  ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
  ale = ale_py.ALEInterface()
  ale.setInt('random_seed', seed)
  ale.setFloat('repeat_action_probability', sticky)
  ale.loadROM(ale_py.roms.get_rom_path(game))
  ale.reset_game()
  return ale


def bilinear_weights(old, new):
  """[new, old]: triangles as wide as two new pixels, around the new ones."""
  scale = old / new
  centers = (np.arange(new) + 0.5) * scale
  distance = np.abs(np.arange(old) + 0.5 - centers[:, None]) / scale
  weights = np.clip(1 - distance, 0, None)
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.slow
def test_every_game_loads():
  games = atari_env.atari_games()
  assert len(games) == 104 and 'pong' in games
  for game in games:
    env = wrappers.Atari(game, noops=0, seed=0)
    assert env.reset()['image'].shape == (64, 64, 3)
    obs, reward, _, info = env.step(0)
    assert obs['image'].dtype == np.uint8 and np.isfinite(reward)
    assert 1 < env.action_space.n <= 18 and info['discount'] in (0, 1)


def test_frames_and_rewards_are_those_of_the_emulator():
  """The larger of the last two of four frames, resized bilinearly."""
  env = wrappers.Atari('space_invaders', noops=0, sticky=0.0, seed=0)
  env.reset()
  ale = emulator('space_invaders')
  actions = ale.getMinimalActionSet()
  assert env.action_space.n == len(actions) == 6
  rows, columns = bilinear_weights(210, 64), bilinear_weights(160, 64)
  rng = np.random.default_rng(0)
  total = flicker = 0
  for _ in range(120):
    action = int(rng.integers(6))
    obs, reward, _, _ = env.step(action)
    rewards, frames = [], []
    for _ in range(4):
      rewards.append(ale.act(actions[action]))
      frames.append(ale.getScreenRGB().astype(np.float64))
    assert reward == sum(rewards)
    total += reward
    flicker += (frames[-1] != frames[-2]).any()
    larger = np.maximum(frames[-1], frames[-2])
    expected = np.einsum('ih,jw,hwc->ijc', rows, columns, larger, optimize=True)
    np.testing.assert_allclose(obs['image'], expected, atol=1.01)
  assert total > 0 and flicker > 50


def test_all_actions():
  assert wrappers.Atari('pong').action_space.n == 6
  assert wrappers.Atari('pong', all_actions=True).action_space.n == 18


def play(seed, steps=100):
  env = wrappers.Atari('breakout', noops=0, seed=seed)
  rng = np.random.default_rng(0)
  images = [env.reset()['image']]
  for _ in range(steps):
    obs, _, done, _ = env.step(int(rng.integers(env.action_space.n)))
    images.append(env.reset()['image'] if done else obs['image'])
  return np.stack(images)


def test_same_seed_same_frames():
  assert (play(3) == play(3)).all()
  assert (play(3) != play(4)).any()


def test_sticky_actions_repeat_a_quarter():
  """Beside an emulator without them, from the same state, frame by frame."""
  env = wrappers.Atari('boxing', action_repeat=1, noops=0, seed=0)
  env.reset()
  plain = emulator('boxing')
  codes = plain.getMinimalActionSet()
  stuck = count = 0
  for index in range(600):
    for _ in range(6 + index % 3):  # so that the last action is surely 0
      if env.step(0)[2]:
        env.reset()
    state = env._ale.cloneState()
    if env.step(17)[2]:
      env.reset()
      continue
    outcomes = []
    for action in (0, 17):
      plain.restoreState(state)
      plain.act(codes[action])
      outcomes.append((plain.getRAM() == env._ale.getRAM()).all())
    assert sum(outcomes) == 1
    stuck, count = stuck + outcomes[0], count + 1
  assert count > 500 and abs(stuck / count - 0.25) < 0.06


def test_noops_at_the_start_of_a_game():
  env = wrappers.Atari('pong', seed=0)
  counts = []
  for _ in range(200):
    env.reset()
    counts.append(env._ale.getEpisodeFrameNumber())
  assert set(counts) == set(range(1, 31))
  env = wrappers.Atari('pong', noops=0, seed=0)
  env.reset()
  assert env._ale.getEpisodeFrameNumber() == 0


def episodes(env, count, limit=4000):
  """Lives at the start of each episode, and (length, lives, discount)."""
  rng = np.random.default_rng(0)
  starts, ends = [], []
  for _ in range(count):
    env.reset()
    starts.append(env._ale.lives())
    for step in range(limit):
      _, _, done, info = env.step(int(rng.integers(env.action_space.n)))
      if done:
        ends.append((step + 1, info['lives'], float(info['discount'])))
        break
  return starts, ends


def test_a_lost_life_ends_training_episodes_and_the_game_goes_on():
  env = wrappers.Atari('breakout', life_done=True, seed=0)
  starts, ends = episodes(env, 7)
  assert starts == [5, 4, 3, 2, 1, 5, 4]
  assert [end[1] for end in ends] == [4, 3, 2, 1, 0, 4, 3]
  assert {end[2] for end in ends} == {0.0}


def test_evaluation_plays_whole_games():
  train = suites.make_task('atari_breakout', 4, 108_000, 0)
  starts, ends = episodes(OneHot(train), 2)
  assert starts == [5, 4]
  test = suites.make_task('atari_breakout', 4, 108_000, 0, test=True)
  starts, ends = episodes(OneHot(test), 2)
  assert starts == [5, 5]
  assert [end[1:] for end in ends] == [(0, 0.0), (0, 0.0)]


def innermost(env):
  while isinstance(env, wrappers.Wrapper):
    env = env._env
  return env


class OneHot(wrappers.Wrapper):
  """Numbers for a task that takes one-hot vectors."""

  action_space = property(lambda self: gym.spaces.Discrete(4))
  _ale = property(lambda self: innermost(self._env)._ale)

  def step(self, action):
    return self._env.step(np.eye(4, dtype=np.float32)[action])


@pytest.mark.parametrize(
  'task', ['atari_breakout', 'gym_CartPole-v1', 'toy_reach', 'toy_catch']
)
def test_episodes_can_be_run_again_by_number(task):
  make = functools.partial(suites.make_task, task, 1, 40, 3, True)

  def episode(env, number=None):
    rng, rows = np.random.default_rng(0), []
    rows, done = [env.reset(number)], False
    while not done:
      size = env.action_space.shape[0]
      action = np.eye(size, dtype=np.float32)[rng.integers(size)]
      obs, _, done, _ = env.step(action)
      rows.append(obs)
    return [np.concatenate([o[k].ravel() for k in sorted(o)]) for o in rows]

  env = make()
  first, second, third = (episode(env) for _ in range(3))
  for expected, number in ((third, 2), (second, 1), (first, 0), (third, 2)):
    again = episode(env if number else make(), number)
    np.testing.assert_array_equal(np.array(again), np.array(expected))
  assert len(third) != len(second) or not np.array_equal(third, second)


def test_the_time_limit_begins_a_new_game_with_discount_1():
  env = suites.make_task('atari_pong', 4, 400, 0)
  action = np.eye(6, dtype=np.float32)[0]
  for _ in range(2):
    env.reset()
    for step in range(100):
      _, _, done, info = env.step(action)
      assert done == (step == 99) and info['discount'] == 1
  env.reset()
  frames = innermost(env)._ale.getEpisodeFrameNumber()
  assert frames <= 30


def test_atari_in_a_worker_and_an_unknown_game():
  make = functools.partial(suites.make_task, 'atari_pong', 4, 400, 0)
  env = wrappers.Async(make)
  try:
    assert env.action_space.shape == (6,) and env.action_space.discrete
    assert env.reset()['image'].any()
  finally:
    env.close()
  with pytest.raises(TaskError, match='atari_pong'):
    suites.check_task('atari_pnog')
  with pytest.raises(TaskError, match='atari_space_invaders'):
    wrappers.Atari('space_invader')


# ---------------------------------------------------------------------------
# Gym
# ---------------------------------------------------------------------------


class Plain(gym.Env):
  """Five values; the image is the observation, with the step in its pixels."""

  observation_space = gym.spaces.Box(0, 255, (32, 48, 3), np.uint8)
  action_space = gym.spaces.Discrete(3)
  terminate = 5

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.count, self.start = 0, int(self.np_random.integers(100))
    return self.image(), {}

  def step(self, action):
    self.count += 1
    self.action = action
    ended = self.count == self.terminate
    return self.image(), 0.5, ended, False, {}

  def image(self):
    return np.full((32, 48, 3), self.start + self.count, np.uint8)


class Truncating(Plain):
  def step(self, action):
    obs, reward, ended, _, info = super().step(action)
    return obs, reward, False, ended, info


class Old(Plain):
  """The interface before 0.26: four values, `seed`, `render(mode)`."""

  observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
  action_space = gym.spaces.Box(-2, 2, (2, 1), np.float64)

  def __init__(self):
    self.seeded = None

  def seed(self, seed=None):
    self.seeded = seed

  def reset(self):
    super().reset(seed=self.seeded)
    self.seeded = None
    return np.zeros(2, np.float32)

  def step(self, action):
    assert action.shape == (2, 1) and action.dtype == np.float64
    obs, reward, ended, _, info = super().step(action)
    return np.zeros(2, np.float32), reward, ended, info

  def render(self, mode='human'):
    return self.image() if mode == 'rgb_array' else None


class OldTruncating(Old):
  def step(self, action):
    *rest, _ = super().step(action)
    return *rest, {'TimeLimit.truncated': rest[2]}


class Dictionary(Plain):
  """A gray image within a dictionary."""

  observation_space = gym.spaces.Dict(
    {
      'image': gym.spaces.Box(0, 255, (16, 16), np.uint8),
      'speed': gym.spaces.Box(-1, 1, (3,), np.float32),
    }
  )

  def image(self):
    gray = super().image()[:16, :16, 0]
    return {'image': gray, 'speed': np.zeros(3, np.float32)}


class Blind(Plain):
  observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

  def image(self):
    return np.zeros(2, np.float32)


class TupleActions(Plain):
  action_space = gym.spaces.Tuple([gym.spaces.Discrete(2)])


for kind in (
  *(Plain, Truncating, Old, OldTruncating),
  *(Dictionary, Blind, TupleActions),
):
  gym.register(f'{kind.__name__}-v0', kind)
gym.register('Limited-v0', Plain, max_episode_steps=3)


def roll(env, action):
  """Images (one pixel each), rewards, and the end of an episode."""
  pixels, rewards = [env.reset()['image'][0, 0, 0]], []
  while True:
    obs, reward, done, info = env.step(action)
    assert obs['image'].shape == (64, 64, 3)
    pixels.append(obs['image'][0, 0, 0])
    rewards.append(reward)
    if done:
      return pixels, rewards, float(info['discount'])


@pytest.mark.parametrize(
  'name, steps, discount',
  [
    ('Plain-v0', 5, 0),
    ('Truncating-v0', 5, 1),
    ('Limited-v0', 3, 1),
    ('Old-v0', 5, 0),
    ('OldTruncating-v0', 5, 1),
    ('Dictionary-v0', 5, 0),
  ],
)
def test_gym_episodes(name, steps, discount):
  env = suites.make_task(f'gym_{name}', 1, 1000, seed=7)
  action = np.eye(3)[1] if hasattr(env.action_space, 'discrete') else [0.5, -1]
  pixels, rewards, last = roll(env, np.asarray(action, np.float32))
  assert rewards == [0.5] * steps and last == discount
  np.testing.assert_array_equal(np.diff(pixels), 1)
  again = suites.make_task(f'gym_{name}', 1, 1000, seed=7)
  firsts = [again.reset()['image'][0, 0, 0] for _ in range(8)]
  assert firsts[0] == pixels[0] and len(set(firsts)) > 3
  env.close()


def test_gym_action_repeat_and_discrete_actions():
  env = suites.make_task('gym_Plain-v0', 2, 1000, seed=0)
  env.reset()
  assert [env.step(np.eye(3)[2])[1:3] for _ in range(3)] == [
    (1.0, False),
    (1.0, False),
    (0.5, True),
  ]


def test_gym_continuous_actions_are_scaled():
  env = suites.make_task('gym_Old-v0', 1, 1000, seed=0)
  assert env.action_space.shape == (2,)
  env.reset()
  env.step(np.array([1.0, -0.5], np.float32))
  inner = innermost(env)._env
  np.testing.assert_allclose(inner.action, [[2.0], [-1.0]])


@pytest.mark.parametrize(
  'name, words',
  [
    ('Blind-v0', 'has no images'),
    ('TupleActions-v0', 'Discrete, MultiDiscrete'),
    ('Pluin-v0', 'Plain-v0'),
    ('no_such_module:Plain-v0', 'no_such_module'),
  ],
)
def test_gym_that_cannot_be_used(name, words):
  with pytest.raises(TaskError, match=words):
    suites.make_task(f'gym_{name}')


@pytest.mark.parametrize(
  'name, actions', [('CartPole-v1', 2), ('ale_py:ALE/Freeway-v5', 3)]
)
def test_real_gym_environments_in_a_worker(name, actions):
  make = functools.partial(suites.make_task, f'gym_{name}', 1, 1000, 0)
  env = wrappers.Async(make)
  try:
    assert env.action_space.shape == (actions,)
    first = env.reset()['image']
    for _ in range(5):
      obs, _, _, _ = env.step(np.eye(actions, dtype=np.float32)[1])
    assert first.std() > 5 and (obs['image'] != first).any()
  finally:
    env.close()


def test_a_users_own_module_in_a_worker(tmp_path, monkeypatch):
  (tmp_path / 'my_envs.py').write_text(
    textwrap.dedent("""
      import gym
      import numpy as np

      class Mine(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        action_space = gym.spaces.Discrete(2)

        def reset(self, seed=None, options=None):
          return np.full((64, 64, 3), 9, np.uint8), {}

        def step(self, action):
          return np.full((64, 64, 3), action, np.uint8), 1.0, True, False, {}

      gym.register('Mine-v3', Mine)
    """)
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  make = functools.partial(suites.make_task, 'gym_my_envs:Mine-v3', 1, 10, 0)
  env = wrappers.Async(make)
  try:
    assert (env.reset()['image'] == 9).all()
    obs, reward, done, info = env.step(np.array([0, 1], np.float32))
    assert (obs['image'] == 1).all() and (reward, done) == (1.0, True)
    assert info['discount'] == 0
  finally:
    env.close()


# ---------------------------------------------------------------------------
# DeepMind Lab
# ---------------------------------------------------------------------------

STAND_IN = """
import numpy as np

made = []

class Lab:
  def __init__(self, level, observations, config={}, renderer='software'):
    assert observations == ['RGB_INTERLEAVED']
    assert all(isinstance(v, str) for v in config.values())
    self.level, self.config, self.calls = level, config, []
    made.append(self)

  def reset(self, episode=-1, seed=None):
    self.calls.append(('reset', int(seed)))
    self.frame = 0

  def is_running(self):
    return self.frame < 40

  def observations(self):
    if not self.is_running():
      raise RuntimeError('Environment in wrong status for call')
    shape = int(self.config['height']), int(self.config['width']), 3
    return {'RGB_INTERLEAVED': np.full(shape, self.frame, np.uint8)}

  def step(self, action, num_steps=1):
    assert action.dtype == np.intc and action.shape == (7,)
    self.calls.append((action.tolist(), num_steps))
    self.frame += num_steps
    return 10.0 if self.frame == 8 else 0.0

  def close(self):
    self.calls.append('close')
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
  (tmp_path / 'deepmind_lab.py').write_text(STAND_IN)
  monkeypatch.syspath_prepend(str(tmp_path))
  import deepmind_lab

  yield deepmind_lab
  del sys.modules['deepmind_lab']


def test_lab_without_its_package_names_the_project():
  with pytest.raises(TaskError, match='google-deepmind/lab'):
    suites.make_task('dmlab_collect')


def test_lab_adapter(lab):
  env = suites.make_task('dmlab_collect', 4, 108_000, seed=1)
  inner = lab.made[0]
  assert inner.level == 'contributed/dmlab30/rooms_collect_good_objects_train'
  assert 'allowHoldOutLevels' not in inner.config
  assert env.action_space.shape == (9,) and env.action_space.discrete
  obs = env.reset()
  assert obs['image'].shape == (64, 64, 3) and (obs['image'] == 0).all()
  rewards = []
  for index in range(10):
    obs, reward, done, info = env.step(np.eye(9, dtype=np.float32)[index % 9])
    rewards.append(reward)
    assert done == (index == 9) and info['discount'] == 1 - done
  assert (obs['image'] == 36).all()  # the last that there was
  assert rewards == [0, 10] + [0] * 8
  assert inner.calls[1] == ([0, 0, 0, 1, 0, 0, 0], 4)
  assert inner.calls[9] == ([0, 0, 0, 0, 1, 0, 0], 4)
  env.reset()
  seeds = [call[1] for call in inner.calls if call[0] == 'reset']
  assert len(set(seeds)) == 2
  other = suites.make_task('dmlab_collect', 4, 108_000, seed=1)
  other.reset()
  assert lab.made[1].calls[0] == inner.calls[0]
  env.close()
  assert inner.calls[-1] == 'close'


def test_lab_levels(lab):
  suites.make_task('dmlab_collect', 4, 1000, 0, test=True)
  config = lab.made[-1].config
  assert config['allowHoldOutLevels'] == 'true'
  assert config['mixerSeed'] == str(0x600D5EED)
  assert lab.made[-1].level.endswith('rooms_collect_good_objects_test')
  assert lab_env.lab_level('rooms_watermaze') == (
    'contributed/dmlab30/rooms_watermaze'
  )
  assert lab_env.lab_level('lt_chasm') == 'lt_chasm'
  assert len(set(lab_env._LAB30)) == 30 + 2  # with the two held-out levels


def test_resizing_keeps_the_mean():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (210, 160, 3), dtype=np.uint8)
  small = spaces.resize(image, (64, 64))
  assert isinstance(small, np.ndarray) and small.shape == (64, 64, 3)
  assert abs(small.mean() - image.mean()) < 0.5
  gray = spaces.resize(image[..., :1], (64, 64))
  assert (gray[..., 0] == gray[..., 2]).all()
  assert PIL.Image.fromarray(gray).size == (64, 64)


def test_resizing_to_height_and_width():
  image = np.zeros((40, 40, 3), np.uint8)
  image[20:] = 255
  tall = spaces.resize(image, (20, 10))
  assert tall.shape == (20, 10, 3)
  assert (tall[:9] == 0).all() and (tall[11:] == 255).all()


@pytest.mark.parametrize('task', ['atari_pong', 'toy_reach'])
def test_an_observation_to_record_that_is_not_there(task):
  with pytest.raises(TaskError, match=f'--record rewrad: {task} .*; it has'):
    suites.make_task(task, inputs='image', record='rewrad')
