"""Tests of the environments, their wrappers and their worker processes.

Everything here is real: processes, simulator and rendering. Tasks that render
do so in worker processes, for TensorFlow may live in the process of the tests.
"""

import functools
import os
import pickle
import sys
import time
import types

import numpy as np
import pytest

import dmc_env
import gym_env
import suites
import toys
import workers
import wrappers
from processes import run_script
from spaces import gym
from worker_calls import RenderError, TaskError, WorkerError
from worlds import NO_EGL, Counting, in_worker, render_pendulum, rollout, same

ROOT = os.path.dirname(os.path.abspath(wrappers.__file__))

# Strategies with workers in other processes, and what they call a death. Ray
# starts at the first use and serves all tests of this process.
KILLED = {'process': 'was killed by signal SIGKILL', 'ray': 'died: '}
remote = pytest.mark.parametrize('strategy', KILLED)

# Table of Appendix G.
PAPER_TASKS = [
  'dmc_acrobot_swingup',
  'dmc_cartpole_balance',
  'dmc_cartpole_balance_sparse',
  'dmc_cartpole_swingup',
  'dmc_cartpole_swingup_sparse',
  'dmc_cheetah_run',
  'dmc_cup_catch',
  'dmc_finger_spin',
  'dmc_finger_turn_easy',
  'dmc_finger_turn_hard',
  'dmc_hopper_hop',
  'dmc_hopper_stand',
  'dmc_pendulum_swingup',
  'dmc_quadruped_run',
  'dmc_quadruped_walk',
  'dmc_reacher_easy',
  'dmc_reacher_hard',
  'dmc_walker_run',
  'dmc_walker_stand',
  'dmc_walker_walk',
]


# ---------------------------------------------------------------------------
# Environments for the tests; module-level, so that they pickle
# ---------------------------------------------------------------------------


class Painting(Counting):
  """Writes each image over the last."""

  canvas = None

  def _observe(self):
    obs = super()._observe()
    self.canvas = obs['image'] if self.canvas is None else self.canvas
    self.canvas[:] = obs['image']
    return {**obs, 'image': self.canvas}


# ---------------------------------------------------------------------------
# Control suite
# ---------------------------------------------------------------------------


def measure_task(task):
  """Plays a task in different ways with the same actions; runs in a worker."""
  # Away from the bounds, which the simulator would enforce on its own.
  actions = np.random.RandomState(0).uniform(-0.9, 0.9, (4, 100))
  make = functools.partial(suites.make_task, task, 2, 8)
  env = make(seed=3)
  space = env.action_space
  actions = actions[:, : space.shape[0]].astype(np.float32)
  plain = wrappers.DeepMindControl(task.removeprefix('dmc_'), seed=3)
  raw = wrappers.EpisodeSeeds(plain, 3)
  low, high = raw.action_space.low, raw.action_space.high
  scaled = low + (actions.astype(np.float64) + 1) * (high - low) / 2
  return {
    'action_space': space,
    'observation_space': env.observation_space,
    'raw_bounds': (low, high),
    'spec': plain._env.action_spec(),
    'raw': rollout(raw, np.repeat(scaled, 2, 0)),
    'rows': rollout(env, actions),
    'again': rollout(make(seed=3), actions),
    'other': rollout(make(seed=4), actions),
    'third': third_episode(make(seed=3), actions),
    'numbered': third_episode(make(seed=3), actions, number=True),
  }


def third_episode(env, actions, number=False):
  """After two others, or at once by its number."""
  for _ in range(0 if number else 2):
    env.reset()
    env.step(actions[0])
  return rollout(env, actions, 2 if number else None)


@pytest.fixture(scope='module', params=PAPER_TASKS)
def played(request):
  return in_worker(measure_task, request.param)


