"""Tests of the workers that environments live in: processes, threads, Ray.

Everything here is real: processes, simulator, rendering and Ray.
"""

import errno
import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

import runfile
import spaces
import suites
import worker_calls
import workers
import wrappers
from processes import alive, run_script, wait_until
from spaces import gym
from worker_calls import RenderError, TaskError, WorkerError, WorkerLost
from worlds import (
  NO_EGL,
  Call,
  Closing,
  Counting,
  Faulty,
  Fragile,
  environ,
  fail,
  in_worker,
  noisy,
  same,
)

ROOT = os.path.dirname(os.path.abspath(wrappers.__file__))

# Strategies with workers in other processes, and what they call a death. Ray
# starts at the first use and serves all tests of this process.
KILLED = {'process': 'was killed by signal SIGKILL', 'ray': 'died: '}
remote = pytest.mark.parametrize('strategy', KILLED)


def async_rollout(strategy, blocking, task='toy_reach'):
  make = functools.partial(suites.make_task, task, 1, 15, 5)
  env = wrappers.Async(make, strategy)
  space = env.action_space
  space.seed(1)
  rows = [(env.reset(blocking=True), 0.0, False, {})]
  for _ in range(15):
    result = env.step(space.sample(), blocking)
    rows.append(result if blocking else result())
  spaces = env.observation_space, space
  env.close()
  return rows, spaces


