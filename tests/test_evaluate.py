"""Evaluation: real small runs, then the script as users call it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import imageio.v3 as imageio
import numpy as np
import pytest

import evaluate
from agents import run_here
from logdirs import read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def script(name, *words, **kwargs):
  command = [sys.executable, str(ROOT / name), *map(str, words)]
  return subprocess.run(command, capture_output=True, text=True, **kwargs)


def train(logdir, *flags):
  words = ['--preset=debug', '--precision=32', '--steps=500', '--pretrain=2']
  words += ['--log_images=False', *flags]
  assert run_here([f'--logdir={logdir}', *words]) == 0
  return logdir


@pytest.fixture(scope='module')
def cartpole(tmp_path_factory):
  """A run on the control suite that explores even in evaluations."""
  folder = tmp_path_factory.mktemp('cartpole') / 'run'
  return train(folder, '--task=dmc_cartpole_balance', '--eval_noise=1')


def test_numbers_that_an_environment_tells(tmp_path, capsys):
  """A run logs them, and an evaluation prints and writes them."""
  logdir = train(
    tmp_path / 'run',
    *('--task=gym_user_envs:Telling-v0', '--log_info=success', '--seed=1'),
    *('--inputs=image', '--eval_every=250', '--prefill=100', '--time_limit=20'),
    *('--batch_length=5', '--eval_episodes=2', '--env_errors=stop'),
  )
  told = {
    name: [x[name] for x in read_metrics(logdir) if name in x]
    for part in ('train', 'test')
    for name in (f'{part}/success', f'{part}/success_max')
  }
  assert set(told['train/success']) == {0.0}
  assert told['train/success_max'] == [1.0, 0.0] * 25
  assert told['test/success_max'] == [1.0, 0.0] * 2
  capsys.readouterr()
  words = [f'--logdir={logdir}', '--episodes=4', f'--json={tmp_path}/a.json']
  assert evaluate.main(words) == 0
  assert 'success_max: mean 0.5 of 4 episodes' in capsys.readouterr().out
  told = json.loads((tmp_path / 'a.json').read_text())['info']
  assert told == dict(success=[0.0] * 4, success_max=[1.0, 0.0] * 2)


@pytest.fixture
def copy(cartpole, tmp_path):
  return shutil.copytree(cartpole, tmp_path / 'moved')


def report_of(logdir, tmp_path, *words):
  """What the script prints, and its figures."""
  path = tmp_path / 'report.json'
  result = script('evaluate.py', f'--logdir={logdir}', f'--json={path}', *words)
  assert (result.returncode, result.stderr) == (0, '')
  return result.stdout, json.loads(path.read_text())


def figures_of(logdir, tmp_path, *words):
  """Figures of an evaluation in this process."""
  path = tmp_path / 'report.json'
  assert not evaluate.main([f'--logdir={logdir}', f'--json={path}', *words])
  return json.loads(path.read_text())


def contents(folder):
  return {
    p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes())
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


def change_config(logdir, **changes):
  path = logdir / 'config.json'
  record = json.loads(path.read_text())
  record['config'].update(changes)
  path.write_text(json.dumps(record))


def test_report_and_videos(copy, tmp_path):
  # Nothing but the configuration and the checkpoints is needed.
  shutil.rmtree(copy / 'episodes')
  before, outdir = contents(copy), tmp_path / 'new/videos'
  out, report = report_of(copy, tmp_path, '--episodes=3', f'--outdir={outdir}')
  assert contents(copy) == before
  assert (report['task'], report['step']) == ('dmc_cartpole_balance', 500)
  assert (report['method'], report['seed']) == ('dreamer', 0)
  assert report['updates'] == 2 and report['lengths'] == [100, 100, 100]
  returns = report['returns']
  assert len(set(returns)) == 3  # three starts
  assert report['mean'] == pytest.approx(np.mean(returns))
  assert report['std'] == pytest.approx(np.std(returns))
  for index, value in enumerate(returns):
    assert f'Episode {index + 1} of 3: return {value:.1f} in 100 steps' in out
  assert f'mean {np.mean(returns):.1f}' in out

  gif = imageio.imread(outdir / 'behavior.gif', index=None)
  assert gif.shape == (51, 64, 3 * 64, 3)  # rows of an episode, 3 of them
  mp4 = imageio.imread(outdir / 'behavior.mp4', plugin='FFMPEG')
  assert mp4.shape == gif.shape
  assert np.abs(mp4.astype(int) - gif).mean() < 10
  assert np.abs(np.diff(gif.astype(int), axis=0)).max() > 30  # it moves

  gif = imageio.imread(outdir / 'prediction.gif', index=None).astype(int)
  assert gif.shape == (50, 3 * 64, 3 * 64, 3)
  mp4 = imageio.imread(outdir / 'prediction.mp4', plugin='FFMPEG')
  assert mp4.shape == gif.shape
  truth, model, error = np.split(gif, 3, 1)
  expected = (model - truth + 255) / 2
  assert np.abs(error - expected).mean() < 3  # GIFs have 256 colors
  # The truth is of these episodes: somewhere in their video, in order.
  video = imageio.imread(outdir / 'behavior.gif', index=None).astype(int)
  for one in range(3):
    place = slice(64 * one, 64 * one + 64)
    gaps = [
      np.abs(video[start : start + 50, :, place] - truth[:, :, place]).mean()
      for start in range(2)
    ]
    assert min(gaps) < 2

  strips = imageio.imread(outdir / 'prediction.png')[..., :3]
  assert strips.shape[:2] == (960, 1000)  # 3 sequences of 10 images each
  assert len(np.unique(strips.reshape(-1, 3), axis=0)) > 1000
  names = {p.name for p in outdir.iterdir()}
  assert names == {
    *('behavior.gif', 'behavior.mp4', 'prediction.gif', 'prediction.mp4'),
    'prediction.png',
  }


def test_what_cannot_be_written_costs_no_figures(copy, tmp_path):
  """Nor does a program that is missing cost the pictures."""
  outdir, path = tmp_path / 'videos', tmp_path / 'report.json'
  (outdir / 'prediction.png').mkdir(parents=True)
  words = [f'--logdir={copy}', '--episodes=1', f'--outdir={outdir}']
  env = dict(os.environ, IMAGEIO_FFMPEG_EXE='/nowhere/ffmpeg')
  result = script('evaluate.py', *words, f'--json={path}', env=env)
  assert result.returncode == 2
  check_error(result.stderr, f"Is a directory: '{outdir}/prediction.png'")
  assert len(json.loads(path.read_text())['returns']) == 1
  names = {p.name for p in outdir.iterdir()}
  assert names == {'behavior.gif', 'prediction.gif', 'prediction.png'}
  assert result.stdout.count('.mp4: pip install imageio-ffmpeg') == 2


def test_same_seed_same_returns_without_noise(copy, tmp_path):
  words = ('--episodes=2', '--seed=3')
  first = figures_of(copy, tmp_path, *words)
  change_config(copy, eval_noise=0.0, seed=8)
  assert figures_of(copy, tmp_path, *words) == first
  other = figures_of(copy, tmp_path, '--episodes=2', '--seed=4')
  assert other['returns'] != first['returns']


@pytest.mark.parametrize(
  'flags, method, pictures',
  [
    (
      ('toy_catch', '--representation=contrastive', '--behavior=actor'),
      'dreamer-actor-contrastive',
      {'behavior.gif', 'behavior.mp4', 'prediction.png'},
    ),
    (
      (
        *('toy_reach', '--behavior=planning', '--plan_candidates=100'),
        *('--plan_horizon=4', '--plan_iterations=2'),
      ),
      'planet',
      {
        *('behavior.gif', 'behavior.mp4', 'prediction.png'),
        *('prediction.gif', 'prediction.mp4'),
      },
    ),
  ],
)
def test_other_methods_and_tasks(tmp_path, flags, method, pictures):
  task, *flags = flags
  flags += ['--steps=450', '--parallel=none']
  logdir = train(tmp_path / 'run', f'--task={task}', *flags)
  outdir = tmp_path / 'videos'
  words = ('--episodes=1', f'--outdir={outdir}')
  report = figures_of(logdir, tmp_path, *words)
  assert (report['task'], report['method']) == (task, method)
  assert len(report['returns']) == 1
  assert {p.name for p in outdir.iterdir()} == pictures
  picture = imageio.imread(outdir / 'prediction.png')
  assert picture.shape[0] > 100 and picture.std() > 10


def test_beside_a_training_run(copy, tmp_path):
  """A run that replaces its checkpoint at every update goes on unharmed."""
  command = [sys.executable, str(ROOT / 'dreamer.py'), f'--logdir={copy}']
  command += ['--preset=debug', '--task=dmc_cartpole_balance']
  command += ['--precision=32', '--steps=1e5', '--save_every=0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      for line in process.stdout:
        if line.startswith('First update'):
          break
      _, report = report_of(copy, tmp_path, '--episodes=1')
      assert report['updates'] > 2
      assert process.poll() is None
      time.sleep(1)
      process.terminate()
      rest = process.stdout.read()
      assert process.wait(60) == 0, rest
      assert 'The same command resumes' in rest
    finally:
      process.kill()


@pytest.mark.parametrize(
  'kind, message',
  [
    ('missing', 'is not the logdir of a run: there is no config.json'),
    ('no checkpoint', 'has no checkpoint yet'),
    ('newer format', 'is of another version of this code (format)'),
    ('newer flag', 'is of another version of this code (flags telepathy)'),
    ('other network', 'was not made by this version of the code'),
    ('broken', 'is not readable as the configuration of a run'),
    ('other inputs', 'the environment has changed: it shows'),
    ('no task', 'does not say its task, preset, inputs'),
    ('no episodes', '--episodes takes a whole number from 1'),
    ('unwritable', 'cannot write'),
    ('one name for two', '/o is a folder; choose another name for the file'),
    ('all cut short', 'is whole'),
    ('two at once', '--export writes a SavedModel and evaluates nothing'),
  ],
)
def test_bad_input(copy, kind, message, capfd):
  words = ['--episodes=1']
  path = copy / 'config.json'
  if kind == 'missing':
    path.unlink()
  elif kind == 'no checkpoint':
    shutil.rmtree(copy / 'checkpoints')
  elif kind == 'newer format':
    path.write_text(json.dumps(dict(json.loads(path.read_text()), format=2)))
  elif kind == 'newer flag':
    change_config(copy, telepathy=True)
  elif kind == 'other network':
    change_config(copy, num_units=17)
  elif kind == 'broken':
    path.write_text('{"config": ')
  elif kind == 'other inputs':
    record = dict(json.loads(path.read_text()), observations=dict(state=[9]))
    path.write_text(json.dumps(record))
  elif kind == 'no task':
    path.write_text('{"config": {"seed": 0}}')
  elif kind == 'no episodes':
    words = ['--episodes=0']
  elif kind == 'unwritable':
    words += ['--outdir=/proc/nowhere']
  elif kind == 'one name for two':
    words += [f'--outdir={copy}/o', f'--json={copy}/o']
  elif kind == 'all cut short':
    for file in copy.glob('checkpoints/ckpt-*.data*'):
      file.write_bytes(file.read_bytes()[:100])
  elif kind == 'two at once':
    words += [f'--export={copy}/model', f'--outdir={copy}/videos']
  assert evaluate.main([f'--logdir={copy}', *words]) == 2
  out, err = capfd.readouterr()
  check_error(err, message)
  warned = [line for line in out.splitlines() if line.startswith('Warning')]
  assert len(warned) == len(set(warned))


def test_a_logdir_that_is_misspelt_is_not_made(tmp_path):
  words = [f'--logdir={tmp_path}/nix', f'--outdir={tmp_path}/nix/videos']
  assert evaluate.main(words) == 2
  assert not (tmp_path / 'nix').exists()


def test_a_video_that_ffmpeg_refuses_costs_the_gif_nothing(tmp_path, capsys):
  frames = np.zeros((3, 16, 20000, 3), np.uint8)
  evaluate.write_video(tmp_path / 'wide', frames)
  assert [p.name for p in tmp_path.iterdir()] == ['wide.gif']
  out = capsys.readouterr().out
  assert 'wide.mp4: ffmpeg makes no video of images of 16 by 20000 pix' in out


def check_error(text, message):
  assert message in text
  assert 'Traceback' not in text and 'WARNING' not in text


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(num_units=17), 'was not made by this version of the code'),
    (dict(telepathy=True), 'is of another version of this code'),
  ],
)
def test_bad_input_ends_the_process_with_code_2(copy, changes, message):
  change_config(copy, **changes)
  result = script('evaluate.py', f'--logdir={copy}', '--episodes=1')
  assert result.returncode == 2, result.stderr
  check_error(result.stderr, message)


# Of vectors, and nothing to render.
BARE = """
import gymnasium
import numpy as np

