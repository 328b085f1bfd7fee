"""Sweeps: real runs of dreamer.py, on a real Ray on this machine."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import types
import uuid

import pytest
from rich import console

import compare
import configs
import ray_runs
import run_folders
import runfile
import suites
import sweep
from processes import marked, run_script, wait_for

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(sweep.__file__).parent
# Short runs that save every 100 steps.
FLAGS = (
  *('--preset', 'debug', '--eval_every', '100', '--precision', '32'),
  *('--parallel', 'none', '--log_images', 'False'),
)
ENDLESS = '1e6'


class Command:
  """sweep.py in a process of its own; ends all that is left of it."""

  def __init__(self, logdir, *words, steps='1000', stdout=None, **env):
    self.logdir = logdir
    self._mark = uuid.uuid4().hex  # all its processes have it, however deep
    self._out = logdir.with_suffix(f'.{self._mark}')
    self.process = subprocess.Popen(
      [sys.executable, 'sweep.py', '--logdir', str(logdir)]
      + ['--cpus-per-run', '1', *words, '--', *FLAGS, '--steps', steps],
      stdout=stdout or self._out.open('w'),
      stderr=subprocess.STDOUT,
      cwd=ROOT,
      env={**os.environ, 'MARK': self._mark, **env},
      start_new_session=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for pid in self.family():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    self.process.wait()

  @property
  def out(self):
    return self._out.read_text()

  def family(self):
    """Process ids of everything that this command has started."""
    return marked(f'MARK={self._mark}')

  def wait(self):
    """Returns the exit code, when no process is left."""
    code = self.process.wait()
    wait_for(lambda: not self.family())
    return code

  def wait_for_checkpoint(self, *names):
    """Until the runs `names` are amid their work, and save updates."""
    for name in names:
      folder = self.logdir / name / 'checkpoints'
      before = newest_save(folder)
      wait_for(
        lambda folder=folder, before=before: newest_save(folder) > before,
        lambda: self.process.poll() is None or self.out,
      )

  def trainer(self, name):
    """Process id of a run's dreamer.py."""
    holder = (self.logdir / name / 'lock').read_text()
    pid = int(re.match(r'process (\d+) on ', holder)[1])
    assert pid in self.family()
    return pid

  def kill_run(self, name):
    """As the system would when memory runs out."""
    os.kill(self.trainer(name), signal.SIGKILL)


def newest_save(folder):
  """How many updates it holds; a new run begins with a save of none."""
  numbers = (int(path.stem[5:]) for path in folder.glob('ckpt-*.index'))
  return max(numbers, default=0)


def printed(logdir, name):
  return (logdir / f'{name}.out').read_text()


TOYS = ('--tasks', 'toy_reach,toy_catch', '--seeds', '2')