class TestControlSuite:
  def test_spaces(self, played):
    space = played['action_space']
    assert (space.low == -1).all() and (space.high == 1).all()
    assert space.dtype == np.float32 and not hasattr(space, 'discrete')
    low, high = played['raw_bounds']
    np.testing.assert_allclose(low, played['spec'].minimum)
    np.testing.assert_allclose(high, played['spec'].maximum)
    image = played['observation_space']['image']
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8

  def test_observations_fit_their_space(self, played):
    space = played['observation_space']
    assert set(space) > {'image', 'reward'}
    for obs, reward, _, _ in played['rows']:
      assert set(obs) == set(space)
      for key, value in obs.items():
        assert isinstance(value, np.ndarray), key
        assert value.shape == space[key].shape, key
        assert value.dtype == space[key].dtype, key
        assert space[key].contains(value), key
        assert key == 'image' or value.dtype == np.float32
      assert obs['reward'] == np.float32(reward)
      assert obs['image'].std() > 5

  def test_episodes_can_be_run_again_by_number(self, played):
    assert same(played['third'], played['numbered'])
    assert not same(played['third'], played['rows'])

  def test_seed(self, played):
    assert same(played['rows'], played['again'])
    pairs = zip(played['rows'], played['other'], strict=True)
    assert all((x[0]['image'] != y[0]['image']).any() for x, y in pairs)

  def test_repeat_and_scaling(self, played):
    # The same actions, scaled by hand and each given twice.
    raw, rows = played['raw'], played['rows']
    for step in range(len(rows)):
      obs, expected = rows[step][0], raw[2 * step][0]
      for key in expected:
        if key == 'image':
          difference = np.abs(obs[key].astype(int) - expected[key])
          assert difference.mean() < 0.1
        else:
          np.testing.assert_allclose(obs[key], expected[key], 1e-3, 1e-4)
    for step in range(1, len(rows)):
      expected = raw[2 * step - 1][1] + raw[2 * step][1]
      assert rows[step][1] == pytest.approx(expected, abs=1e-4)

  def test_time_limit_keeps_the_discount(self, played):
    # 8 environment steps are 4 agent steps.
    assert [row[2] for row in played['rows']] == [False] * 4 + [True]
    assert [row[3]['discount'] for row in played['rows'][1:]] == [1] * 4
    assert not any(row[2] for row in played['raw'])


def suite_names():
  from dm_control import suite

  return set(suite.ALL_TASKS)


def load_tasks(names):
  return {name: suites.make_task(name).reset()['image'] for name in names}


def test_task_names_are_those_of_the_suite():
  assert set(dmc_env.DMC_TASKS.values()) == in_worker(suite_names)
  names = suites.task_names()
  assert len(names) == len(set(names)) == 51 + 1 + 3 + 104
  assert set(PAPER_TASKS) < set(names)


def test_domains_of_many_words():
  names = ['ball_in_cup_catch', 'point_mass_easy', 'humanoid_CMU_stand']
  names = [f'dmc_{name}' for name in [*names, 'lqr_lqr_2_1', 'cup_catch']]
  images = in_worker(load_tasks, names)
  assert all(images[name].shape == (64, 64, 3) for name in names)


def unbounded():
  env = suites.make_task('dmc_lqr_lqr_2_1', seed=0)
  return env.action_space, rollout(env, np.full((5, 1), 0.5, np.float32))


def test_actions_without_bounds_are_not_scaled():
  space, rows = in_worker(unbounded)
  assert (space.low == -1).all() and (space.high == 1).all()
  assert all(np.abs(obs['position']).max() < 10 for obs, _, _, _ in rows)


def models_of_lqr():
  envs = [suites.make_task('dmc_lqr_lqr_2_1', seed=n) for n in (1, 2, 2)]
  starts = [env.reset()['position'].tolist() for env in envs]
  physics = [innermost(env).physics for env in envs]
  return starts, [x.model.jnt_stiffness.tolist() for x in physics]


def innermost(env):
  while hasattr(env, '_env'):
    env = env._env
  return env


def test_seeds_give_other_starts_in_one_world():
  """The suite draws a model of its own for each seed of this task."""
  starts, models = in_worker(models_of_lqr)
  assert models[0] == models[1] == models[2]
  assert starts[0] != starts[1] == starts[2]


def test_task_that_draws_at_a_reset_without_images():
  """Its height field is in the simulation, drawn or not."""
  done = run_script("""
    import numpy as np
    import suites
    env = suites.make_task('dmc_quadruped_escape', inputs='state', seed=3)
    obs = env.reset()
    print(obs['origin'].shape, env.step(np.zeros(12, np.float32))[1] >= 0)
  """)
  assert (done.returncode, done.stderr) == (0, ''), done.stderr
  assert done.stdout == '(3,) True\n'


def whole_episode():
  env = suites.make_task('dmc_pendulum_swingup', 20, 1000, seed=0)
  env.reset()
  rows = [env.step(np.zeros(1, np.float32))]
  while not rows[-1][2]:
    rows.append(env.step(np.zeros(1, np.float32)))
  return len(rows), rows[-1][3]['discount']


def test_whole_episode_of_the_suite():
  assert in_worker(whole_episode) == (50, 1)


