"""Several devices and processes: the same update, the same run.

Run as a script it is one process of such a test:

    python tests/test_distribute.py FOLDER STRATEGY CASE...

makes five updates from the episodes in FOLDER and writes all weights there.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import cli
import configs
import distribute
import run_setup
import spaces
import tf_config
from logdirs import read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
REPLICAS = 2
UPDATES = 5
SMALL = dict(
  deter_size=8,
  stoch_size=3,
  num_units=8,
  cnn_depth=2,
  # Half a batch is enough for the decoder to go the way of a whole one.
  batch_size=4,
  batch_length=12,
  horizon=4,
  precision='32',
  seed=3,
)


SHAPES = dict(image=(64, 64, 3), pose=(3,))
CASES = {
  'plain': dict(free_nats=0.0, slow_value=0.1),
  'contrastive': dict(
    representation='contrastive',
    action_dist='onehot',
    pcont=True,
    # Between what the two halves of a batch have: decided by their mean.
    free_nats=0.58,
  ),
  'float16': dict(
    precision='16', inputs='image,pose', kl_balance=0.8, actor_entropy=0.01
  ),
  'evolution': dict(behavior='evolution', evolve_population=6, free_nats=0.0),
  'jit': dict(jit='True'),  # the last, as it replaces the noise
}


def update(folder, strategy, cases):
  """Updates on the same batches, whatever they are spread over."""
  cpu = tf.config.list_physical_devices('CPU')[0]
  if strategy == 'mirrored':
    halves = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(cpu, halves)
  team = distribute.make_team(strategy, SMALL['batch_size'])
  assert team.replicas == (1 if strategy == 'single' else REPLICAS)
  for case in cases:
    weights, metrics = _update(folder, team, CASES[case])
    name = f'{strategy}-{team.index}-{case}'
    np.savez(folder / f'{name}.npz', **weights)
    (folder / f'{name}.json').write_text(json.dumps(metrics))
  team.wait()


def _update(folder, team, flags):
  import gym
  import keras

  import dreamer
  import models
  import progress

  if 'jit' in flags:  # XLA draws other noise; the world model is in it on one
    models._sample = lambda stats, seed: stats['mean']
  config = dreamer.define_config()
  config.update(SMALL, **flags)
  keras.utils.set_random_seed(team.index)  # the chief's weights count
  run_setup.setup_precision(config.precision)
  space = gym.spaces.Box(-1, 1, (2,), np.float32)
  if config.action_dist == 'onehot':
    space = spaces.OneHotBox(2)
  inputs = {k: SHAPES[k] for k in config.inputs.split(',')}
  agent = dreamer.Dreamer(config, space, team, inputs)
  if team.chief:  # as if it had restored a checkpoint
    agent.updates.assign(7)
    for variable in agent.optimizers['model'].variables:
      variable.assign(1.1 * variable)
  progress.receive(team, agent.trackable(), config.seed)
  for opt in agent.optimizers.values():  # so that float16 does not overflow
    opt.optimizer.dynamic_scale.assign(16.0)
  # Actions there are numbers, in every case.
  stored = cli.AttrDict(config, action_dist='auto')
  batches = dreamer.load_dataset(folder / 'episodes', stored, inputs=inputs)
  metrics = []
  for _ in range(UPDATES):
    agent.set_learning_rates()
    batch, share = next(batches), config.batch_size // team.workers
    rows = slice(team.index * share, (team.index + 1) * share)
    made = agent.update(team.place({k: v[rows] for k, v in batch.items()}))
    metrics.append({k: float(v) for k, v in made.items()})
    agent.updates.assign_add(1)
  weights = {
    f'{name}/{i}': v.numpy()
    for name, layer in agent.networks().items()
    for i, v in enumerate(layer.weights)
  }
  for variable in agent.optimizers['model'].variables:
    copies = team.strategy.experimental_local_results(variable.value)
    for copy in copies:
      np.testing.assert_array_equal(copy.numpy(), copies[0].numpy())
  return weights, metrics


def free_ports(count):
  sockets = [socket.socket() for _ in range(count)]
  for opened in sockets:
    opened.bind(('localhost', 0))
  ports = [opened.getsockname()[1] for opened in sockets]
  for opened in sockets:
    opened.close()
  return ports


def start_all(command, count=1, logs=None, **changes):
  """Starts a process, or several of one TF_CONFIG, on this machine."""
  workers = [f'localhost:{port}' for port in free_ports(count)]
  started = []
  for index in range(count):
    environment = dict(os.environ, PYTHONPATH=f'{ROOT}', **changes)
    task = dict(type='worker', index=index)
    config = dict(cluster=dict(worker=workers), task=task)
    environment.pop('TF_CONFIG', None)
    if count > 1:
      environment['TF_CONFIG'] = json.dumps(config)
    process = subprocess.Popen(
      [sys.executable, *(c.format(index=index) for c in command)],
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    started.append(process)
  return started


def finish(processes, timeout=300):
  """Waits; returns (exit code, stdout, stderr) of each."""
  ended = []
  try:
    for process in processes:
      out, error = process.communicate(timeout=timeout)
      ended.append((process.returncode, out, error))
  finally:
    for process in processes:
      process.kill()
  return ended


def spread(folder, strategy, cases):
  """Weights after the updates, and their metrics, by process and case."""
  count = 2 if strategy == 'multiworker' else 1
  command = [__file__, str(folder), strategy, *cases]
  processes = start_all(command, count)
  for code, out, error in finish(processes, timeout=900):
    assert code == 0, (out, error)
  results = {}
  for index in range(count):
    for case in cases:
      name = f'{strategy}-{index}-{case}'
      weights = dict(np.load(folder / f'{name}.npz'))
      metrics = json.loads((folder / f'{name}.json').read_text())
      results[index, case] = weights, metrics
  return results


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  import tools
  from agents import random_episode

  folder = tmp_path_factory.mktemp('updates')
  rng = np.random.default_rng(0)
  episodes = [random_episode(rng, 12, 2) for _ in range(3)]
  for episode in episodes:
    episode['pose'] = rng.normal(size=(12, 3)).astype(np.float32)
  tools.save_episodes(folder / 'episodes', episodes)
  return folder


@pytest.fixture(scope='module')
def single(folder):
  return spread(folder, 'single', CASES)


@pytest.mark.parametrize(
  'strategy, cases',
  [('mirrored', [*CASES]), ('multiworker', ['plain', 'contrastive'])],
)
def test_update_is_that_of_one_device(folder, single, strategy, cases):
  for (_, case), spread_out in spread(folder, strategy, cases).items():
    weights, metrics = spread_out
    expected_weights, expected_metrics = single[0, case]
    half = CASES[case].get('precision') == '16'
    # Of two programs of XLA gradients near 0 differ, which Adam makes steps of.
    bound = 5e-3 if half else 1e-4 if case == 'jit' else 1e-5
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
      np.testing.assert_allclose(
        weights[name],
        value,
        rtol=0,
        atol=bound,  # after five steps of Adam
        err_msg=f'{case}: {name}',
      )
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
      assert ours.keys() == theirs.keys()
      for name, value in theirs.items():
        # A saturated action's log-probability hangs on its last bits.
        least = 0.1 if name.startswith('action_ent') else 1e-3
        near = pytest.approx(value, rel=0.02 if half else 1e-3, abs=least)
        assert ours[name] == near, (case, name)


def test_batch_goes_to_replicas_by_rows():
  team = distribute.Team()
  placed = team.place(dict(x=np.arange(6.0)))
  np.testing.assert_array_equal(placed['x'], np.arange(6.0))
  assert team.sum([1, 2]).tolist() == [1, 2]
  assert team.any(True) and not team.any(False)


@pytest.mark.parametrize(
  'config, message',
  [
    (None, 'needs the environment variable TF_CONFIG'),
    ('{"cluster": ', 'is not a cluster'),
    ('{"cluster": {"worker": ["a:1"]}}', 'is not a cluster'),
    (dict(worker=['a:1']), 'is not a cluster'),  # index 1 of one
    (dict(worker=['a', 'b']), 'is not a cluster'),  # without ports
    (dict(worker=['a:1', 'b:']), 'is not a cluster'),
    (dict(worker=['a:1', 'b:x']), 'is not a cluster'),
    (dict(worker=['a:1', '2222']), 'is not a cluster'),
    (dict(worker=['a:1', 'b:99999']), 'is not a cluster'),
    ('{"cluster": {}, "task": {"type": "", "index": 1e999}}', 'is not a'),
    (dict(ps=['a:1', 'b:2']), 'is not a cluster'),
    (dict(worker=['a:1', 'b:2', 'a:1']), 'gives the address a:1 to two'),
  ],
)
def test_unusable_cluster(monkeypatch, config, message):
  monkeypatch.delenv('TF_CONFIG', raising=False)
  if isinstance(config, dict):
    task = dict(type=next(iter(config)), index=1)
    config = json.dumps(dict(cluster=config, task=task))
  if config:
    monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(cli.UserError, match=message):
    distribute.make_team('multiworker', 4)


def test_as_many_gpus_as_divide_the_batch(monkeypatch):
  monkeypatch.delenv('TF_CONFIG', raising=False)
  gpus = ['GPU'] * 4
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: gpus)
  monkeypatch.setattr(distribute, '_mirror', lambda count: count)
  assert [distribute.make_team('auto', n) for n in (8, 6, 2)] == [4, 3, 2]
  assert distribute.make_team('auto', 5).replicas == 1


@pytest.mark.parametrize('count, folders', [(1, 3), (2, None), (3, 1)])
def test_all_processes_share_a_folder_or_none(tmp_path, count, folders):
  team = distribute.Team(workers=3)
  team.sum = lambda value: count if value is True else value
  wrong = pytest.raises(cli.UserError, match='2 of 3 processes share')
  with contextlib.nullcontext() if folders else wrong:
    team.compare_folders(tmp_path)
    assert team.folders == folders


@pytest.mark.parametrize('host', ['localhost', '127.0.0.2'])
def test_a_process_that_has_the_index_of_another(host):
  """It would wait for itself, and TensorFlow would not heed a signal."""
  (port,) = free_ports(1)
  mine, other = f'127.0.0.1:{port}', f'{host}:{port}'
  with pytest.raises(cli.UserError, match=f'{other} in TF_CONFIG is another'):
    tf_config._wait_for_peers(0, [mine, other])


def test_cluster_numbers_the_chief_first(monkeypatch):
  cluster = dict(worker=['b:1', 'c:1'], chief=['a:1'])
  found = []
  for kind, index in (('chief', 0), ('worker', 0), ('worker', 1)):
    task = dict(type=kind, index=index)
    text = json.dumps(dict(cluster=cluster, task=task))
    monkeypatch.setenv('TF_CONFIG', text)
    found.append(tf_config.read())
  addresses = ['a:1', 'b:1', 'c:1']
  assert found == [(0, addresses), (1, addresses), (2, addresses)]


# Whole runs of two processes.

RUN = ['--task', 'toy_reach', '--preset', 'debug', '--parallel', 'none']
RUN += [
  '--prefill',
  '200',
  '--time_limit',
  '20',
  '--log_images',
  'False',
  '--precision',
  '32',
]


def start_run(logdir, *flags):
  command = ['dreamer.py', '--logdir', f'{logdir}', *RUN, *flags]
  return start_all(command, 2)


def read_until(process, text):
  """Reads what a process prints until `text`; returns the lines so far."""
  lines = []
  while True:
    line = process.stdout.readline()
    assert line, (lines, process.communicate())
    lines.append(line)
    if text in line:
      return lines


def test_run_of_two_processes_survives_the_loss_of_one(tmp_path):
  processes = start_run(tmp_path, '--steps', '1e6')
  said = [read_until(process, 'First update done') for process in processes]
  processes[1].kill()
  chief, other = finish(processes)
  said = ''.join(said[0]) + chief[1]
  assert chief[0] == 1 and other[0] == -9
  assert 'another process of this run is gone' in chief[2]
  assert 'Traceback' not in chief[2]
  saved = tf_checkpoint(tmp_path)
  assert saved > 0
  # Its environment dies, so that both end at other steps.
  more = steps_in(tmp_path) + 4000
  flags = '--parallel', 'process'
  processes = start_run(tmp_path, '--steps', f'{more}', *flags)
  begun = read_until(processes[0], 'Resumed')
  for _ in range(3):
    begun += read_until(processes[0], 'Episode: return')
  os.kill(workers_of(processes[1].pid)[0], signal.SIGKILL)
  ends = finish(processes)
  ends[0] = ends[0][0], ''.join(begun) + ends[0][1], ends[0][2]
  said += ends[0][1]
  for code, out, error in ends:
    assert code == 0, (out, error)
    assert 'Training on 2 devices of 2 processes' in out
    assert 'Finished at step' in out
    assert not error
    updates = out.split('updates')[-2].split()[-1]
  assert 'was killed by signal SIGKILL' in ends[1][1]
  assert tf_checkpoint(tmp_path) > saved
  lines = read_metrics(tmp_path)
  logged = [line['updates'] for line in lines if 'updates' in line]
  assert logged == sorted(logged)
  assert lines[-1]['step'] >= more
  # Both collected: each has a stream of its own, so no episode is there twice.
  steps = steps_in(tmp_path)
  assert steps >= more
  assert f'Finished at step {steps},' in ends[0][1]
  assert int(updates) > saved
  paths = sorted((tmp_path / 'episodes').glob('*.npz'))
  episodes = [dict(np.load(path)) for path in paths]
  for key, rows in (('action', slice(None)), ('image', slice(1))):
    assert len({e[key][rows].tobytes() for e in episodes}) == len(episodes)
  # The chief alone logs, and only its own.
  returns = [line for line in lines if 'train/return' in line]
  assert len(returns) == said.count('Episode: return') < len(episodes)
  # One process goes on with what two have learned.
  command = ['dreamer.py', '--logdir', f'{tmp_path}', *RUN]
  command += ['--steps', f'{steps + 100}']
  ((code, out, error),) = finish(start_all(command))
  assert code == 0, (out, error)
  assert f'Resumed at step {steps}, {updates} updates' in out


def workers_of(pid):
  """Process numbers of the workers of environments."""
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  found = [int(child) for child in children.split()]
  return [n for n in found if b'_work(' in read_bytes(f'/proc/{n}/cmdline')]


def read_bytes(path):
  return pathlib.Path(path).read_bytes()


def steps_in(logdir):
  paths = (logdir / 'episodes').glob('*.npz')
  return sum(int(path.stem.rsplit('-', 1)[-1]) - 1 for path in paths)


def tf_checkpoint(logdir):
  """Number of the newest checkpoint."""
  paths = (logdir / 'checkpoints').glob('ckpt-*.index')
  return max(int(path.stem.split('-')[1]) for path in paths)


def test_stop_of_one_stops_both_at_one_update(tmp_path):
  """Here each process keeps episodes in a folder of its own."""
  folder = tmp_path / '{index}'
  processes = start_run(folder, '--steps', '1e6')
  for process in processes:
    read_until(process, 'First update done')
  processes[1].terminate()
  ends = []
  for code, out, error in finish(processes):
    assert code == 0, (out, error)
    assert not error
    ends.append(out.split('updates')[-2].split()[-1])
  assert ends[0] == ends[1]
  first, second = tmp_path / '0', tmp_path / '1'
  assert tf_checkpoint(first) >= int(ends[0])
  assert [*(first / 'episodes').glob('*.npz')]
  assert [*(second / 'episodes').glob('*.npz')]
  assert {p.name for p in second.iterdir()} == {'episodes', 'lock-1'}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_wait_for_others_ends_at_once_when_asked(tmp_path, number):
  """And says who is missing."""
  first, second = start_run(tmp_path / 'run')
  second.kill()
  read_until(first, 'Process 0 of 2: waiting for the others')
  line = read_until(first, 'Still waiting for')[-1]
  assert re.fullmatch(r'.*for localhost:\d+ \(\w.*\)\.\n', line)
  first.send_signal(number)
  ((code, _, error), _) = finish([first, second], timeout=60)
  assert code == -number
  assert not error
  assert not (tmp_path / 'run').exists()


def test_replicas_imagine_from_other_rows(monkeypatch):
  """With one seed, each its share of its own part."""
  chosen = []
  for index in (0, 1):
    monkeypatch.setattr(distribute, 'replica', lambda i=index: (i, 2))
    rows = distribute.some_rows(dict(x=tf.range(20)), 8, tf.constant([0, 1]))
    chosen.append(set(rows['x'].numpy()))
  assert [len(rows) for rows in chosen] == [4, 4] and chosen[0] != chosen[1]


def test_a_stop_in_the_prefill_ends_both(tmp_path):
  processes = start_run(tmp_path, '--prefill', '1e9')
  for process in processes:
    read_until(process, 'Prefill')
  processes[1].terminate()
  for code, out, error in finish(processes, timeout=60):
    assert code == 0, (out, error)


def test_a_process_adds_to_no_other_run(tmp_path):
  team = distribute.Team(index=1)
  team.folders = 2
  run_setup.check_folder(tmp_path, team)
  (tmp_path / 'config.json').touch()
  with pytest.raises(cli.UserError, match='holds a run of its own'):
    run_setup.check_folder(tmp_path, team)


@pytest.mark.parametrize(
  'flags', [dict(offline='x'), dict(learner='free'), dict(behavior='evolution')]
)
def test_runs_that_several_processes_cannot_make(flags):
  config = configs.define_config()
  run_setup._check_team(config)
  config.update(evolve='environment', **flags)
  with pytest.raises(cli.UserError, match='in one process'):
    run_setup._check_team(config)


def test_a_port_that_is_taken(tmp_path):
  with socket.create_server(('localhost', 0)) as taken:
    workers = [f'localhost:{port}' for port in free_ports(1)]
    workers.append(f'localhost:{taken.getsockname()[1]}')
    task = dict(type='worker', index=1)
    config = dict(cluster=dict(worker=workers), task=task)
    logdir = f'--logdir={tmp_path / "run"}'
    command = [sys.executable, 'dreamer.py', logdir, *RUN]
    done = subprocess.run(
      [*command, '--strategy=multiworker'],
      cwd=ROOT,
      env=dict(os.environ, TF_CONFIG=json.dumps(config)),
      capture_output=True,
      text=True,
    )
  assert done.returncode == 2
  assert 'process 1 cannot begin at its address in TF_CONFIG' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--seed', '{index}', '--horizon', '1{index}'], '--seed, --horizon'),
    (['--batch_size', '5'], 'cannot be split over 2 devices; choose 4 or 6'),
  ],
)
def test_processes_that_cannot_run_together(tmp_path, flags, message):
  for code, out, error in finish(start_run(tmp_path / 'run', *flags)):
    assert code == 2, (out, error)
    assert message in error and 'Traceback' not in error
  assert not (tmp_path / 'run').exists()


if __name__ == '__main__':
  update(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