def test_sweep_with_a_killed_run_is_finished_by_the_same_command(tmp_path):
  logdir = tmp_path / 'sweep'
  names = [f'toy_{t}/dreamer/{s}' for t in ('reach', 'catch') for s in (0, 1)]
  with Command(logdir, *TOYS, '--retries', '0') as command:
    command.wait_for_checkpoint('toy_reach/dreamer/0')
    command.kill_run('toy_reach/dreamer/0')
    assert command.wait() == 1
    assert '4 runs: 1 failed, 3 done' in command.out
    line = 'toy_reach dreamer 0 failed: killed by SIGKILL'
    assert line in command.out and 'retry' not in command.out
  texts = [printed(logdir, name) for name in names]
  assert ['Finished at' in text for text in texts] == [False, True, True, True]
  # Again: the failed one goes on, the finished ones are left alone.
  with Command(logdir, *TOYS, '--retries', '0') as command:
    assert command.wait() == 0
    assert '4 runs: 1 waiting, 3 done' in command.out
    assert '4 runs: 4 done.' in command.out
    done = r'toy_reach dreamer 0: done, 1000/1000 steps, [\d.]+ fps, return'
    assert re.search(done, command.out)
  assert [printed(logdir, name) for name in names[1:]] == texts[1:]
  rest = printed(logdir, names[0]).removeprefix(texts[0])
  assert re.search(r'Resumed at step [1-9]', rest) and 'Finished at' in rest
  # All are finished: nothing starts, not even Ray.
  with Command(logdir, *TOYS) as command:
    assert command.wait() == 0
    assert command.out == '4 runs: 4 done.\n'
  # compare.py finds all.
  path = tmp_path / 'compare.json'
  assert compare.main([f'--indir={logdir}', f'--json={path}']) == 0
  rows = json.loads(path.read_text())['rows']
  assert {(r['task'], r['method'], r['seeds']) for r in rows} == {
    ('toy_catch', 'dreamer-debug', 2),
    ('toy_reach', 'dreamer-debug', 2),
  }
  # More steps make it unfinished; killed amid those, it is tried again.
  words = ('--tasks', 'toy_reach', '--seeds', '1', '--retries', '1')
  with Command(logdir, *words, steps='2000') as command:
    command.wait_for_checkpoint('toy_reach/dreamer/0')
    command.kill_run('toy_reach/dreamer/0')
    assert command.wait() == 0
    assert 'retry 1, ' in command.out and '(killed by SIGKILL)' in command.out
    assert 'done, 2000/2000 steps' in command.out


def test_nothing_is_lost_or_left_however_it_ends(tmp_path):
  logdir = tmp_path / 'sweep'
  words = ('--tasks', 'toy_reach', '--seeds', '3')
  runs = [f'toy_reach/dreamer/{seed}' for seed in range(3)]
  with Command(logdir, *words, steps=ENDLESS) as command:
    command.wait_for_checkpoint(*runs[:2])
    os.killpg(command.process.pid, signal.SIGTERM)  # as a job's end does
    assert command.wait() == 130
    assert 'Stopping: runs save' in command.out
    assert command.out.endswith('Stopped. The same command goes on.\n')
    assert 'Traceback' not in command.out
  steps = []
  for name in runs[:2]:
    last = printed(logdir, name).splitlines()[-1]
    steps.append(re.match(r'Stopped at step (\d+), \d+ updates; saved', last))
  assert all(steps)
  assert not (logdir / runs[2]).exists()  # it never started
  # The same command goes on, and is killed without a chance to clean up.
  with Command(logdir, *words, steps=ENDLESS) as command:
    command.wait_for_checkpoint(*runs[:2])
    # So is a worker of Ray, which else ends what it has started.
    status = pathlib.Path(f'/proc/{command.trainer(runs[0])}/status')
    worker = int(re.search(r'PPid:\s+(\d+)', status.read_text())[1])
    assert worker in command.family()
    os.kill(worker, signal.SIGKILL)
    command.process.kill()
    assert command.wait() == -signal.SIGKILL
  for name in runs[:2]:
    text = printed(logdir, name)
    assert re.search(r'Resumed at step [1-9]', text)
    assert text.count('Stopped at step') == 2  # and saved


def test_runs_that_cannot_get_better_are_refused_on_a_terminal(tmp_path):
  """Not tried again. One needs other actions, one is in use."""
  logdir = tmp_path / 'sweep'
  folder = logdir / 'toy_catch/dreamer/0'
  folder.mkdir(parents=True)
  lock = (folder / 'lock').open('a+')
  lock.write('process 1 on elsewhere\n')
  lock.flush()
  fcntl.flock(lock, fcntl.LOCK_EX)
  ours, theirs = pty.openpty()
  words = ('--tasks', 'toy_catch', '--methods', 'planet,dreamer', '--seeds=1')
  with Command(
    logdir, *words, stdout=theirs, COLUMNS='200', LINES='50'
  ) as command:
    os.close(theirs)
    text = b''
    with contextlib.suppress(OSError):  # at its end
      while block := os.read(ours, 2**16):
        text += block
    assert command.wait() == 1
  os.close(ours)
  lock.close()
  text = text.decode()
  assert '2 runs: 2 refused.' in text and 'retry' not in text
  assert 'toy_catch has discrete actions, and --behavior planning' in text
  assert 'in use by process 1 on elsewhere' in text
  assert re.search('│ toy_catch │ planet  │ +0 │ .*│ refused │', text)
  for method in ('planet', 'dreamer'):
    assert printed(logdir, f'toy_catch/{method}/0').count('--- 20') == 1


