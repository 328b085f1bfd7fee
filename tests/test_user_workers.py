"""Users' environments in workers: errors, prints, modules, starting."""

import functools
import json
import os
import sys

import numpy as np
import pytest

import spaces
import suites
import worker_calls
import worker_process
import wrappers
from user_envs import Flaky, register
from worker_calls import WorkerError, WorkerLost

pytestmark = pytest.mark.slow

ROOT = os.path.dirname(os.path.abspath(wrappers.__file__))


# --- Errors of environments -------------------------------------------------


def collect(tmp_path, bounds, episodes, tolerant=True, number=0, proven=None):
  """Runs episodes of `Flaky`; returns them and what was reported."""
  path = tmp_path / 'steps'
  (tmp_path / 'steps.bounds').write_text(json.dumps(bounds))
  register(Flaky)
  entry = functools.partial(
    suites.make_task,
    *('gym_user_envs:Flaky-v0', 1, 100, 0),
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


# --- What workers print -----------------------------------------------------


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_what_workers_print_is_in_a_file_that_the_error_names(
  tmp_path, strategy
):
  path = tmp_path / 'a [1]%s' / 'workers.log'
  path.parent.mkdir()
  log = worker_calls.open_log(path)
  make = functools.partial(suites.make_task, 'gym_user_envs:Chatty-v0', 1, 100)
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


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_starting_has_a_limit_of_its_own(strategy):
  task = 'gym_user_envs:SlowStart-v0'
  make = functools.partial(suites.make_task, task, 1, 100, args={'seconds': 3})
  env = wrappers.Async(make, strategy, 2, 100)
  assert env.reset()['image'].shape == (64, 64, 3)
  env.close()
  make.keywords['args']['seconds'] = 60
  env = wrappers.Async(make, strategy, 100, 3)
  with pytest.raises(WorkerLost, match='3 seconds.* --start_timeout'):
    env.reset()
  env.close()


def test_a_slow_step_names_its_flag():
  make = functools.partial(suites.make_task, 'gym_user_envs:Slow-v0', 1, 9)
  env = wrappers.Async(make, 'process', 2, 100)
  env.reset()
  with pytest.raises(WorkerLost, match='2 seconds.* --worker_timeout'):
    env.step(np.zeros(2, np.float32))
  env.close()
