"""Whole runs, in real processes."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import dreamer
import episode_files
import evaluate
import logger
import run_folders
import runfile
from agents import run_here
from logdirs import read_metrics
from processes import alive, wait_for

ROOT = pathlib.Path(dreamer.__file__).parent


def command(logdir, *flags):
  return [
    *(sys.executable, str(ROOT / 'dreamer.py'), '--logdir', str(logdir)),
    *flags,
  ]


@pytest.mark.slow
def test_debug_run_is_stopped_killed_and_resumed(tmp_path, capfd):
  """On a real control suite task, in a folder with all that names may have.

  With Keras set up for other work.
  """
  logdir = tmp_path / 'a [1]*? ~ü:%s.zip'
  flags = ('--preset', 'debug', '--task', 'dmc_cartpole_balance')
  keras = dict(floatx='float16', image_data_format='channels_first')
  (tmp_path / 'keras.json').write_text(json.dumps(dict(keras, backend='jax')))
  env = dict(os.environ, KERAS_HOME=str(tmp_path), KERAS_BACKEND='torch')
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  pipes['env'] = env
  # Killed without warning once it has saved.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  saved = 'checkpoints/ckpt-[2-9]*.index'  # the first two have no updates
  wait_for(lambda: list(logdir.glob(saved)), lambda: process.poll() is None)
  process.kill()
  process.communicate()
  # Resumed, and stopped by SIGTERM.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('Episode'):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  lines = ''.join(lines) + out
  assert process.returncode == 0
  assert re.search(r'Resumed at step [1-9]\d*, [1-9]\d* updates', lines)
  assert 'The same command resumes' in lines
  assert err == ''
  stopped = int(re.search(r'Stopped at step \d+, (\d+) updates', lines)[1])
  # Resumed again, to its end.
  before = dreamer.count_steps(
    logdir / 'episodes', dreamer.define_config(preset='debug')
  )
  process = subprocess.run(
    command(logdir, *flags, '--steps', str(before + 300)),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ''
  assert f'Resumed at step {before}, {stopped} updates' in process.stdout
  assert 'Found' in process.stdout
  assert 'Finished' in process.stdout
  assert f'other flags: --steps {before + 300} (was 100000).' in process.stdout
  check_logdir(logdir)
  # Evaluated, with pictures there too, and compared.
  words = ['--logdir', logdir, '--episodes=1', '--outdir', logdir / 'videos']
  assert evaluate.main([str(word) for word in words]) == 0
  assert f'step {before + 300}, ' in capfd.readouterr().out
  names = {path.name for path in (logdir / 'videos').iterdir()}
  assert {'behavior.gif', 'behavior.mp4', 'prediction.png'} <= names
  (run,) = run_folders.find_runs([logdir])
  assert run.steps[-1] >= before and len(run.scores) >= 2


def check_logdir(logdir):
  assert not list(logdir.rglob('*.tmp'))
  config = json.loads((logdir / 'config.json').read_text())['config']
  assert config['task'] == 'dmc_cartpole_balance'
  for path in logdir.glob('episodes/*.npz'):
    with np.load(path, allow_pickle=False) as episode:
      assert set(episode.files) == {
        *('image', 'action', 'reward', 'discount', 'position', 'velocity')
      }
      assert episode['image'].dtype == np.uint8
      assert episode['image'].shape == (51, 64, 64, 3)
      assert (episode['action'][0] == 0).all()
      assert path.stem.endswith('-51')
  keys = {k for line in read_metrics(logdir) for k in line}
  assert {
    *('step', 'train/return', 'train/length', 'test/return', 'test/length'),
    *('episodes', 'model_loss', 'image_loss', 'reward_loss', 'div', 'fps'),
    *('actor_loss', 'value_loss', 'model_grad_norm', 'action_ent'),
    *('action_ent_each', 'saturated', 'changes', 'real_value'),
    *('test_saturated', 'test_changes', 'test_real_value'),
  } <= keys
  images = set()
  for path in logdir.glob('events.*'):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        text = logger.METRICS[value.tag]  # all are in a group, and described
        assert value.metadata.summary_description == text
        if value.HasField('image'):
          images.add(value.tag)
          assert value.image.encoded_image_string[:6] == b'GIF89a'
  assert {'test/policy', 'agent/openl'} <= images


@pytest.fixture
def main(tmp_path, capsys):
  """Calls `dreamer.main` on a small run; returns exit code and output."""

  def call(*flags, task='toy_reach'):
    words = ['--logdir', str(tmp_path / 'run'), f'--task={task}']
    words += ['--preset=debug', '--precision=32', '--time_limit=50', *flags]
    words += ['--eval_every=1000', '--log_images=False']
    return run_here(words), ''.join(capsys.readouterr())

  return call


# Updates, where a test is of none of them in particular.
FEW = ('--pretrain=1', '--train_steps=1')


def test_learning_needs_episodes(main, tmp_path):
  code, text = main('--prefill=0')
  assert code == 2
  assert 'learning needs episodes' in text and '--prefill 0' in text
  assert 'Choose --batch_length' not in text


@pytest.mark.slow
def test_a_run_ends_with_all_its_steps_in_whole_episodes(tmp_path, capsys):
  """Of several environments some are in the middle of one."""
  words = [f'--logdir={tmp_path}', '--task=gym_CartPole-v1', '--preset=debug']
  words += ['--inputs=state', '--precision=32', '--envs=3', '--prefill=100']
  words += ['--batch_length=5', '--eval_every=50', '--steps=500', *FEW]
  assert run_here(words) == 0
  stored = episode_files.count_episodes(tmp_path / 'episodes')
  assert stored[1] >= 500
  capsys.readouterr()
  assert run_here(words) == 0
  assert 'Nothing was left to do' in capsys.readouterr().out
  assert episode_files.count_episodes(tmp_path / 'episodes') == stored


@pytest.mark.slow
def test_a_replay_that_is_full_at_the_start_and_learning_from_it(
  main, tmp_path
):
  code, text = main('--steps=200', '--prefill=200')
  assert code == 0
  assert 'Finished at step 200, 0 updates. Nothing was learned' in text
  assert '--steps more than 200, and --pretrain' in text
  # As it says.
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0 and 'Finished at step 250, 2 updates.\n' in text
  assert 'other flags: --steps 250 (was 200), --pretrain 2 (was 5).' in text
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0
  assert 'Nothing was left to do; a larger --steps goes on.' in text
  assert 'other flags' not in text
  assert_never_begins_anew(main, tmp_path / 'run')


def assert_never_begins_anew(main, logdir):
  """Whatever is left of checkpoints: nothing is overwritten, exit code 2."""
  folder = logdir / 'checkpoints'
  config = (logdir / 'config.json').read_bytes()
  shutil.copytree(folder, logdir.parent / 'good')
  for path in folder.glob('*.index'):
    path.write_bytes(path.read_bytes()[:-9])
  flags = ('--steps=300', '--prefill=200', '--pretrain=2')
  for _ in range(2):
    code, text = main(*flags)
    assert code == 2
    assert 'has learned, but no checkpoint with its weights' in text
  assert (logdir / 'config.json').read_bytes() == config
  aside = {p.name for p in folder.glob('*.broken')}
  assert len(aside) == 4 and not list(folder.glob('*.index'))
  # From metrics.jsonl alone it is known, too.
  shutil.rmtree(folder)
  code, text = main(*flags)
  assert code == 2 and 'Put whole files ckpt-*' in text
  # As it says: files from elsewhere, or anew.
  shutil.copytree(logdir.parent / 'good', folder, dirs_exist_ok=True)
  code, text = main(*flags)
  assert code == 0 and 'Resumed at step 250, 2 updates' in text
  shutil.rmtree(folder)
  (logdir / 'metrics.jsonl').rename(logdir.parent / 'old.jsonl')
  code, text = main(*flags, '--steps=350')
  assert code == 0 and 'Resumed' not in text
  assert 'Finished at step 350, 2 updates' in text


@pytest.mark.slow
def test_short_episodes_are_said_once(main, tmp_path):
  code, text = main(
    *('--steps=220', '--prefill=120', '--pretrain=1', '--train_steps=1'),
    task='gym_user_envs:Changing-v0',
  )
  assert code == 0, text
  assert text.count('have fewer rows than --batch_length 10') == 1
  assert re.search(r'Warning: [1-9]\d* of [1-9]\d* episodes have', text)


@pytest.mark.slow
def test_environment_that_cannot_be_made_again_saves_the_run(main, tmp_path):
  code, text = main(
    *('--steps=1000', '--prefill=60', '--pretrain=2', '--train_steps=0'),
    *('--env_args', json.dumps({'path': str(tmp_path / 'gone')})),
    task='gym_user_envs:Gone-v0',
  )
  assert code == 2, text
  assert re.search(r'Stopped at step \d+, 2 updates; saved to', text), text


@pytest.mark.slow
def test_an_error_in_the_first_evaluation_drops_its_episode(main, tmp_path):
  code, text = main(
    *('--steps=20', '--prefill=10', '--batch_length=4', *FEW),
    *('--env_args', json.dumps({'path': str(tmp_path / 'used')})),
    task='gym_user_envs:FlakyEvaluation-v0',
  )
  assert code == 0, text
  assert text.count('The environment failed: the motor is hot') == 1
  assert 'Evaluation: return 5.0' in text


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_environments_start_ends_a_run_that_resumes(
  main, tmp_path, number
):
  seconds, pid = tmp_path / 'seconds', tmp_path / 'seconds.pid'
  args = ['--env_args', json.dumps({'path': str(seconds)}), *FEW]
  args += ['--prefill=20', '--batch_length=8', '--eval_episodes=0']
  task = 'gym_user_envs:SlowAgain-v0'
  seconds.write_text('0')
  assert main('--steps=40', *args, task=task)[0] == 0
  before = {p: p.stat().st_size for p in tmp_path.glob('run/*/*')}
  pid.unlink()
  seconds.write_text('600')
  args += ['--steps=60', '--preset=debug', '--time_limit=50', f'--task={task}']
  path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
  process = subprocess.Popen(
    command(tmp_path / 'run', *args, '--precision=32'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': path},
  )
  try:
    wait_for(
      lambda: pid.exists() and pid.read_text(), lambda: process.poll() is None
    )
    time.sleep(1)  # until it is waited for
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
    process.wait()
  assert (process.returncode, err) == (0, ''), out
  assert 'Stopped at once; the same command resumes' in out
  assert not alive(int(pid.read_text()))
  assert {p: p.stat().st_size for p in tmp_path.glob('run/*/*')} == before
  seconds.write_text('0')
  code, text = main('--steps=60', *args, task=task)
  assert code == 0 and 'Resumed at step 40, ' in text, text


@pytest.mark.slow
def test_what_exists_once_is_trained_on_without_evaluations(main):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    args = json.dumps({'port': taken.getsockname()[1]})
  flags = [f'--env_args={args}', '--prefill=20', '--steps=40', *FEW]
  task = 'gym_user_envs:OnePort-v0'
  code, text = main(*flags, '--eval_episodes=1', task=task)
  assert code == 2 and 'Address already in use' in text
  flags += ['--eval_every=10', '--batch_length=8']
  code, text = main(*flags, '--eval_episodes=0', task=task)
  assert code == 0 and 'Finished at step 40' in text, text
  assert 'Evaluation' not in text


@pytest.mark.slow
@pytest.mark.parametrize('envs', [0, 1])
def test_environments_that_differ(main, tmp_path, envs):
  """The one for evaluations, and one that takes over beside learning."""
  path, flags = tmp_path / 'made', ['--pretrain=2', '--train_steps=0']
  code, text = main(
    *('--steps=100', '--prefill=10', '--inputs=state', '--batch_length=4'),
    *(f'--eval_episodes={1 - envs}', *flags),
    *('--env_args', json.dumps({'path': str(path)})),
    task='gym_user_envs:Growing-v0',
  )
  assert code == 2 and 'Traceback' not in text.split('Warning')[0], text
  assert re.search(r'error: environment t\w+ 0 shows .*state \[2\]', text)
  made = list(tmp_path.glob('run/episodes/*'))
  assert len(made) == 3 * envs and all(x.suffix == '.npz' for x in made)
  saved = re.search(r'Stopped at step \d+, 2 updates; saved to', text)
  assert bool(saved) == bool(envs)


@pytest.mark.slow
def test_environment_that_cannot_start(tmp_path):
  """No OpenGL at all: one clear message, exit code 2, no traceback."""
  result = subprocess.run(
    command(tmp_path / 'run', '--preset', 'debug'),
    capture_output=True,
    text=True,
    env={**os.environ, 'MUJOCO_GL': 'nonsense'},
  )
  assert result.returncode == 2
  assert 'MUJOCO_GL' in result.stderr
  assert 'Traceback' not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, words',
  [
    (['--task', 'gym_CartPol-v1'], 'did you mean CartPole-v1'),
    (['--task', 'gym_no_such_module:X-v0'], "'no_such_module'"),
    (['--task', 'atari_pong', '--action_dist', 'tanh_normal'], 'is onehot'),
  ],
)
def test_what_only_the_environment_knows_is_a_clear_error(main, flags, words):
  code, text = main(*flags)
  assert code == 2, text
  assert words in text and 'Traceback' not in text


# fmt: off
@pytest.mark.parametrize(('flags', 'words'), [
  (['--inputs', 'orientation'], 'orientations'),
  (['--inputs', 'image_2'], 'it has image, height, orientations'),
  (['--inputs', ''], '--inputs takes names'),
  (['--inputs', 'image,,state'], '--inputs takes names'),
  (['--cameras', '0,9'], 'has the cameras 0 to 1'),
  (['--cameras', 'left'], '--cameras takes a whole number'),
  (['--record', 'imag'], 'image'),
])
# fmt: on
@pytest.mark.slow
def test_bad_inputs_end_with_one_message(main, flags, words):
  code, text = main(*flags, task='dmc_walker_walk')
  assert code == 2, text
  assert words in text and 'Traceback' not in text


@pytest.mark.slow
def test_flags_that_cannot_be_are_not_kept(main, tmp_path):
  """A mistake in the first command is no hindrance to the second."""
  code, error = main('--behavior=planning', task='toy_catch')
  assert code == 2 and '--behavior' in error
  few = (*FEW, '--prefill=100', '--steps=120')
  code, error = main('--batch_length=8', *few, task='toy_catch')
  assert code == 0, error


@pytest.mark.slow
def test_episodes_of_another_task_are_left_alone(main, tmp_path):
  """Though the config.json that says so is broken."""
  few = (*FEW, '--time_limit=40', '--prefill=40')
  assert main('--steps=80', *few, task='toy_reach')[0] == 0
  path = next(tmp_path.rglob('config.json'))
  path.write_text(path.read_text()[:100])
  episodes = sorted(path.parent.glob('episodes/*.npz'))
  code, error = main('--steps=80', task='toy_catch')
  assert code == 2 and 'are of another task' in error
  assert sorted(path.parent.glob('episodes/*.npz')) == episodes
  code, error = main('--steps=120', *few, task='toy_reach')
  assert code == 0, error


@pytest.mark.slow
def test_output_that_nobody_takes_ends_a_run(tmp_path):
  """It is not the logdir that fails."""
  words = f'--logdir={tmp_path} --task=toy_reach --preset=debug'
  taken = f'{sys.executable} dreamer.py {words} | head -1'
  root = pathlib.Path(dreamer.__file__).parent
  done = subprocess.run(taken, shell=True, cwd=root, capture_output=True)
  assert b'error: standard output: Broken pipe' in done.stderr


@pytest.mark.slow
def test_output_to_a_full_disk_ends_a_run_saved(main, tmp_path, monkeypatch):
  """After updates that no checkpoint had."""

  def write(self, line, file=None):
    if 'at step 600' in line:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  few = (*FEW, '--time_limit=50', '--prefill=200', '--train_every=50')
  monkeypatch.setattr('tqdm.tqdm.write', write)
  code, error = main('--steps=1000', *few, task='toy_reach')
  assert code == 1 and 'standard output: No space left' in error
  logdir = next(tmp_path.rglob('config.json')).parent
  saved = max(runfile.checkpoint_numbers(logdir / 'checkpoints'))
  assert saved >= updates_of(logdir) > 4


@pytest.mark.slow
def test_learns_on_though_episodes_are_gone(main, tmp_path):
  """What is due follows from those that are left."""
  few = (*FEW, '--time_limit=50', '--prefill=200', '--train_every=50')
  assert main('--steps=500', *few, task='toy_reach')[0] == 0
  logdir = next(tmp_path.rglob('config.json')).parent
  before = updates_of(logdir)
  assert before == 6  # at 200, 250, ..., 450 steps
  for path in sorted(logdir.glob('episodes/*.npz'))[:6]:
    path.unlink()
  assert main('--steps=500', *few, task='toy_reach')[0] == 0
  assert updates_of(logdir) == before + 5  # again from 250 on


def updates_of(logdir):
  return max(line.get('updates', 0) for line in read_metrics(logdir))