# --- Sets and arms ----------------------------------------------------------


@pytest.mark.parametrize(
  'name, tasks, arms',
  [
    ('dmc20', 20, 1),
    ('atari9', 11, 1),
    ('figure4', 4, 12),
    ('figure8', 20, 3),
    ('figure12', 20, 3),
  ],
)
def test_sets(name, tasks, arms):
  pairs = sweep.choose(name)
  assert len(pairs) == len(set(pairs)) == tasks * arms
  assert len({task for task, _ in pairs}) == tasks
  assert len({arm.name for _, arm in pairs}) == arms
  assert {task for task, _ in pairs} <= set(suites.task_names())


def test_sets_and_methods_mix():
  pairs = sweep.choose('toy_reach,dmc20,figure8,toy_reach')
  assert len(pairs) == 1 + 60
  assert {arm.name for task, arm in pairs if task == 'toy_reach'} == {'dreamer'}
  pairs = sweep.choose('figure4,toy_catch', 'planet')
  assert {arm.method for _, arm in pairs} == {'planet'}
  assert len(pairs) == 4 * 4 + 1


def test_a_run_of_other_flags_is_told(tmp_path, capsys):
  config = dict(horizon=15, steps=900, precision='auto')
  before = dict(horizon=9, steps=500, precision='32')
  (tmp_path / 'config.json').write_text(json.dumps(dict(config=before)))
  run = types.SimpleNamespace(logdir=tmp_path, config=config)
  sweep.warn_of_changes(run)
  line = f'Warning: {tmp_path} has --horizon 9, not 15\n'
  assert capsys.readouterr().err == line


@pytest.mark.parametrize(
  'signals, wanted',
  [('HUP TERM', 1), ('TERM HUP', 1), ('HUP', 1), ('INT HUP TERM', 2)],
)
def test_a_terminal_that_is_gone_kills_no_runs(monkeypatch, signals, wanted):
  """A closed terminal often sends SIGTERM as well; runs are to save."""
  monkeypatch.setattr(ray_runs, 'leave_terminal', lambda: None)  # pytest's own
  ray = types.SimpleNamespace(remote=lambda **options: lambda actor: actor)
  monkeypatch.setattr(ray_runs.Runner, 'remote', None, raising=False)
  made = ray_runs.Sweep(ray, [], 0, 1, 0)
  for name in signals.split():
    made._handle(signal.Signals[f'SIG{name}'], None)
  assert made._wanted == wanted


@pytest.mark.parametrize('setting', [(), ('--inputs', 'state')])
def test_arms_are_what_dreamer_and_compare_take_them_for(tmp_path, setting):
  """dreamer.py accepts the flags of all, and compare.py tells them apart."""
  pairs = sweep.choose('dmc20,atari9', 'dreamer,dreamer-reward')
  pairs += sweep.choose('toy_reach,figure4,figure8,figure12')
  pairs += sweep.choose('toy_reach', ','.join(sweep.METHODS))
  pairs = [x for x in pairs if not setting or not x[0].startswith('atari')]
  extra = ['--steps', '7', *setting]
  checked = sweep.check_flags(list(dict.fromkeys(pairs)), extra)
  seen = set()
  for (task, arm), config in checked.items():
    assert (config['task'], config['steps']) == (task, 7)
    method = configs.method_name(config)
    assert method == arm.method + ('-state' if setting else '')
    flags = dict(zip(arm.flags[::2], arm.flags[1::2], strict=True))
    for flag, value in flags.items():
      assert str(config[flag[2:]]) == value
    assert arm.name == method or flags
    folder = tmp_path / 'runs' / task / arm.name / '0'
    folder.mkdir(parents=True)
    record = dict(method=method, config=config)
    (folder / 'config.json').write_text(json.dumps(record, default=str))
    seen.add((task, arm.name))
  runs = run_folders.find_runs([tmp_path / 'runs'])
  assert {(run.task, run.method) for run in runs} == seen
  assert len(runs) == len(checked)
  last = 'planet-state-horizon45' if setting else 'planet-horizon45'
  assert ('dmc_walker_walk', last) in seen