class TestAsync:
  @pytest.mark.parametrize('task', ['toy_reach', 'toy_catch'])
  def test_strategies_agree(self, task):
    reference, spaces = async_rollout('none', True, task)
    for strategy in workers.STRATEGIES:
      for blocking in (True, False):
        rows, found = async_rollout(strategy, blocking, task)
        assert same(rows, reference)
        assert found == spaces
        assert getattr(found[1], 'discrete', False) == (task == 'toy_catch')

  def test_strategies_agree_on_rendered_frames(self):
    # In a process of its own, where there is no TensorFlow.
    done = run_script(
      """
      import functools
      import numpy as np
      import suites
      import wrappers
      make = functools.partial(
          suites.make_task, 'dmc_pendulum_swingup', seed=0)
      frames = []
      for strategy in ('thread', 'process'):
        env = wrappers.Async(make, strategy)
        env.reset()
        steps = [env.step(np.ones(1, np.float32)) for _ in range(5)]
        frames.append(np.array([step[0]['image'] for step in steps]))
        env.close()
      print((frames[0] == frames[1]).all(), frames[0].std() > 5)
    """,
      env={**os.environ, 'MUJOCO_GL': 'egl'},
    )
    assert done.stdout == 'True True\n', done.stderr

  @remote
  def test_promises_in_any_order(self, strategy):
    env = wrappers.Async(Counting, strategy)
    env.reset()
    promises = [env.step(np.zeros(2), blocking=False) for _ in range(4)]
    order = [2, 0, 3, 1, 2]
    assert [promises[i]()[0]['count'] for i in order] == [3, 1, 4, 2, 3]
    env.close()

  def test_steps_overlap(self):
    envs = [wrappers.Async(functools.partial(Call, nap)) for _ in range(3)]
    for env in envs:
      assert env.observation_space is None
    start = time.time()
    promises = [env.reset(blocking=False) for env in envs]
    assert [promise() for promise in promises] == ['rested'] * 3
    assert time.time() - start < 1.2
    for env in envs:
      env.close()

  def test_starting_does_not_wait(self):
    start = time.time()
    env = wrappers.Async(functools.partial(time.sleep, 30))
    env.close()
    assert time.time() - start < 2

  def test_unknown_strategy(self):
    with pytest.raises(ValueError, match='fork'):
      wrappers.Async(Counting, 'fork')

  @remote
  def test_what_does_not_pickle_fails_at_once(self, strategy):
    lock = threading.Lock()
    with pytest.raises((TypeError, pickle.PicklingError)):
      wrappers.Async(lambda: lock, strategy)

  @remote
  def test_lambdas_are_sent_whole(self, strategy):
    made = Counting
    env = wrappers.Async(lambda: made(), strategy)
    assert env.reset()['count'] == 0
    env.close()

  @remote
  def test_answers_that_do_not_pickle(self, strategy):
    env = wrappers.Async(functools.partial(Call, unpicklable), strategy)
    with pytest.raises(WorkerError, match='[Pp]ickl') as caught:
      env.reset()
    assert not isinstance(caught.value, WorkerLost)
    env.close()

  @pytest.mark.parametrize('strategy', workers.STRATEGIES)
  def test_error_in_constructor(self, strategy):
    make = functools.partial(fail, OSError, 'no such world')
    env = wrappers.Async(make, strategy)
    for _ in range(2):
      with pytest.raises(WorkerError) as caught:
        env.reset()
      assert str(caught.value).startswith('no such world')
      assert 'Traceback' not in str(caught.value)
      assert 'in fail' in caught.value.traceback
    with pytest.raises(WorkerError, match='no such world'):
      _ = env.action_space
    env.close()

  @pytest.mark.parametrize('strategy', workers.STRATEGIES)
  @pytest.mark.parametrize('kind', [TaskError, RenderError])
  def test_own_errors_arrive_as_themselves(self, strategy, kind):
    env = wrappers.Async(functools.partial(fail, kind, 'oh'), strategy)
    with pytest.raises(kind) as caught:
      env.reset()
    assert type(caught.value) is kind and str(caught.value) == 'oh'
    env.close()

  @pytest.mark.parametrize('strategy', workers.STRATEGIES)
  def test_error_in_step(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    env.reset()
    promise = env.step('fail', blocking=False)
    for _ in range(2):
      with pytest.raises(WorkerError) as caught:
        promise()
      assert str(caught.value).startswith("'wheel'")
      assert 'KeyError' in str(caught.value)
      assert 'in step' in caught.value.traceback
    assert env.step('go')[2] is False
    env.close()

  @pytest.mark.parametrize('strategy', workers.STRATEGIES)
  def test_closed(self, strategy):
    env = wrappers.Async(Counting, strategy)
    env.reset()
    env.close()
    env.close()
    with pytest.raises(WorkerError, match='closed'):
      env.reset()


@pytest.mark.parametrize('strategy', ['process', 'thread', 'none'])
def test_what_is_replaced_is_closed(strategy, tmp_path):
  path = tmp_path / 'closed'
  env = wrappers.Async(functools.partial(Closing, path), strategy)
  env.reset()
  env.restart()
  assert path.read_text() == 'closed once\n'
  assert env.reset()['count'] == 0
  env.close()


class Growing(Counting):
  """Shows one number more each time it is made."""

  def __init__(self, path):
    super().__init__()
    with open(path, 'a') as file:
      file.write('.')
      box = gym.spaces.Box(-1, 1, (file.tell(),), np.float32)
    self.observation_space = gym.spaces.Dict(state=box)


@pytest.mark.parametrize('strategy', workers.STRATEGIES)
def test_what_is_made_again_is_like_the_first(strategy, tmp_path):
  env = wrappers.Async(functools.partial(Growing, tmp_path / 'made'), strategy)
  env.reset()
  env.restart()
  for _ in range(2):
    with pytest.raises(TaskError, match=r'state \[2\].*state \[1\]'):
      env.reset()
  env.close()


def test_one_hot_actions_are_told_from_others_of_their_size():
  box = gym.spaces.Box(0, 1, (5,), np.float32)
  actions = box, spaces.OneHotBox(5), spaces.OneHotBox([2, 3])
  assert len({spaces.outline(None, action) for action in actions}) == 3


def unpicklable():
  return lambda: None


def nap():
  time.sleep(0.5)
  return 'rested'


class OddTaskError(TaskError):
  pass


def test_kinds_of_errors_arrive_as_the_nearest_known():
  make = functools.partial(fail, OddTaskError, 'odd')
  env = wrappers.Async(make)
  with pytest.raises(TaskError, match='^odd'):
    env.reset()
  env.close()


class TestLostWorkers:
  def collect(self, strategy, tmp_path, fates, episodes, timeout=0):
    """Returns finished episodes, reported errors, and rows that were given."""
    make = functools.partial(Fragile, tmp_path / 'workers', fates)
    finished, errors, rows = [], [], []
    env = wrappers.Collect(
      wrappers.Async(make, strategy, timeout),
      [finished.append],
      lost=errors.append,
    )
    env.number(1)
    try:
      while len(finished) < episodes:
        env.reset()
        done = False
        while not done:
          obs, reward, done, info = env.step(np.zeros(2, np.float32))
          rows.append((set(obs), reward, done, 'lost' in info))
    finally:
      env.close()
    return finished, errors, rows

  @remote
  def test_one_that_dies_is_replaced_and_its_episode_dropped(
    self, strategy, tmp_path
  ):
    finished, errors, rows = self.collect(strategy, tmp_path, ['die'], 2)
    keys = {'image', 'count', 'float'}
    assert [row[1:] for row in rows[:2]] == [
      (50.5, False, False),
      (0.0, True, True),
    ]
    assert all(row[0] >= keys for row in rows)
    assert [len(e['reward']) for e in finished] == [4, 4]
    # The fresh worker goes on with the number after the lost episode's.
    assert finished[0]['count'].tolist() == [200, 201, 202, 203]
    (error,) = errors
    assert isinstance(error, WorkerLost)
    assert f'The environment worker {KILLED[strategy]}' in str(error)

  @remote
  def test_one_that_hangs_says_where(self, strategy, tmp_path):
    finished, errors, _ = self.collect(
      strategy, tmp_path, ['hang'], 1, timeout=3
    )
    assert len(finished) == 1
    (error,) = errors
    assert 'gave no answer for 3 seconds' in str(error)
    assert 'in forever' in error.traceback

  def test_one_that_hangs_deep_in_an_actor_is_killed(self, tmp_path):
    finished, errors, _ = self.collect('ray', tmp_path, ['hang deep'], 1, 3)
    assert len(finished) == len(errors) == 1
    assert 'gave no answer for 3 seconds' in str(errors[0])

  @remote
  def test_five_in_a_row_are_too_many(self, strategy, tmp_path):
    with pytest.raises(WorkerLost, match=KILLED[strategy]):
      self.collect(strategy, tmp_path, ['die'] * 5, 1)
    assert (tmp_path / 'workers').read_text() == 5 * 'worker\n'

  def test_four_in_a_row_are_not(self, tmp_path):
    finished, errors, _ = self.collect('process', tmp_path, ['die'] * 4, 1)
    assert len(finished) == 1 and len(errors) == 4

  def test_many_are_not_if_whole_episodes_come_between(self, tmp_path):
    fates = ['die later'] * 7  # at the beginning of a second episode
    finished, errors, _ = self.collect('process', tmp_path, fates, 7)
    assert len(finished) == 7 and len(errors) >= 6

  @remote
  def test_reset_is_tried_again(self, strategy, tmp_path):
    make = functools.partial(Fragile, tmp_path / 'workers', ['die at once'])
    errors = []
    env = wrappers.Collect(wrappers.Async(make, strategy), lost=errors.append)
    assert env.reset()['count'] == 0
    assert len(errors) == 1
    env.close()

  @remote
  def test_errors_of_the_environment_are_not_losses(self, strategy):
    errors = []
    env = wrappers.Collect(wrappers.Async(Faulty, strategy), lost=errors.append)
    env.reset()
    with pytest.raises(WorkerError) as caught:
      env.step('fail')
    assert not isinstance(caught.value, WorkerLost) and not errors
    assert "raise KeyError('wheel')" in caught.value.traceback
    env.close()


class TestRemote:
  @remote
  def test_killed(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
      with pytest.raises(WorkerError, match=KILLED[strategy]):
        env.step('go')
    env.close()

  @remote
  def test_killed_while_others_wait(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    promises = [env.step('sleep', blocking=False), env.reset(blocking=False)]
    os.kill(pid, signal.SIGKILL)
    for promise in promises:
      with pytest.raises(WorkerError, match=KILLED[strategy]):
        promise()
    env.close()

  @remote
  def test_exit_code_and_last_words(self, strategy, capfd):
    env = wrappers.Async(Faulty, strategy)
    with pytest.raises(WorkerError) as caught:
      env.step('die')
    assert strategy == 'ray' or 'exit code 3' in str(caught.value)
    assert isinstance(caught.value, WorkerLost)
    assert 'last words' in caught.value.traceback
    env.close()
    assert capfd.readouterr() == ('', '')

  @remote
  def test_dies_in_constructor(self, strategy):
    env = wrappers.Async(functools.partial(os.abort), strategy)
    cause = dict(process='SIGABRT', ray='died: ')[strategy]
    with pytest.raises(WorkerLost, match=cause):
      env.reset()
    env.close()

  @remote
  def test_close_leaves_no_process(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    assert alive(pid)
    env.close()
    assert strategy == 'ray' or not os.path.exists(f'/proc/{pid}')
    assert wait_until(lambda: not alive(pid))

  @pytest.mark.parametrize('strategy', workers.STRATEGIES)
  def test_close_closes_the_environment(self, strategy, tmp_path):
    path = tmp_path / 'closed'
    env = wrappers.Async(functools.partial(Closing, path), strategy)
    env.reset()
    assert not path.exists()
    env.close()
    assert path.read_text() == 'closed once\n'

  @remote
  @pytest.mark.parametrize('state', ['idle', 'answers'])
  def test_close_may_take_as_long_as_a_step(self, state, strategy, tmp_path):
    path = tmp_path / 'closed'
    constructor = functools.partial(Closing, path, 3)
    env = wrappers.Async(constructor, strategy, timeout=30)
    env.reset()
    if state == 'answers':  # that nobody waits for
      for _ in range(3):
        env.step(np.zeros(2), blocking=False)
    env.close()
    assert path.read_text() == 'closed once\n'

  def test_environments_close_together(self, tmp_path):
    paths = [tmp_path / str(index) for index in range(3)]
    made = [functools.partial(Closing, path, 3) for path in paths]
    envs = [wrappers.Async(make, 'process', timeout=30) for make in made]
    for env in envs:
      env.reset()
    for env in envs:
      env.begin_close()
    assert wait_until(lambda: all(p.exists() for p in paths), seconds=20)
    for env in envs:
      env.close()
    assert all(path.read_text() == 'closed once\n' for path in paths)

  def test_a_signal_ends_the_wait_for_a_close(self, tmp_path):
    env = wrappers.Async(functools.partial(Closing, tmp_path / 'x', 60))
    env.reset()
    pid = env._worker._process.pid
    timer = threading.Timer(1, signal.raise_signal, [signal.SIGUSR1])
    before = signal.signal(signal.SIGUSR1, lambda *_: 1 / 0)
    try:
      timer.start()
      with pytest.raises(ZeroDivisionError):
        env.close()
    finally:
      signal.signal(signal.SIGUSR1, before)
    assert not alive(pid)

  def test_close_that_hangs_is_told(self, tmp_path):
    constructor = functools.partial(Closing, tmp_path / 'closed', 60)
    log = worker_calls.open_log(tmp_path / 'log')
    env = wrappers.Async(constructor, 'process', timeout=1, log=log)
    env.reset()
    env.close()
    assert not (tmp_path / 'closed').exists()
    assert 'close() took too long' in (tmp_path / 'log').read_text()

  @remote
  def test_close_ends_a_busy_worker(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    promise = env.step('sleep', blocking=False)
    start = time.time()
    env.close()
    assert time.time() - start < 4
    assert strategy == 'ray' or not os.path.exists(f'/proc/{pid}')
    assert wait_until(lambda: not alive(pid))
    with pytest.raises(WorkerError, match='closed'):
      promise()

  @remote
  def test_forgotten_environments_are_closed(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    del env
    assert wait_until(lambda: not alive(pid))

  @remote
  def test_signals_are_for_the_trainer(self, strategy):
    env = wrappers.Async(Faulty, strategy)
    pid = env.step('go')[3]['pid']
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert env.step('go')[3]['pid'] == pid
    assert os.getsid(pid) != os.getsid(0)
    env.close()

  @remote
  def test_nothing_leaks_to_the_terminal(self, strategy, capfd):
    env = wrappers.Async(noisy, strategy)
    env.reset()
    env.close()
    assert capfd.readouterr() == ('', '')

  @remote
  def test_one_thread_each(self, strategy):
    names = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
    found = in_worker(environ, *names, strategy=strategy)
    assert found == dict.fromkeys(names, '1')

  @remote
  def test_worker_never_imports_tensorflow(self, strategy):
    found = in_worker(
      modules_after_task, 'dmc_pendulum_swingup', strategy=strategy
    )
    assert found == []

  def test_make_task_pickles(self):
    make = functools.partial(suites.make_task, 'toy_reach', seed=1)
    copy = pickle.loads(pickle.dumps(make))
    assert same([(copy().reset(), 0, 0)], [(make().reset(), 0, 0)])


def modules_after_task(task):
  suites.make_task(task).reset()
  loaded = {k for k, v in sys.modules.items() if getattr(v, '__file__', None)}
  return sorted({'tensorflow', 'keras', 'dreamer'} & loaded)


# Deliberately without a guard for __main__: a worker must not run this again.
TRAINER = """
import functools, os, sys, time, types
print('started', flush=True)
sys.modules['tensorflow'] = object()
import wrappers
make = functools.partial(
    types.SimpleNamespace, observation_space=None, action_space=None,
    reset=os.getpid, close=os.getpid)
env = wrappers.Async(make, sys.argv[2])
pid = env.reset()
print(pid)
print(os.getsid(pid))
with open('/proc/self/task/%d/children' % os.getpid()) as file:
  print(file.read(), flush=True)
if sys.argv[1] == 'wait':
  time.sleep(60)
if sys.argv[1] == 'fail':
  raise RuntimeError('oh')
"""


def start_trainer(tmp_path, mode, strategy):
  """Returns the trainer and its child: a worker, or what keeps its Ray."""
  script = tmp_path / 'trainer.py'
  script.write_text(TRAINER)
  trainer = subprocess.Popen(
    [sys.executable, str(script), mode, strategy],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': ROOT},
  )
  assert trainer.stdout.readline() == 'started\n'
  pid, session = (int(trainer.stdout.readline()) for _ in range(2))
  (child,) = map(int, trainer.stdout.readline().split())
  assert (child == pid) == (strategy == 'process')
  assert session == child
  return trainer, child


def session_is_gone(session):
  """Whether no process of a session is left: worker, Ray, its actors."""

  def lives(pid):
    try:
      return os.getsid(pid) == session and alive(pid)
    except ProcessLookupError:
      return False

  return not any(lives(int(x)) for x in os.listdir('/proc') if x.isdigit())


@remote
def test_killed_trainer_leaves_no_worker(tmp_path, strategy):
  trainer, session = start_trainer(tmp_path, 'wait', strategy)
  assert not session_is_gone(session)
  trainer.kill()
  trainer.wait()
  assert wait_until(lambda: session_is_gone(session), 20)


@pytest.mark.parametrize(
  'mode, code, strategy',
  [('end', 0, 'process'), ('fail', 1, 'process'), ('end', 0, 'ray')],
)
def test_trainer_without_close_leaves_no_worker(tmp_path, mode, code, strategy):
  trainer, session = start_trainer(tmp_path, mode, strategy)
  stdout, stderr = trainer.communicate(timeout=60)
  assert trainer.returncode == code and 'started' not in stdout
  assert (stderr == '') == (mode == 'end')
  assert wait_until(lambda: session_is_gone(session), 20)


@remote
def test_files_in_the_current_folder_are_not_those_of_python(
  tmp_path, monkeypatch, strategy
):
  monkeypatch.chdir(tmp_path)
  for name in ('struct', 'pickle', 'json'):
    (tmp_path / f'{name}.py').write_text('raise RuntimeError("not mine")')
  make = functools.partial(suites.make_task, 'toy_reach', 1, 15, 5)
  env = wrappers.Async(make, strategy)
  assert env.reset(blocking=True)
  env.close()


# ---------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------


def test_without_ray(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', None)
  for use in (
    lambda: suites.check_parallel('toy_reach', 'ray'),
    lambda: wrappers.Async(Counting, 'ray'),
  ):
    with pytest.raises(TaskError, match=r"pip install '\.\[sweep\]'"):
      use()


@pytest.mark.parametrize('address', ['127.0.0.1:1', 'auto'])
def test_wrong_ray_address(tmp_path, address):
  """Also of a cluster that has left its address behind."""
  (tmp_path / 'ray').mkdir()
  (tmp_path / 'ray/ray_current_cluster').write_text('127.0.0.1:1')
  done = run_script(
    """
    import functools
    import worker_calls
    import wrappers
    from ray._private import services
    # Other clusters on this host.
    services.find_gcs_addresses = functools.cache(lambda: set())
    try:
      wrappers.Async(dict, 'ray')
    except worker_calls.TaskError as error:
      print(error)
  """,
    env={**os.environ, 'RAY_ADDRESS': address, 'RAY_TMPDIR': str(tmp_path)},
  )
  begin = f'Cannot connect to Ray at RAY_ADDRESS={address}: [Errno 111]'
  assert done.stdout.startswith(begin)
  assert done.stderr == ''


@pytest.mark.slow
def test_ray_without_egl_uses_osmesa():
  """And signals stay with the script, whose environment its Ray has."""
  code = """
    import os
    import signal
    import worker_calls
    import worlds
    numbers = (signal.SIGINT, signal.SIGTERM)
    caught = []
    for number in numbers:
      signal.signal(number, lambda number, frame: caught.append(number))
    print(worlds.render_pendulum('ray')[1])
    for number in numbers:
      os.kill(os.getpid(), number)
    print(caught == [*numbers])
    os.environ['MUJOCO_GL'] = 'egl'
    try:
      worlds.render_pendulum('ray')
    except worker_calls.RenderError as error:
      print(error)
  """
  env = {k: v for k, v in os.environ.items() if k != 'MUJOCO_GL'}
  env.update([NO_EGL], PYTHONPATH=os.path.join(ROOT, 'tests'))
  done = run_script(code, env=env)
  chosen, caught, error = done.stdout.splitlines()
  assert (chosen, caught) == ('osmesa', 'True')
  assert 'Cannot render with OpenGL (MUJOCO_GL is egl)' in error
  assert done.stderr == ''


@pytest.mark.slow
def test_ray_imported_before():
  """Its token is read again."""
  code = """
    import ray
    import worlds
    import wrappers
    print(wrappers.Async(worlds.Counting, 'ray').reset()['count'])
  """
  env = {k: v for k, v in os.environ.items() if not k.startswith('RAY_')}
  env['PYTHONPATH'] = os.path.join(ROOT, 'tests')
  done = run_script(code, env=env)
  assert done.stdout == '0\n', done.stderr


@pytest.mark.slow
def test_cluster_of_two_hosts():
  """One CPU in all, on a host that goes away."""
  code = """
    import os
    import sys
    import ray
    from ray import cluster_utils
    import ray_workers
    import worker_calls
    import worlds
    import wrappers
    os.makedirs('/tmp/ray', exist_ok=True)  # where Ray notes the address
    cluster = cluster_utils.Cluster(
        True, head_node_args=dict(num_cpus=0, temp_dir=sys.argv[1]))
    host = cluster.add_node(num_cpus=1, temp_dir=sys.argv[1])
    os.environ['RAY_ADDRESS'] = cluster.address
    env = wrappers.Async(worlds.Counting, 'ray')
    print(env.reset()['count'])
    ray_workers.RayWorker.PLACING = 3
    try:
      wrappers.Async(worlds.Counting, 'ray').reset()
    except worker_calls.WorkerError as error:
      print(error)
    cluster.remove_node(host, allow_graceful=False)
    try:
      while True:  # the actor notices the end of its host a little later
        env.reset()
    except worker_calls.WorkerLost as error:
      print(error)
    ray.shutdown()
    cluster.shutdown()
  """
  env = {**os.environ, 'PYTHONPATH': os.path.join(ROOT, 'tests')}
  with tempfile.TemporaryDirectory(dir='/tmp') as folder:  # a short path
    done = run_script(code, folder, env=env)
  assert done.returncode == 0, done.stderr
  first, room, lost = done.stdout.split('\n', 2)
  assert first == '0'
  assert 'no worker for an environment within 3 seconds' in room
  assert 'takes 1 CPU; the cluster has 1, 0 of them free' in room
  assert lost.startswith('The environment worker died: ')


@pytest.mark.slow
def test_a_run_whose_cluster_ends_is_saved(tmp_path):
  """Ray itself would end the process later, with nothing saved."""
  code = """
    import os
    import pathlib
    import sys
    import threading
    import time
    from ray import cluster_utils
    import dreamer
    import ray_cluster
    os.makedirs('/tmp/ray', exist_ok=True)  # where Ray notes the address
    logdir, folder = sys.argv[1:]
    cluster = cluster_utils.Cluster(
        True, head_node_args=dict(num_cpus=2, temp_dir=folder))
    os.environ['RAY_ADDRESS'] = cluster.address
    ray_cluster.Head.EVERY, ray_cluster.Head.PATIENCE = 0.5, 1.0

    def end():
      metrics = pathlib.Path(logdir, 'metrics.jsonl')
      while not metrics.exists() or '"updates"' not in metrics.read_text():
        time.sleep(0.2)
      for processes in cluster.head_node.all_processes.values():
        for info in processes:
          info.process.kill()

    threading.Thread(target=end, daemon=True).start()
    words = f'--logdir={logdir} --task=toy_reach --preset=debug --inputs=state'
    words += ' --parallel=ray --precision=32 --prefill=100 --steps=1e6'
    code = dreamer.main([*words.split(), '--save_every=1000'])
    sys.stdout.flush()
    os._exit(code)  # without Ray's own goodbye, which waits for the cluster
  """
  with tempfile.TemporaryDirectory(dir='/tmp') as folder:  # a short path
    done = run_script(code, str(tmp_path / 'run'), folder, timeout=300)
  assert done.returncode == 1, done.stderr
  assert ' does not answer any more: ' in done.stderr
  assert 'Traceback' not in done.stderr
  said = re.search(r'Stopped at step \d+, (\d+) updates; saved', done.stdout)
  numbers = runfile.checkpoint_numbers(tmp_path / 'run/checkpoints')
  assert numbers[-1] == int(said[1]) > 0


class Simulator:
  """Starts a program of its own, and ends it as programs are ended."""

  def __init__(self, path=None):
    self.path = path
    self.program = subprocess.Popen(['sleep', '600'])
    self.observation_space = self.action_space = None

  def reset(self):
    return self.program.pid

  def step(self, action):
    time.sleep(600)

  def close(self):
    self.program.terminate()
    self.path.write_text(str(self.program.wait()))


def test_an_environment_can_end_its_programs(tmp_path):
  env = wrappers.Async(functools.partial(Simulator, tmp_path / 'end'))
  program = env.reset()
  env.close()
  assert not alive(program)
  assert (tmp_path / 'end').read_text() == str(-signal.SIGTERM)


def test_programs_of_a_worker_that_hangs_end_with_it():
  env = wrappers.Async(Simulator, 'process', timeout=0.5)
  program = env.reset()
  with pytest.raises(WorkerLost, match='gave no answer'):
    env.step(None)
  assert wait_until(lambda: not alive(program))
  env.close()


class Forking(Simulator):
  """Dies, and leaves a process that holds all its files open."""

  def step(self, action):
    child = os.fork()
    if not child:
      time.sleep(600)
    self.path.write_text(str(child))
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def test_a_worker_that_dies_is_noticed_though_its_children_live(tmp_path):
  kind = functools.partial(Forking, tmp_path / 'child')
  env = wrappers.Async(kind, 'process', timeout=20)
  program = env.reset()
  with pytest.raises(WorkerLost, match=r'SIGSEGV \(so ends'):
    env.step(None)
  env.close()
  child = int((tmp_path / 'child').read_text())
  assert wait_until(lambda: not alive(child) and not alive(program))


def test_a_signal_without_a_name():
  env = wrappers.Async(Faulty, 'process')
  os.kill(env.step('go')[3]['pid'], signal.SIGRTMIN + 2)
  with pytest.raises(WorkerLost, match=f'by signal {signal.SIGRTMIN + 2}'):
    env.step('go')
  env.close()


class Leaving(Simulator):
  """Ends nothing of what it started."""

  def close(self):
    pass


@pytest.mark.parametrize('hangs', [False, True])
def test_killed_trainer_leaves_no_program_of_an_environment(tmp_path, hangs):
  code = (
    'import os, signal, time, test_workers, workers\n'
    'env = workers.Async(test_workers.Leaving)\n'
    'print(env.reset(), flush=True)\n'
    f'env.step(None, blocking=False) if {hangs} else None\n'
    'time.sleep(1)\n'
    'os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  path = os.pathsep.join([ROOT, os.path.join(ROOT, 'tests')])
  done = run_script(code, tmp_path, env={**os.environ, 'PYTHONPATH': path})
  assert done.returncode == -signal.SIGKILL
  program = int(done.stdout)
  assert wait_until(lambda: not alive(program), 20)


class Forked(Simulator):
  """Has a process of its own code, and ends it as programs are ended."""

  def __init__(self, path):
    self.path = path
    ours, theirs = os.pipe()
    self.child = os.fork()
    if not self.child:
      os.write(theirs, b'.')
      time.sleep(600)
    os.read(ours, 1)  # Python forgets signals of before it runs in the child
    self.observation_space = self.action_space = None

  def close(self):
    os.kill(self.child, signal.SIGTERM)
    status = os.waitpid(self.child, 0)[1]
    self.path.write_text(str(os.waitstatus_to_exitcode(status)))


@remote
def test_an_environment_can_end_its_forks(tmp_path, strategy):
  env = wrappers.Async(functools.partial(Forked, tmp_path / 'end'), strategy)
  _ = env.about
  env.close()
  assert (tmp_path / 'end').read_text() == str(-signal.SIGTERM)


def test_where_processes_have_no_descriptors(monkeypatch):
  """Old kernels, and containers that forbid it."""

  def refuse(pid):
    raise OSError(errno.ENOSYS, 'Function not implemented')

  monkeypatch.setattr(os, 'pidfd_open', refuse)
  env = wrappers.Async(functools.partial(suites.make_task, 'toy_reach', 1))
  assert env.reset()['image'].any()
  env.close()


@pytest.mark.parametrize('strategy', ['none', 'thread'])
def test_an_environment_that_leaves_ends_no_run(strategy):
  env = wrappers.Async(Exiting, strategy)
  with pytest.raises(WorkerError, match='SystemExit in the environ'):
    env.reset()
  env.close()


class Exiting(Leaving):
  def __init__(self):
    self.observation_space = self.action_space = None

  def reset(self):
    sys.exit()