def test_camera_and_size():
  assert in_worker(cameras) == [(32, 48, 3), True, False]


def cameras():
  # Camera 2 is the default of the quadruped alone.
  make = functools.partial(wrappers.DeepMindControl, 'quadruped_walk', seed=0)
  images = [make(cameras=c).reset()['image'] for c in (None, [2], [0])]
  small = make(size=(32, 48)).reset()['image']
  return [
    small.shape,
    bool((images[0] == images[1]).all()),
    bool((images[0] == images[2]).all()),
  ]


def test_bad_actions():
  env = wrappers.Async(
    functools.partial(suites.make_task, 'dmc_pendulum_swingup')
  )
  env.reset()
  for action in ([np.nan], [np.inf]):
    with pytest.raises(WorkerError, match='not finite'):
      env.step(np.array(action, np.float32))
  with pytest.raises(WorkerError, match='shape'):
    env.step(np.zeros(2, np.float32))
  # The environment itself is none the worse for it.
  assert env.step(np.zeros(1, np.float32))[0]['image'].shape == (64, 64, 3)
  env.close()


# ---------------------------------------------------------------------------
# OpenGL
# ---------------------------------------------------------------------------


class TestOpenGL:
  @pytest.fixture(autouse=True)
  def unset(self, monkeypatch):
    monkeypatch.delenv('MUJOCO_GL', raising=False)
    monkeypatch.delenv('PYOPENGL_PLATFORM', raising=False)

  @remote
  def test_egl_comes_first(self, strategy):
    contrast, chosen = render_pendulum(strategy)
    assert contrast > 5 and chosen == 'egl'

  @remote
  def test_the_choice_of_the_user_is_kept(self, monkeypatch, strategy):
    monkeypatch.setenv('MUJOCO_GL', 'osmesa')
    contrast, chosen = render_pendulum(strategy)
    assert contrast > 5 and chosen == 'osmesa'

  def test_without_egl_osmesa_is_used(self, monkeypatch):
    monkeypatch.setenv(*NO_EGL)
    contrast, chosen = render_pendulum()
    assert contrast > 5 and chosen == 'osmesa'

  def test_nothing_works(self, monkeypatch, capfd):
    monkeypatch.setenv(*NO_EGL)
    # dm_control refuses OSMesa where PyOpenGL was told to use EGL.
    monkeypatch.setenv('PYOPENGL_PLATFORM', 'egl')
    self.assert_render_error('osmesa', capfd)

  @pytest.mark.parametrize('value', ['garbage', 'off'])
  def test_bad_choice_of_the_user(self, monkeypatch, capfd, value):
    monkeypatch.setenv('MUJOCO_GL', value)
    self.assert_render_error(value, capfd)

  def test_broken_choice_of_the_user(self, monkeypatch, capfd):
    monkeypatch.setenv('MUJOCO_GL', 'egl')
    monkeypatch.setenv(*NO_EGL)
    self.assert_render_error('egl', capfd)

  def assert_render_error(self, value, capfd):
    with pytest.raises(RenderError) as caught:
      render_pendulum()
    message = str(caught.value)
    for part in ('libegl1', 'libgl1-mesa-dri', 'libosmesa6', 'MUJOCO_GL'):
      assert part in message
    assert f'MUJOCO_GL is {value}' in message
    assert 'Traceback' not in message
    assert 'Traceback' in caught.value.traceback
    assert capfd.readouterr() == ('', '')


# ---------------------------------------------------------------------------
# Task names and strategies
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  'wrong, near',
  [
    ('dmc_walker_wlak', 'dmc_walker_walk'),
    ('walker_walk', 'dmc_walker_walk'),
    ('dmc_cartpole_balence', 'dmc_cartpole_balance'),
    ('dmc_Humanoid_cmu_run', 'dmc_humanoid_CMU_run'),
    ('toy_reech', 'toy_reach'),
    ('catch', 'toy_catch'),
    ('atari_pnog', 'atari_pong'),
    ('dmlab_maze', 'google-deepmind/lab'),
    ('dmlab_', 'dmlab_<level>'),
    ('???', 'dmc_<domain>_<task>'),
    ('', 'dmc_<domain>_<task>'),
  ],
)
def test_wrong_task(wrong, near):
  for function in (suites.check_task, suites.make_task):
    with pytest.raises(TaskError) as caught:
      function(wrong)
    assert repr(wrong) in str(caught.value) and near in str(caught.value)


