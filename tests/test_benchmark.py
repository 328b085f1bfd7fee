"""The benchmark: real parts at debug size, its report, its errors."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import benchmark
import commandline
import configs
import dreamer
import spaces
import tools
import training
import update_parts
from processes import marked, wait_until

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(benchmark.__file__)
SMALL = ('--preset=debug', '--task=toy_reach', '--precision=32', '--repeats=2')


def script(*words):
  command = [sys.executable, str(SCRIPT), *SMALL, *map(str, words)]
  return subprocess.run(command, capture_output=True, text=True)


def test_nothing_is_left_by_one_that_is_stopped(tmp_path):
  command = [sys.executable, str(SCRIPT), *SMALL, '--what=startup']
  mark = str(tmp_path)
  process = subprocess.Popen(command, env=dict(os.environ, TMPDIR=mark))

  def trains():
    words = (pathlib.Path(f'/proc/{pid}/cmdline') for pid in marked(mark))
    with contextlib.suppress(OSError):
      return any(b'dreamer.py' in path.read_bytes() for path in words)

  assert wait_until(trains, 120)
  process.terminate()
  assert process.wait(60) == 130
  assert wait_until(lambda: not marked(mark), 60)
  assert not list(tmp_path.iterdir())


def test_report_of_all_parts(tmp_path):
  result = script('--json', tmp_path / 'report.json')
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / 'report.json').read_text())
  assert set(report['gemm_gflops']) == {'float32', 'bfloat16'}
  assert set(report['policy_ms']) == {'1', '8'}
  assert set(report['env_steps_per_s']) == {'1', '2', '4'}
  assert {'encoder', 'observe', 'value'} <= set(report['update_split_s'])
  parts = {'gemm', 'startup', 'train', 'policy', 'replay', 'env'}
  assert set(report['peak_mb']) == parts
  assert 0 < report['update_s'] < report['startup_s']
  assert report['replay_windows_per_s']['cold'] > 0
  seconds = report['seconds_per_1000']
  assert seconds['acting'] == report['policy_ms']['1']
  rate = report['env_steps_per_s']['1']
  assert seconds['environment'] == pytest.approx(1000 / rate)
  assert seconds['updates'] == pytest.approx(report['update_s'] * 50)
  most = max(seconds, key=seconds.get)
  assert f'\nMost of a run goes into: {most} ' in result.stdout
  low, high = report['spread']['run_env_steps_per_s']
  assert 0 < low <= report['run_env_steps_per_s'] <= high
  for key in ('update_s', 'startup_s'):
    low, high = report['spread'][key]
    assert 0 < low <= high
  # float32 multiplications and additions, at the rate of this machine.
  rate = report['gemm_gflops']['float32'] / report['update_gflop']
  assert report['update_floors'] == pytest.approx(report['update_s'] * rate)
  for key in ('startup_s', 'update_s', 'run_env_steps_per_s'):
    assert f'\n{key} ' in result.stdout


def test_steps_are_those_of_episodes_that_end_early(tmp_path):
  """16 of 100 in toy_catch, whose windows are as short."""
  words = ['--task=toy_catch', '--what=replay,env', f'--json={tmp_path / "x"}']
  result = script(*words)
  assert result.returncode == 0, result.stderr
  config = commandline.parse_flags([f'--logdir={tmp_path}', *SMALL[:-1]])
  config.update(configs.define_config('toy_catch', 'debug'), logdir=tmp_path)
  with benchmark._environments(config, 1) as (envs, lengths):
    act = training.random_agent(envs[0].action_space, 0)
    tools.simulate(act, envs, episodes=3)
  assert lengths == [16, 16, 16]


def test_a_run_is_timed_when_compiled_and_with_its_updates(
  tmp_path, monkeypatch
):
  """Episodes of 16 steps, an update every 100."""
  words = [f'--logdir={tmp_path}', *SMALL[:-1], '--task=toy_catch']
  words += ['--train_every=100', '--train_steps=1', '--batch_length=10']
  config = commandline.parse_flags(words)
  benchmark.collect(config)
  updates = []

  class Watched(benchmark.Learner):
    def __init__(self, *args):
      super().__init__(*args)
      updates.append(lambda: self.updates)

  def rates(collect, lengths, repeats):
    for _ in range(3):
      updates.append(updates[0]())
      lengths.clear()
      collect()
      assert sum(lengths) >= 100
    return 1.0, 1.0, 1.0

  monkeypatch.setattr(benchmark, 'Learner', Watched)
  monkeypatch.setattr(benchmark, '_rates', rates)
  benchmark._run(config, 2)
  assert 1 <= updates[1] < updates[2] < updates[3]


@pytest.mark.parametrize('part', ['startup', 'train'])
def test_flags_of_a_run_come_after_a_dash(part):
  words = ['--task=toy_catch', f'--what={part}', '--', '--batch_length=30']
  result = script(*words)
  assert result.returncode == 2
  assert 'batch_length 30 is longer than any episode' in result.stderr
  assert 'Traceback' not in result.stderr


def test_presets_go_before_defaults():
  """As in dreamer.py: vectors have a precision of their own there."""
  given = ['--preset=cpu', '--inputs=state', '--what=train']
  args = benchmark.parse_flags(given)
  config = commandline.parse_flags([*args.words, *args.extra, '--logdir=x'])
  assert (config.precision, config.preset) == ('32', 'cpu')


def test_how_long_it_runs_is_no_flag_of_it(capsys):
  assert benchmark.main([*SMALL, '--', '--steps=5']) == 2
  message = '--steps is of runs that benchmark.py does not time'
  assert message in capsys.readouterr().err


def test_split_of_an_update_has_all_heads(tmp_path):
  config = configs.define_config('toy_catch', 'debug')
  config.logdir = tmp_path
  agent = dreamer.Dreamer(config, spaces.OneHotBox(3))
  heads, seen = agent.world.heads, set()
  for name, head in heads.items():
    heads[name] = lambda feat, n=name, h=head: (seen.add(n), h(feat))[1]
  shape = config.batch_size, config.batch_length
  batch = dict(
    image=np.zeros([*shape, 64, 64, 3], np.uint8),
    action=np.zeros([*shape, 3], np.float32),
    reward=np.zeros(shape, np.float32),
    discount=np.ones(shape, np.float32),
  )
  pieces = update_parts.pieces(agent, batch, config)
  seen.clear()  # what making them has run
  pieces['decoder_heads']()
  assert seen == {'reward', 'pcont'}


def test_a_part_that_cannot_be_measured_ends_with_code_2():
  words = ['--task=toy_catch', '--behavior=planning', '--what=train']
  result = script(*words)
  assert result.returncode == 2
  assert 'toy_catch has discrete actions' in result.stderr
  assert 'failed' not in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  'words, message',
  [
    (['--what', 'trian'], 'did you mean train'),
    (['--task', 'dmc_walker_wlak'], 'dmc_walker_walk'),
    (['--json', '/proc/nowhere/report.json'], '/proc/nowhere'),
    (['--json', '/tmp'], 'is a folder; choose another name'),
    (['--batch_size', '3'], 'flags of dreamer.py come last, after --'),
    (['--', '--task=toy_catch'], '--task comes before --'),
    (['--', '--learner=free'], '--learner is of runs'),
    (['--', '--help'], 'python dreamer.py --help'),
    (['--', '--batch_size=0'], '--batch_size takes'),
  ],
)
def test_bad_input_is_an_error_with_exit_code_2(words, message, capfd):
  assert benchmark.main([*SMALL, *words]) == 2
  err = capfd.readouterr().err
  assert message in err and 'Traceback' not in err


def test_exit_code_is_that_of_the_process():
  result = script('--what=trian')
  assert result.returncode == 2
  assert 'did you mean train' in result.stderr
  assert 'Traceback' not in result.stderr