def test_flags_of_all_runs_are_part_of_the_folders_names():
  pairs = sweep.choose('toy_robot', 'dreamer,planet')
  found = sweep.check_flags(pairs, ['--inputs=state', '--learner=free'])
  names = [arm.name for _, arm in found]
  assert names == ['dreamer-free-state', 'planet-free-state']


def test_runs_are_in_the_folder_of_the_user(tmp_path):
  """There its relative paths lead somewhere."""
  logdir, runner = tmp_path / 'sweep' / 'run', ray_runs.Runner()
  flags = ['--logdir', str(logdir), '--task=toy_reach', '--init_from=./a']
  runner.start(logdir, flags, str(tmp_path), 1, 0)
  wait_for(runner.poll)
  code, _, text = runner.poll()
  assert code == 2 and f'{tmp_path}/a' in text


def runs_of(folder, *flags, tasks='toy_reach'):
  """One run as sweep.py takes it, with flags of dreamer.py."""
  words = ['--tasks', tasks, '--logdir', str(folder), '--seeds', '1']
  args = sweep.parse_flags([*words, '--', *flags])
  return sweep.make_runs(
    sweep.check_flags(sweep.choose(tasks), args.extra), args
  )


def test_what_a_run_says_is_no_markup_in_the_table(tmp_path):
  (run,) = runs_of(tmp_path)
  run.note = 'list[int] in x[/b]'
  screen = io.StringIO()
  console.Console(file=screen, width=200).print(sweep.Board([run])._table(5))
  assert run.note in screen.getvalue()


def test_lines_that_are_no_numbers_are_not_shown(tmp_path):
  (run,) = runs_of(tmp_path)
  folder = tmp_path / 'toy_reach/dreamer/0'
  folder.mkdir(parents=True)
  lines = ['{"step": 40, "fps": 2}', '{"step": "abc", "fps": [1]}', '[[1, 2]]']
  (folder / 'metrics.jsonl').write_text('\n'.join(lines))
  seen = sweep.read_progress(folder / 'metrics.jsonl')
  assert seen == dict(step=40, fps=2)


PACE = '--train_every=1000', '--train_steps=100'


@pytest.mark.parametrize(
  'flags, step, done',
  [
    (['--steps=500'], 500, True),
    (['--steps=500'], 499, False),
    (['--steps=500'], '500', False),
    (['--offline=.', '--updates=200', *PACE], 2000, True),
    (['--offline=.', '--updates=201', *PACE], 2000, False),
    (['--offline=.', '--steps=2001', *PACE], 2000, False),
  ],
)
def test_runs_that_are_finished(tmp_path, flags, step, done):
  (run,) = runs_of(tmp_path, *flags)
  assert run.state == 'waiting'
  run.logdir.mkdir(parents=True)
  (run.logdir / 'config.json').write_text('{}')
  (run.logdir / 'sweep.json').write_text(json.dumps(dict(step=step)))
  (run,) = runs_of(tmp_path, *flags)
  assert (run.state == 'done') == done