@pytest.mark.parametrize(
  'task',
  [
    *PAPER_TASKS,
    *('toy_reach', 'toy_catch', 'toy_robot', 'atari_pong', 'gym_Any-v0'),
    'custom_mine',
  ],
)
def test_right_task(task):
  suites.check_task(task)


def test_rendering_is_refused_beside_tensorflow(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', types.ModuleType('tensorflow'))
  suites.check_parallel('dmc_walker_walk', 'process')
  suites.check_parallel('dmc_walker_walk', 'ray')
  suites.check_parallel('toy_reach', 'none')
  for strategy in ('thread', 'none'):
    with pytest.raises(TaskError, match='--parallel process'):
      suites.check_parallel('dmc_walker_walk', strategy)
  with pytest.raises(TaskError, match='--parallel process'):
    suites.make_task('dmc_walker_walk')
  monkeypatch.delitem(sys.modules, 'tensorflow')
  suites.check_parallel('dmc_walker_walk', 'none')


def test_a_task_without_images_leaves_rendering_to_later_workers():
  done = run_script("""
    import os
    import suites
    os.environ.pop('MUJOCO_GL', None)
    suites.make_task('dmc_cartpole_balance', inputs='state').reset()
    print(os.environ.get('MUJOCO_GL'))
  """)
  assert (done.returncode, done.stdout) == (0, 'None\n')


def test_importing_is_quiet_and_light():
  done = run_script("""
    import sys
    import wrappers
    heavy = {'tensorflow', 'keras', 'dm_control', 'mujoco', 'OpenGL'}
    print(sorted(heavy & set(sys.modules)))
  """)
  assert (done.returncode, done.stdout, done.stderr) == (0, '[]\n', '')


# ---------------------------------------------------------------------------
# Toy tasks
# ---------------------------------------------------------------------------


def reach_returns(policy, episodes=100):
  env = suites.make_task('toy_reach', 1, 1000, seed=0)
  returns = []
  for _ in range(episodes):
    env.reset()
    rewards, done = [], False
    while not done:
      _, reward, done, info = env.step(policy(env.state))
      rewards.append(reward)
      assert info['discount'] == 1
    assert len(rewards) == 50
    assert min(rewards) >= 0 and max(rewards) <= 1
    returns.append(sum(rewards))
  return returns


def reach_best(state):
  way = (state[2:] - state[:2]) / toys.ToyReach.SPEED
  return np.clip(way, -1, 1).astype(np.float32)


class TestToyReach:
  def test_random_earns_little_of_the_best(self):
    rng = np.random.RandomState(0)
    random = reach_returns(lambda state: rng.uniform(-1, 1, 2))
    constant = [
      np.mean(reach_returns(lambda state, a=action: np.array(a)))
      for action in [(0, 0), (1, 0), (0, -1), (1, 1), (-1, 1)]
    ]
    best = reach_returns(reach_best)
    print(f'random {np.mean(random):.1f}, best {np.mean(best):.1f} of 50')
    assert np.mean(random) < 0.4 * np.mean(best)
    assert max(constant) < 0.4 * np.mean(best)
    assert 40 < np.mean(best) < 50

  def test_best_arrives_within_a_third_of_the_episode(self):
    env = toys.ToyReach(seed=0)
    steps = []
    for _ in range(50):
      env.reset()
      taken = 0
      while np.abs(env.state[2:] - env.state[:2]).max() > 1e-6:
        reward = env.step(reach_best(env.state))[1]
        taken += 1
      assert reward == pytest.approx(1)
      steps.append(taken)
    assert 5 <= np.mean(steps) <= 9 and max(steps) <= 9

  def test_reward_grows_as_the_dot_nears(self):
    env = toys.ToyReach(seed=1)
    env.reset()
    rewards = [env.step(reach_best(env.state))[1] for _ in range(5)]
    assert (np.diff(rewards) > 0).all()

  def test_image_shows_dot_and_target(self):
    env = toys.ToyReach(seed=0)
    for _ in range(20):
      image = env.reset()['image'].astype(int)
      assert env.observation_space['image'].contains(image.astype(np.uint8))
      for channel, place in ((1, env.state[:2]), (0, env.state[2:])):
        rows, columns = np.nonzero(image[..., channel] > 200)
        assert len(rows) > 40
        center = (columns.mean() - 31.5, rows.mean() - 31.5)
        # The dot may cover a part of the target.
        assert np.allclose(center, 24 * place, atol=0.6 if channel else 3)

  def test_actions_are_limited(self):
    env = toys.ToyReach(seed=0)
    env.reset()
    before = env.state[:2]
    env.step(np.array([100.0, -100.0]))
    moved = np.abs(env.state[:2] - before)
    assert (moved <= toys.ToyReach.SPEED + 1e-9).all()
    with pytest.raises(ValueError, match='not finite'):
      env.step(np.array([np.nan, 0]))
    with pytest.raises(ValueError, match='shape'):
      env.step(np.zeros(3))


def catch_episode(env, policy):
  env.reset()
  rows = [env.step(np.eye(3)[policy(env.state)])]
  while not rows[-1][2]:
    rows.append(env.step(np.eye(3)[policy(env.state)]))
  return rows


class TestToyCatch:
  def test_episodes(self):
    env = suites.make_task('toy_catch', 1, 1000, seed=0)
    rng = np.random.RandomState(0)
    best, random = [], []
    for _ in range(100):
      rows = catch_episode(env, lambda s: 1 + int(np.sign(s[0] - s[1])))
      best.append(rows[-1][1])
      rows = catch_episode(env, lambda s: rng.randint(3))
      random.append(rows[-1][1])
      assert len(rows) == toys.ToyCatch.LENGTH
      assert all(row[1] == 0 for row in rows[:-1])
      discounts = [row[3]['discount'] for row in rows]
      assert discounts == [1] * (len(rows) - 1) + [0]
    assert set(best) == {1.0}
    assert set(random) == {-1.0, 1.0} and np.mean(random) < 0

  def test_time_limit_is_no_true_end(self):
    rows = catch_episode(
      suites.make_task('toy_catch', 1, 5, seed=0), lambda s: 1
    )
    assert len(rows) == 5 and rows[-1][3]['discount'] == 1

  def test_starts_differ(self):
    env = toys.ToyCatch(seed=0)
    states = np.array([(env.reset(), env.state)[1] for _ in range(200)])
    states = states[:, :2]  # not the step
    assert (states.min(0) < 12).all() and (states.max(0) > 52).all()
    assert abs(np.corrcoef(states.T)[0, 1]) < 0.2

  def test_image_shows_ball_and_paddle(self):
    env = toys.ToyCatch(seed=0)
    image = env.reset()['image']
    ball, paddle, _ = env.state
    assert image[..., 0].max(0).argmax() == pytest.approx(ball - 4, abs=1)
    assert np.nonzero(image[60, :, 1] == 255)[0].mean() + 0.5 == paddle
    tops = [image[..., 0].max(1).argmax()]
    tops += [env.step(1)[0]['image'][..., 0].max(1).argmax() for _ in range(9)]
    assert set(np.diff(tops)) <= {3, 4}
    with pytest.raises(ValueError, match='not 0, 1 or 2'):
      env.step(3)


@pytest.mark.parametrize('task', ['toy_reach', 'toy_catch'])
def test_toys_are_seeded(task):
  space = suites.make_task(task).action_space
  space.seed(0)
  actions = [space.sample() for _ in range(10)]
  make = functools.partial(suites.make_task, task, 1, 1000)
  first, again, other, fresh, fresh2 = (
    rollout(make(seed), actions) for seed in (3, 3, 4, None, None)
  )
  assert same(first, again)
  assert not same(first, other)
  assert not same(fresh, fresh2)


def test_the_first_episode_can_be_run_again_after_others():
  env = suites.make_task('toy_reach', seed=0, inputs='state')
  first, *others = (env.reset(number=n)['state'] for n in (0, 3, 4))
  assert all((first != other).any() for other in others)
  np.testing.assert_array_equal(env.reset(number=0)['state'], first)


@pytest.mark.parametrize('task', ['toy_reach', 'toy_catch'])
def test_toys_with_repeat(task):
  env = suites.make_task(task, 2, 1000, seed=0)
  plain = suites.make_task(task, 1, 1000, seed=0)
  length = {'toy_reach': 50, 'toy_catch': 16}[task]
  action = np.eye(3, dtype=np.float32)[0] if task == 'toy_catch' else [0.3, 0.4]
  rows = rollout(env, [action] * (length // 2))
  singles = rollout(plain, [action] * length)
  assert rows[-1][2] and not rows[-2][2]
  for step in range(1, len(rows)):
    expected = singles[2 * step - 1][1] + singles[2 * step][1]
    assert rows[step][1] == pytest.approx(expected)
    assert (rows[step][0]['image'] == singles[2 * step][0]['image']).all()


class TestRobot:
  """By the wall clock, of a machine that may be busy."""

  def test_acts_one_tick_late(self):
    robot, reach = toys.ToyRobot(3), toys.ToyReach(3)
    actions = np.random.default_rng(0).uniform(-1, 1, [6, 2])
    robot.reset()
    reach.reset()
    held = np.zeros(2)
    for action in actions:
      _, reward, _, info = robot.step(action)
      for _ in range(1 + info['missed']):
        expected = reach.step(held)[1]
      assert reward == expected
      assert (robot.state == reach.state).all()
      held = action

  def test_counts_ticks_without_a_new_action(self):
    robot, pause = toys.ToyRobot(0), 0.12
    robot.reset()
    start, ticks = time.monotonic(), 0
    for late in (False, True, True, False):
      time.sleep(late * pause)
      *_, info = robot.step(np.ones(2))
      ticks += 1 + info['missed']
      passed = (time.monotonic() - start) / robot.PERIOD
      assert ticks - 0.1 < passed  # it waits for the end of the tick
      # Deadlines are kept from the start, not from call to call.
      assert info['missed'] >= (2 if late else 0)
    slack = 1.5  # ticks, if this process slept too long at the last
    assert ticks > passed - slack

  def test_repeated_actions_add_up_what_was_missed(self):
    env = suites.make_task('toy_robot', 2, 50, seed=0)
    env.reset()
    time.sleep(0.12)
    assert env.step(np.zeros(2, np.float32))[3]['missed'] >= 2

  def test_of_gym(self):
    class Robot(gym.Env):
      observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
      action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

      def reset(self, seed=None):
        return np.zeros(2, np.float32), {}

      def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {'missed': 3}

    env = gym_env.GymEnv('robot', inputs='state', function=Robot)
    env.reset()
    assert env.step(np.zeros(1, np.float32))[3]['missed'] == 3


# ---------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------


class TestWrappers:
  def test_repeat_sums_and_stops(self):
    env = wrappers.ActionRepeat(Counting(length=5), 3)
    env.reset()
    obs, reward, done, info = env.step(np.zeros(2))
    assert (obs['count'], reward, done) == (3, 0.5 + 1 + 1.5, False)
    assert 'discount' not in info
    obs, reward, done, _ = env.step(np.zeros(2))
    assert (obs['count'], reward, done) == (5, 2 + 2.5, True)
    with pytest.raises(ValueError, match='action repeat'):
      wrappers.ActionRepeat(Counting(), 0)

  def test_repeat_multiplies_discounts(self):
    env = wrappers.ActionRepeat(Counting(info={'discount': 0.5}), 3)
    env.reset()
    assert env.step(np.zeros(2))[3]['discount'] == 0.125

  def test_time_limit(self):
    env = wrappers.TimeLimit(Counting(length=9), 4)
    with pytest.raises(RuntimeError, match='reset'):
      env.step(np.zeros(2))
    for _ in range(2):
      rows = rollout(env, [np.zeros(2)] * 4)
      assert [row[2] for row in rows] == [False] * 4 + [True]
      assert rows[-1][3]['discount'] == 1
      with pytest.raises(RuntimeError, match='reset'):
        env.step(np.zeros(2))
    with pytest.raises(ValueError, match='time limit'):
      wrappers.TimeLimit(Counting(), 0)

  @pytest.mark.parametrize('length, discount', [(4, 1.0), (9, 0.5)])
  def test_discount_of_the_environment_at_the_limit(self, length, discount):
    env = wrappers.TimeLimit(Counting(length, dict(discount=discount)), 4)
    rows = rollout(env, [np.zeros(2)] * 4)
    assert rows[-1][2] and rows[-1][3]['discount'] == discount

  @pytest.mark.parametrize('length', [3, 4])
  def test_true_end_before_or_at_the_limit(self, length):
    env = wrappers.TimeLimit(Counting(length, {'discount': 0.0}), 4)
    rows = rollout(env, [np.zeros(2)] * length)
    assert rows[-1][2] and rows[-1][3]['discount'] == 0
    env = wrappers.TimeLimit(Counting(length), 4)
    rows = rollout(env, [np.zeros(2)] * length)
    assert rows[-1][2] and rows[-1][3].get('discount', 0) == 0

  def test_normalize_actions(self):
    inner = Counting()
    inner.action_space = gym.spaces.Box(
      np.array([-2, 0, -np.inf, 1], np.float32),
      np.array([4, 10, np.inf, np.inf], np.float32),
    )
    env = wrappers.NormalizeActions(inner)
    assert env.action_space.low.tolist() == [-1] * 4
    assert env.action_space.high.tolist() == [1] * 4
    env.reset()
    for action in ([-1, 1, 1, -1], [0, 0, 0, 0], [0.5, -0.5, -3, 1]):
      env.step(np.array(action, np.float32))
    expected = [[-2, 10, 1, 1], [1, 5, 0, 2], [2.5, 2.5, -1, 3]]
    assert np.array(inner.actions).tolist() == expected

  def test_one_hot(self):
    env = wrappers.OneHotAction(toys.ToyCatch(seed=0))
    space = env.action_space
    assert space.discrete and space.shape == (3,)
    assert isinstance(space, gym.spaces.Box) and space.dtype == np.float32
    samples = np.array([space.sample() for _ in range(60)])
    assert (samples.sum(1) == 1).all() and (samples.sum(0) > 5).all()
    assert all(space.contains(sample) for sample in samples)
    env.reset()
    paddle = env.state[1]
    for index in range(3):
      env.step(np.eye(3, dtype=np.float32)[index])
      paddle += 4 * (index - 1)
      assert env.state[1] == paddle
    for wrong in ([1, 1, 0], [0, 0, 0], [0.5, 0.5, 0], [2, -1, 0], [1, 0], 1):
      with pytest.raises(ValueError, match='one-hot'):
        env.step(np.array(wrong, np.float32))
    with pytest.raises(ValueError, match='one-hot'):
      env.step(np.array([np.nan, 1, 0], np.float32))
    with pytest.raises(TypeError, match='Discrete'):
      wrappers.OneHotAction(Counting())

  def test_reward_obs(self):
    env = wrappers.RewardObs(Counting())
    rows = rollout(env, [np.zeros(2)] * 3)
    assert [float(row[0]['reward']) for row in rows] == [0, 0.5, 1, 1.5]
    for obs, _, _, _ in rows:
      assert obs['reward'].dtype == np.float32
      assert env.observation_space['reward'].contains(obs['reward'])
    assert 'reward' not in Counting.observation_space.spaces

  def test_obs_dict(self):
    inner = Counting()
    inner.observation_space = inner.observation_space['image']
    inner._observe = lambda: np.zeros((2, 2, 3), np.uint8)
    env = wrappers.ObsDict(inner, 'image')
    assert set(env.observation_space) == {'image'}
    assert env.observation_space.contains(env.reset())
    assert env.observation_space.contains(env.step(np.zeros(2))[0])

  def test_attributes_and_pickling(self):
    env = suites.make_task('toy_catch', seed=3)
    assert env.state.shape == (3,)
    assert not hasattr(env, '_missing') and not hasattr(env, 'missing')
    env.reset()
    copy = pickle.loads(pickle.dumps(env))
    assert (copy.state == env.state).all() and copy.action_space.discrete


# ---------------------------------------------------------------------------
# Collect
# ---------------------------------------------------------------------------


def collect(env, steps, blocking=True, precision=32):
  """Plays random actions; returns episodes, actions and the last info."""
  episodes = []
  env = wrappers.Collect(env, [episodes.append], precision)
  rng = np.random.RandomState(0)
  actions = []
  done = True
  action = np.zeros(2, np.float32)
  for _ in range(steps):
    if done:
      env.reset() if blocking else env.reset(blocking=False)()
    # One array for all steps, as a careless caller might have.
    action[:] = rng.uniform(-1, 1, 2)
    actions.append(action.copy())
    if blocking:
      _, _, done, info = env.step(action)
    else:
      promise = env.step(action, blocking=False)
      action[:] = 9
      _, _, done, info = promise()
      assert promise()[2] == done
  return episodes, np.array(actions), info


class TestCollect:
  @pytest.mark.parametrize('blocking', [True, False])
  @pytest.mark.parametrize('strategy', [None, *workers.STRATEGIES])
  def test_every_row_once_in_order(self, strategy, blocking):
    env = wrappers.Async(Counting, strategy) if strategy else Counting()
    episodes, actions, info = collect(env, 21, blocking)
    env.close()
    assert len(episodes) == 3 and info['episode'] is episodes[-1]
    for index, episode in enumerate(episodes):
      first = 7 * index
      counts = np.arange(first, first + 8)
      assert list(episode) == [
        *('image', 'count', 'float', 'action', 'reward', 'discount')
      ]
      np.testing.assert_array_equal(episode['count'], counts)
      np.testing.assert_array_equal(episode['image'][:, 1, 1, 2], counts)
      np.testing.assert_array_equal(episode['float'][:, 0], counts / 4)
      # Row 0 is the reset.
      np.testing.assert_array_equal(episode['action'][0], [0, 0])
      assert (episode['reward'][0], episode['discount'][0]) == (0, 1)
      np.testing.assert_array_equal(
        episode['action'][1:], actions[first : first + 7]
      )
      np.testing.assert_array_equal(episode['reward'][1:], counts[1:] / 2)
      # Without a discount in info, a done episode has truly ended.
      assert episode['discount'].tolist() == [1] * 7 + [0]

  @pytest.mark.parametrize(
    'precision, floating, integer',
    [
      (64, np.float64, np.int64),
      (32, np.float32, np.int32),
      (16, np.float16, np.int16),
    ],
  )
  def test_types(self, precision, floating, integer):
    episode = collect(Counting(), 7, precision=precision)[0][0]
    assert episode['image'].dtype == np.uint8
    assert episode['count'].dtype == integer
    for key in ('float', 'action', 'reward', 'discount'):
      assert episode[key].dtype == floating, key

  def test_reward_is_there_once(self):
    episode = collect(wrappers.RewardObs(Counting()), 7)[0][0]
    assert list(episode).count('reward') == 1
    np.testing.assert_array_equal(episode['reward'], np.arange(8) / 2)

  def test_discount_comes_from_info(self):
    episode = collect(Counting(info={'discount': 0.25}), 7)[0][0]
    assert episode['discount'].tolist() == [1] + [0.25] * 7

  def test_reset_drops_an_unfinished_episode(self):
    episodes = []
    env = wrappers.Collect(Counting(length=2), [episodes.append])
    env.reset()
    env.step(np.zeros(2))
    env.reset()
    env.step(np.zeros(2))
    env.step(np.zeros(2))
    assert [x['count'].tolist() for x in episodes] == [[1, 2, 3]]
    with pytest.raises(RuntimeError, match='reset'):
      env.step(np.zeros(2))

  @pytest.mark.parametrize('strategy', [None, 'none', 'thread'])
  def test_an_image_that_is_written_over_is_copied(self, strategy):
    env = wrappers.Async(Painting, strategy) if strategy else Painting()
    episodes, _, _ = collect(env, 7)
    env.close()
    assert episodes[0]['image'][:, 0, 0, 0].tolist() == [*range(8)]

  def test_info_of_the_environment_loses_no_episode(self):
    episodes, _, info = collect(Counting(info={'lost': True}), 7)
    assert len(episodes) == 1 and 'lost' not in info

  def test_one_hot_actions(self):
    env = wrappers.Async(functools.partial(suites.make_task, 'toy_catch', 1))
    episodes = []
    collected = wrappers.Collect(env, [episodes.append])
    collected.reset()
    done = False
    while not done:
      done = collected.step(np.eye(3, dtype=np.float32)[2])[2]
    env.close()
    assert episodes[0]['action'].tolist() == [[0, 0, 0]] + [[0, 0, 1]] * 16
    assert episodes[0]['discount'].tolist() == [1] * 16 + [0]
    assert abs(episodes[0]['reward'][-1]) == 1
    assert episodes[0]['image'].shape == (17, 64, 64, 3)

  def test_unknown_types_are_refused(self):
    env = Counting(length=1)
    env._observe = lambda: {'text': np.array('word')}
    with pytest.raises(TypeError, match='Cannot store'):
      collect(env, 1)


# ---------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------


@pytest.mark.parametrize('bad', [np.nan, np.inf, -1e39])  # of float32
@pytest.mark.parametrize('what', ['reward', 'observation'])
def test_numbers_that_are_not_finite_are_refused(bad, what):
  env = Counting()
  checked = wrappers.CheckFinite(env, 'gym_Counting-v0')
  checked.reset()
  checked.step(np.zeros(2))
  env.count = np.float64(bad) if what == 'reward' else 0
  if what == 'observation':
    env._observe = lambda: {'float': np.array([0, bad])}
  with pytest.raises(FloatingPointError, match='gym_Counting-v0 gave'):
    checked.step(np.zeros(2)) if what == 'reward' else checked.reset()


def test_tasks_are_checked_for_finite_numbers(monkeypatch):
  monkeypatch.setattr(toys.ToyReach, '_distance', lambda self: np.nan)
  monkeypatch.setattr(toys.ToyReach, 'reset', toys.ToyReach._observe)
  env = suites.make_task('toy_reach', 1, 50, 0)
  env.reset()
  with pytest.raises(FloatingPointError, match='toy_reach gave the reward'):
    env.step(np.zeros(2, np.float32))