class Bare(gymnasium.Env):
  observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
  action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

  def reset(self, seed=None, options=None):
    self.place = np.zeros(2, np.float32)
    return self.place, {}

  def step(self, action):
    self.place = self.place + action
    return self.place, 1.0, False, False, {}

class Blind(Bare):
  metadata = {'render_modes': ['rgb_array']}

  def __init__(self, render_mode=None):
    self.render_mode = render_mode

  def render(self):
    raise RuntimeError('no display')

gymnasium.register('Bare-v0', entry_point=Bare)
gymnasium.register('Blind-v0', entry_point=Blind)
"""


@pytest.mark.parametrize(
  'task, why',
  [
    ('dmc_cartpole_balance', ''),
    ('gym_bare:Bare-v0', 'cannot be used: NotImplementedError'),
    ('gym_bare:Blind-v0', 'no display'),
  ],
)
def test_videos_of_a_run_from_vectors(tmp_path, monkeypatch, task, why):
  """Without a worker; of what can be rendered in one, or not at all."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'bare.py').write_text(BARE)
  words = ['--preset=debug', '--precision=32', '--steps=450', '--pretrain=2']
  words += [f'--task={task}', '--inputs=state', '--parallel=none']
  result = script('dreamer.py', '--logdir=run', *words)
  assert result.returncode == 0, result.stderr
  words = ['--logdir=run', '--episodes=1', '--outdir=videos']
  result = script('evaluate.py', *words)
  assert (result.returncode, result.stderr) == (0, '')
  video = [] if why else ['behavior.gif', 'behavior.mp4']
  names = sorted(p.name for p in (tmp_path / 'videos').iterdir())
  assert [n for n in names if n.startswith('behavior')] == video
  assert any(n.startswith('prediction') for n in names)
  assert ('No video: ' in result.stdout) is bool(why)
  assert why in result.stdout


def test_a_lost_worker_repeats_no_episode(tmp_path, monkeypatch):
  logdir = train(tmp_path / 'run', '--task=toy_reach', '--parallel=process')
  record, starts, killed = evaluate.Recorder.__call__, set(), []

  def kill_once(self, episode):
    record(self, episode)
    starts.add(episode['image'][0].tobytes())
    if len(self.returns) == 3 and not killed:
      tasks = pathlib.Path('/proc/self/task').glob('*/children')
      for child in ' '.join(path.read_text() for path in tasks).split():
        killed.append(os.kill(int(child), signal.SIGKILL))

  monkeypatch.setattr(evaluate.Recorder, '__call__', kill_once)
  figures_of(logdir, tmp_path, '--episodes=6')
  assert killed and len(starts) == 6