def test_two_names_of_one_task_are_one_run(tmp_path):
  (run,) = runs_of(tmp_path, tasks='dmc_cup_catch,dmc_ball_in_cup_catch')
  assert run.logdir == tmp_path.resolve() / 'dmc_cup_catch/dreamer/0'


def test_presets_and_other_layouts_keep_their_names(tmp_path):
  for path, preset in (
    ('toy_reach/dreamer-horizon9/0', 'cpu'),
    ('toy_reach/dreamer-cpu/0', 'cpu'),
    ('toy_reach/dreamer-old/3', 'release'),  # not the seed of the run
  ):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    config = dict(task='toy_reach', seed=0, preset=preset)
    record = dict(method='dreamer', config=config)
    (folder / 'config.json').write_text(json.dumps(record))
  names = {run.method for run in run_folders.find_runs([tmp_path])}
  assert names == {'dreamer-horizon9-cpu', 'dreamer-cpu', 'dreamer'}


# --- Bad input --------------------------------------------------------------


REACH = ('--tasks', 'toy_reach')


@pytest.mark.parametrize(
  'words, expected',
  [
    ((), '--tasks'),
    (('--tasks', 'toy_rech'), 'did you mean toy_reach'),
    (('--tasks', 'dmc2'), 'did you mean dmc20?'),
    (('--tasks', 'toy_reach,'), 'names, with commas between them'),
    (('--tasks', 'custom_mine'), 'custom_mine is made by a function'),
    ((*REACH, '--methods', 'dremer'), 'did you mean dreamer'),
    ((*REACH, '--methods', ''), 'with commas between them'),
    (('--tasks', 'figure8', '--methods', 'planet'), 'figure8 has none of them'),
    ((*REACH, '--seeds', '0'), '--seeds takes a whole number from 1'),
    ((*REACH, '--seeds', 'x'), '--seeds'),
    ((*REACH, '--retries', '-1'), '--retries takes a whole number from 0'),
    ((*REACH, '--gpus-per-run', '-1'), '--gpus-per-run takes a number from 0'),
    ((*REACH, '--cpus-per-run', '0'), '--cpus-per-run takes a number above 0'),
    (
      (*REACH, '--cpus-per-run', 'nan'),
      '--cpus-per-run takes a number above 0',
    ),
    ((*REACH, '--retry', '1'), 'did you mean --retries?'),
    ((*REACH, '--preset', 'debug'), 'flags of dreamer.py come last, after --'),
    ((*REACH, '--', '--seed=3'), '--seed after -- is set by sweep.py'),
    ((*REACH, '--', '--logdir', 'x'), '--logdir after -- is set by sweep.py'),
    (
      (*REACH, '--', '--learner=free', '--role=learn'),
      '--role after -- is set',
    ),
    ((*REACH, '--', '--help'), 'python dreamer.py --help'),
    (
      ('--tasks', 'figure4', '--', '--horizon', '9'),
      'set by dreamer-horizon10',
    ),
    ((*REACH, '--', '--stepz', '3'), 'did you mean --steps'),
    ((*REACH, '--', '--behavior', 'planning'), '--methods planet'),
  ],
)
def test_bad_input(tmp_path, words, expected, capsys):
  assert sweep.main(['--logdir', str(tmp_path / 'sweep'), *words]) == 2
  err = capsys.readouterr().err
  assert expected in err and err.count('\n') == 1
  assert err.startswith('sweep.py: error: ')


@pytest.mark.parametrize(
  'words, expected',
  [
    (('--cpus-per-run', '999'), 'no node has that: there are 1'),
    (('--cpus-per-run', '1e-5'), 'Ray gives no less than 0.0001 of a CPU'),
    (('--address', '127.0.0.1:9'), '--address 127.0.0.1:9: Connection'),
  ],
)
def test_cluster_that_cannot_serve(tmp_path, words, expected):
  """In a process of its own, as Ray is there once for each."""
  command = [sys.executable, 'sweep.py', '--logdir', str(tmp_path / 'sweep')]
  result = subprocess.run(
    [*command, *REACH, *words], capture_output=True, text=True, cwd=ROOT
  )
  assert result.returncode == 2
  assert expected in result.stderr and result.stderr.count('\n') == 1


