"""Runs that are killed, starved or fed with nonsense, in real processes."""

import contextlib
import errno
import json
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import tensorflow as tf

import checkpoints
import cli
import evaluate
import file_io
import runfile
import soak
from logdirs import everything, read_episodes, read_metrics
from processes import command, run, run_until, wait_for

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


SLOW = '--slow_value=0.1'  # a run keeps it
EXACT = (
  *('--deterministic=True', '--steps=600', '--log_every=150'),
  *('--eval_every=150', '--save_every=0', '--train_every=30', SLOW),
)


@pytest.fixture(scope='module', params=['toy_reach', 'dmc_cartpole_balance'])
def whole(request, tmp_path_factory):
  """A task, and the logdir of a run of it that was never interrupted."""
  logdir = tmp_path_factory.mktemp('whole') / request.param
  result = run(logdir, *EXACT, '--seed=3', task=request.param)
  assert result.returncode == 0, result.stderr
  return request.param, logdir


@pytest.mark.parametrize('pipe', ['', '| cat'])
def test_a_run_whose_terminal_is_closed_saves(tmp_path, pipe):
  """Its output goes nowhere then, and what reads it ends as well."""
  logdir, flags = tmp_path / 'run', ('--eval_every=100000', '--train_every=20')
  words = shlex.join(command(logdir, '--steps=100000', *flags))
  pid, terminal = pty.fork()
  if not pid:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as under nohup
    os.execv('/bin/bash', ['bash', '-c', f'{words} {pipe}; true'])
  with open(terminal, 'rb') as out:
    while b'at step 600' not in out.readline():
      pass
  os.waitpid(pid, 0)
  wait_for(lambda: is_free(logdir))
  steps = 50 * len(read_episodes(logdir)) + 100
  done = run(logdir, f'--steps={steps}', *flags)
  resumed = re.search(r'Resumed at step \d+, (\d+) updates', done.stdout)
  assert int(resumed[1]) > 20  # the first checkpoint has none


def is_free(logdir):
  with contextlib.suppress(cli.UserError), checkpoints.locked(logdir, 'both'):
    return True
  return False


def test_exact_resume(tmp_path, whole):
  """Interrupted again and again, or never: the same to the last bit."""
  task, logdir = whole
  parts = tmp_path / 'parts'
  places = [
    ('at step 200', signal.SIGTERM),  # in the prefill
    ('First update', signal.SIGKILL),
  ]
  if task != 'toy_reach':
    places = [('at step 500', signal.SIGKILL)]
  for words, number in places:
    run_until(parts, words, number, *EXACT, '--seed=3', task=task)
    if words == 'at step 200':  # as if it were killed just before this line
      path = parts / 'metrics.jsonl'
      lines = path.read_text().splitlines(keepends=True)
      path.write_text(''.join(lines[:-1]))
  # One that had ended goes on as if it had not, with updates before and after.
  shorter = [x.replace('600', '500') for x in EXACT]
  assert run(parts, *shorter, '--seed=3', task=task).returncode == 0
  assert run(parts, *EXACT, '--seed=3', task=task).returncode == 0
  metrics, episodes, weights = everything(logdir)
  again = everything(parts)
  assert metrics == again[0]
  assert episodes == again[1] and len(episodes) in (6, 12)
  assert weights == again[2] and len(weights) > 100
  assert sum('model_loss' in line for line in metrics) >= 2
  assert sum('test/return' in line for line in metrics) >= 1


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """The logdir of a run of toy_reach with another seed."""
  logdir = tmp_path_factory.mktemp('other') / 'run'
  assert run(logdir, *EXACT, '--seed=4').returncode == 0
  return logdir


@pytest.mark.parametrize('whole', ['toy_reach'], indirect=True)
def test_another_seed_is_another_run(whole, other):
  pairs = list(zip(everything(whole[1]), everything(other), strict=True))
  assert all(first != second for first, second in pairs)
  assert all(x != y for x, y in zip(*pairs[1], strict=True))