def test_logdir_that_cannot_be_made(tmp_path, capsys):
  (tmp_path / 'file').touch()
  assert sweep.main(['--logdir', str(tmp_path / 'file/x'), *REACH]) == 2
  assert f'cannot write to {tmp_path}/file/x: Not a' in capsys.readouterr().err
  (tmp_path / 'loop').symlink_to('loop')
  assert sweep.main(['--logdir', str(tmp_path / 'loop'), *REACH]) == 2
  assert f'cannot write to {tmp_path}/loop: ' in capsys.readouterr().err


def test_shares_are_refused_where_ray_refuses_them():
  code = """
    import cli, ray, ray_runs
    ray.init('local', num_cpus=8, num_gpus=4, include_dashboard=False)
    for cpus, gpus in (
      *((1.5, 2), (1, 0.5), (1 / 3, 1 / 3), (0.0001, 0)),
      *((1, 1.5), (1, 2.0001), (1, 9e-5), (9e-5, 0)),
    ):
      args = cli.AttrDict(cpus_per_run=cpus, gpus_per_run=gpus)
      for take in (
        lambda: ray_runs.share(ray, args),
        lambda: ray.remote(num_cpus=cpus, num_gpus=gpus)(dict).remote(),
      ):
        try:
          take()
          print('taken', end=' ')
        except (cli.UserError, ValueError) as error:
          print(type(error).__name__, end=' ')
  """
  done = run_script(code)
  assert done.returncode == 0, done.stderr
  refused = ['UserError', 'ValueError']
  assert done.stdout.split() == 8 * ['taken'] + 4 * refused


def test_without_ray(tmp_path):
  (tmp_path / 'ray.py').write_text('raise ImportError("none here")\n')
  result = subprocess.run(
    [sys.executable, 'sweep.py', '--logdir', str(tmp_path / 'x'), *REACH],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
  )
  # Of the script's folder and PYTHONPATH, the first has no ray.py.
  assert result.returncode == 2, result.stderr
  assert "pip install '.[sweep]'" in result.stderr
  assert 'Traceback' not in result.stderr and not result.stdout


def test_starts_without_tensorflow_and_ray():
  code = (
    'import sweep, sys; assert not {"ray", "tensorflow"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_help(capsys):
  with pytest.raises(SystemExit) as end:
    sweep.main(['--help'])
  assert end.value.code == 0
  text = re.sub(r'\s', '', capsys.readouterr().out)
  assert all(name in text for name in (*sweep.SETS, *sweep.METHODS))


@pytest.mark.parametrize('share, runs', [(0.1, 10), (0.2, 5), (0.3, 3), (1, 1)])
def test_shares_of_a_gpu(share, runs):
  assert ray_runs.room(1.0, share) == runs


def test_a_run_keeps_flags_that_are_not_given_again(tmp_path, capsys):
  (run,) = runs_of(tmp_path, '--steps=500', '--horizon=9')
  (run.logdir / 'episodes').mkdir(parents=True)
  (run.logdir / 'episodes' / 'a-b-3.npz').touch()
  runfile.write_config(run.config, folder=run.logdir)
  (run.logdir / 'sweep.json').write_text(json.dumps(dict(step=500)))
  (run,) = runs_of(tmp_path)
  assert (run.last_step, run.config.horizon, run.state) == (500, 9, 'done')
  (run,) = runs_of(tmp_path, '--steps=600')
  assert (run.last_step, run.state) == (600, 'waiting')
  assert capsys.readouterr().err == ''
  runs_of(tmp_path, '--horizon=15')
  assert 'has --horizon 9, not 15' in capsys.readouterr().err