def test_exact_run_takes_back_nothing_of_another(tmp_path, other):
  """What runs that are not exact made after the checkpoint stays.

  Here one that was killed before it had looked at the checkpoint, and an actor
  without a learner.
  """
  logdir = tmp_path / 'run'
  shutil.copytree(other, logdir)
  flags = (SLOW, '--deterministic=False', '--steps=900', '--prefill=900')
  run_until(logdir, 'at step 650', signal.SIGKILL, *flags)
  free = ('--learner=free', '--role=act', '--deterministic=False')
  result = run(logdir, SLOW, '--steps=750', *free)
  assert result.returncode == 0, result.stderr
  made = {p.name for p in logdir.glob('episodes/*.npz')}
  assert len(made) >= 13
  longer = [x.replace('600', '800') for x in EXACT]
  result = run(logdir, *longer, '--seed=4')
  assert result.returncode == 0, result.stderr
  assert '3 episodes newer than its checkpoint stay.' in result.stdout
  assert made <= {p.name for p in logdir.glob('episodes/*.npz')}


def test_kills_at_random_times(tmp_path):
  """A short soak; `tests/soak.py` runs for hours."""
  run = soak.Soak(tmp_path / 'run', seed=1)
  try:
    run.start()
    for _ in range(3):
      run.kill()
    run.finish()
  finally:
    run.close()
  assert run.counts['trainer'] >= 1 and run.counts['worker'] >= 1
  assert len(read_episodes(tmp_path / 'run')) >= 8
  lines = read_metrics(tmp_path / 'run')
  assert sum('resumed' in line for line in lines) == run.counts['starts'] - 1


def ray_actors(trainer):
  """Process ids of the actors of the Ray that a trainer has started."""
  children = pathlib.Path(f'/proc/{trainer}/task/{trainer}/children')
  sessions = [int(pid) for pid in children.read_text().split()]
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    with contextlib.suppress(OSError):
      pid = int(path.parent.name)
      if os.getsid(pid) in sessions and b'Environment' in path.read_bytes():
        found.append(pid)
  return sorted(found)


def test_ray_run_goes_on_without_a_killed_actor(tmp_path):
  """And is stopped by a signal to its process group, as from `timeout`."""
  flags = ('--parallel=ray', '--envs=2')
  process = subprocess.Popen(
    command(tmp_path / 'run', *flags, '--steps=1e9'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    lines = []
    for wanted in ('First update', 'a fresh worker takes over', 'Episode'):
      while wanted not in (line := process.stdout.readline()):
        assert line, (lines, process.stderr.read())
        lines.append(line)
      actors = ray_actors(process.pid)
      if wanted == 'First update':
        assert len(actors) == 3
        for pid in actors:
          maps = pathlib.Path(f'/proc/{pid}/maps').read_text()
          assert 'numpy' in maps and 'tensorflow' not in maps
        os.kill(actors[0], signal.SIGKILL)
    assert len(actors) == 3
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
    process.wait()
  assert (process.returncode, err) == (0, '')
  assert 'Warning: The environment worker died: ' in ''.join(lines)
  assert 'raylet' not in ''.join(lines) + out
  assert 'Stopped at step' in out and 'The same command resumes' in out
  assert not any(os.path.exists(f'/proc/{pid}') for pid in actors)
  # It resumes, and ends by itself.
  count = len(read_episodes(tmp_path / 'run'))
  steps = 50 * (count + 4)
  result = run(tmp_path / 'run', *flags, f'--steps={steps}')
  assert (result.returncode, result.stderr) == (0, '')
  assert f'Resumed at step {50 * count},' in result.stdout
  assert f'Finished at step {steps}' in result.stdout
  assert len(read_episodes(tmp_path / 'run')) == count + 4


def spoil_config(logdir):
  (logdir / 'config.json').write_text('{"config": {"ta')
  return 'config.json.broken'


def lose_config(logdir):
  (logdir / 'config.json').unlink()


def spoil_checkpoint(logdir):
  paths = logdir.glob('checkpoints/ckpt-*.data*')
  newest = max(paths, key=lambda p: int(p.name.split('.')[0][5:]))
  newest.write_bytes(newest.read_bytes()[:1000])
  return f'{newest.name}.broken'


def spoil_episode(logdir):
  path = sorted(logdir.glob('episodes/*.npz'))[1]
  path.write_bytes(path.read_bytes()[:-3000])
  return f'{path.name}.broken'


def spoil_metrics(logdir):
  with (logdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5')


@pytest.mark.parametrize('whole', ['toy_reach'], indirect=True)
@pytest.mark.parametrize('spoil_flags', [spoil_config, lose_config])
def test_run_goes_on_from_what_is_sound(whole, spoil_flags, tmp_path):
  """All four kinds of damage at once."""
  logdir = tmp_path / 'run'
  shutil.copytree(whole[1], logdir)
  spoilers = (spoil_flags, spoil_checkpoint, spoil_episode, spoil_metrics)
  aside = [name for name in (spoil(logdir) for spoil in spoilers) if name]
  result = run(logdir, '--steps=700')
  assert result.returncode == 0, result.stderr
  assert 'Resumed at step 550, ' in result.stdout  # 50 were in the episode
  assert 'Finished at step 700' in result.stdout
  present = {p.name for p in logdir.rglob('*.broken')}
  assert set(aside) <= present
  for name in aside:
    assert name.split('.')[0] in result.stdout
  assert json.loads((logdir / 'config.json').read_text())['config']['steps']
  assert all('step' in line for line in read_metrics(logdir))
  assert run(logdir, '--steps=700').returncode == 0  # nothing is left over


def test_two_trainers_on_one_logdir(tmp_path):
  logdir = tmp_path / 'run'
  first = subprocess.Popen(
    command(logdir, '--steps=1e9'), stdout=subprocess.PIPE, text=True
  )
  try:
    while 'Prefill' not in (line := first.stdout.readline()):
      assert line
    before = (logdir / 'config.json').stat().st_mtime_ns
    second = run(logdir)
    assert second.returncode == 2
    assert f'is in use by process {first.pid} on' in second.stderr
    assert 'Traceback' not in second.stderr
    assert (logdir / 'config.json').stat().st_mtime_ns == before
    assert first.poll() is None
  finally:
    first.kill()
    first.wait()
  after = run(logdir, '--steps=200', '--prefill=200')
  assert after.returncode == 0
  assert f'from process {first.pid} on' in after.stdout  # taken over


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 6 MB that can be made larger, or read-only."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a file system is not permitted here')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def remount(folder, option):
  subprocess.run(['mount', '-o', f'remount,{option}', str(folder)], check=True)


def test_full_and_read_only_disks(small_disk):
  logdir = small_disk / 'run'
  result = run(logdir, '--steps=5000')
  assert result.returncode == 1
  assert 'No space left on device' in result.stderr
  assert 'Traceback' not in result.stderr
  episodes = read_episodes(logdir)  # all are whole
  assert episodes and not list(logdir.rglob('.*.tmp'))
  remount(small_disk, 'ro')
  result = run(logdir)
  assert result.returncode == 2
  assert f'cannot write to --logdir {logdir}: Read-only' in result.stderr
  remount(small_disk, 'rw,size=60m')
  result = run(logdir, '--steps=700')
  assert result.returncode == 0, result.stderr
  assert read_episodes(logdir)[: len(episodes)] == episodes


def test_export_to_a_full_disk(small_disk, capsys):
  walker = ROOT / 'scores/trained/walker_walk'
  target, words = small_disk / 'model', [f'--logdir={walker}']
  remount(small_disk, 'size=100k')
  assert evaluate.main([*words, f'--export={target}']) == 1
  assert f'cannot write to {target}' in capsys.readouterr().err
  assert not list(target.iterdir())
  remount(small_disk, 'size=60m')
  for _ in range(2):
    assert evaluate.main([*words, f'--export={target}']) == 0
    names = {path.name for path in target.iterdir()}
    assert {'agent.json', 'saved_model.pb', 'variables'} <= names


def test_picture_on_a_full_disk(small_disk):
  path = small_disk / 'behavior.gif'
  full = pytest.raises(cli.Failure, match=f'No space left.*{path}')
  with full as caught, file_io.file_errors():
    evaluate._write(path, bytes(2**24))
  assert caught.value.code == 1 and not list(small_disk.iterdir())


def test_checkpoint_on_a_full_disk(small_disk):
  folder = small_disk / ('long' * 50)
  saved = checkpoints.Checkpoints(
    folder, large=tf.Variable(tf.zeros([3 * 10**6]))
  )
  with pytest.raises(OSError) as error:
    saved.save(1)
  assert error.value.errno == errno.ENOSPC
  assert error.value.strerror == 'No space left on device'


def test_a_run_whose_workers_die_again_and_again_is_saved(tmp_path):
  flags = ['--inputs=state', '--save_every=1000']
  run = soak.Soak(tmp_path / 'run', flags=flags)
  try:
    run.start()
    while run._process.poll() is None:
      for pid in run._workers():
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      time.sleep(0.05)
  finally:
    run.close()
  assert run._process.returncode == 1
  out = (tmp_path / 'run.out').read_text()
  assert 'error: The environment worker was killed by signal SIGKILL' in out
  assert out.count('a fresh worker takes over') >= 4
  updates = int(re.search(r'Stopped at .* (\d+) updates; saved', out)[1])
  numbers = runfile.checkpoint_numbers(tmp_path / 'run/checkpoints')
  assert numbers[-1] == updates > 0


def statm(pid):
  pages = int(pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1])
  files = len(list(pathlib.Path(f'/proc/{pid}/fd').iterdir()))
  return pages * os.sysconf('SC_PAGE_SIZE') / 1e6, files


def test_memory_and_files_stay_flat_and_a_dead_worker_is_replaced(tmp_path):
  """1,000 updates and 100 episodes after a warm-up."""
  run = soak.Soak(
    tmp_path / 'run',
    flags=[
      *('--train_steps=20', '--eval_every=2000', '--log_every=500'),
      *('--envs=4', '--batch_size=2', '--batch_length=6', '--horizon=3'),
    ],
  )
  try:
    run.start()
    pids = [run._process.pid, *run._workers()]

    def progress():
      updates = [
        x['updates'] for x in read_metrics(tmp_path / 'run') if 'updates' in x
      ]
      return max(updates, default=0), len(
        list(tmp_path.glob('run/episodes/*.npz'))
      )

    def wait(updates, episodes):
      while progress()[0] < updates or progress()[1] < episodes:
        assert run._process.poll() is None
        time.sleep(0.5)
      return [statm(pid) for pid in pids], progress()

    before, (updates, episodes) = wait(400, 50)
    after, _ = wait(updates + 1000, episodes + 100)
    # The first evaluation has happened: the first worker is that of training.
    os.kill(run._workers()[0], signal.SIGKILL)
    end = time.time() + 60
    while not any('env_restarts' in x for x in read_metrics(tmp_path / 'run')):
      assert time.time() < end
      time.sleep(0.2)
    count = progress()[1]
    while progress()[1] < count + 2:
      assert time.time() < end
      time.sleep(0.2)
    run.finish()
  finally:
    run.close()
  for (memory, files), (later, more) in zip(before, after, strict=True):
    assert later - memory < 25, (before, after)
    assert more <= files + 3, (before, after)
  out = (tmp_path / 'run.out').read_text()
  assert 'was killed by signal SIGKILL' in out
  assert 'a fresh worker takes over' in out
