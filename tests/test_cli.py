"""What all commands share: signals, names, small things."""

import concurrent.futures
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import types

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import pytest
import tqdm

import cli
import episode_files
import file_io
import learner
import run_folders
import tools
import worker_calls

ROOT = pathlib.Path(cli.__file__).parent


@pytest.fixture
def stop():
  stop = cli.StopSignal()
  with cli.kept_signals():
    stop.install()
    yield stop


def test_signals_are_afterwards_what_they_were():
  """And another thread, which may not take them, goes on without."""
  before = [signal.getsignal(number) for number in cli.SIGNALS]
  with cli.kept_signals():
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      thread.submit(cli.StopSignal().install).result()
    assert [signal.getsignal(number) for number in cli.SIGNALS] == before
    cli.StopSignal().install()
    assert signal.getsignal(signal.SIGINT) != before[0]
  assert [signal.getsignal(number) for number in cli.SIGNALS] == before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_until_checked(stop, number):
  stop.check()
  os.kill(os.getpid(), number)
  with pytest.raises(cli.Stopped):
    stop.check()


def test_signal_in_an_immediate_part_raises_at_once(stop):
  with pytest.raises(cli.Stopped), stop.immediate():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
      pass
    pytest.fail('the signal did not end this part')


def test_signal_before_an_immediate_part_raises_at_its_start(stop):
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(cli.Stopped), stop.immediate():
    pytest.fail('this part should not have begun')


def test_second_signal_raises_anywhere(stop):
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(cli.Stopped):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
      pass


def test_a_terminal_that_is_gone_is_no_second_signal(stop, monkeypatch):
  """It comes with others, in any order."""
  monkeypatch.setattr(cli, 'leave_terminal', lambda: None)  # pytest's own
  for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
    os.kill(os.getpid(), number)
  for _ in range(1000):
    pass
  with pytest.raises(cli.Stopped):
    stop.check()
  with pytest.raises(cli.Stopped):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
      pass


def test_nohup_is_heeded():
  with cli.kept_signals():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    cli.StopSignal().install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_handles_errors_lets_a_stop_pass(tmp_path, monkeypatch):
  """Else a whole episode would be set aside, and the run go on."""

  def stop(*args):
    raise cli.Stopped

  with pytest.raises(cli.Stopped):
    worker_calls.attempt(stop)
  rows = dict(reward=np.zeros(3), discount=np.ones(3), action=np.zeros([3, 1]))
  (path,) = episode_files.save_episodes(tmp_path, [rows])
  episode = episode_files.EpisodeFile(path)
  monkeypatch.setattr(episode, '_locate', stop)
  with pytest.raises(cli.Stopped):
    episode.check()


# --- Small things -----------------------------------------------------------


def test_stop_that_nothing_caught_promises_no_more_than_it_kept(capsys):
  def run(words):
    raise cli.Stopped

  assert cli.main('x', run, []) == 0
  assert 'resumes from what was saved' in capsys.readouterr().out


def test_json_is_whole_or_goes_through_what_is_no_file(tmp_path):
  path, link = tmp_path / 'a.json', tmp_path / 'b.json'
  file_io.write_json(path, dict(a=1))
  link.symlink_to(path)
  file_io.write_json(link, dict(b=[2]))
  assert link.is_symlink() and path.read_bytes() == file_io.to_json(dict(b=[2]))
  ours, theirs = os.pipe()
  file_io.write_json(f'/dev/fd/{theirs}', {})
  os.close(theirs)
  assert open(ours).read() == '{}\n'
  with pytest.raises(TypeError):
    file_io.write_json(path, dict(b={3}))
  assert {p.name for p in tmp_path.iterdir()} == {'a.json', 'b.json'}
  assert json.loads(path.read_text()) == dict(b=[2])


def test_long_names_and_links_in_a_circle(tmp_path):
  file_io.write_json(tmp_path / ('b' * 255), {})
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  file_io.write_json(tmp_path / 'loop', {})
  assert json.loads((tmp_path / 'loop').read_text()) == {}


def test_what_is_in_the_place_of_a_folder(tmp_path):
  """A disk that is not mounted, a circle of links, a file."""
  (tmp_path / 'disk').symlink_to(tmp_path / 'absent')
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  (tmp_path / 'file').touch()
  for name, words in {
    'disk': r'disk is a link to .*absent, which leads nowhere$',
    'disk/run': r'disk is a link to .*absent, which leads nowhere$',
    'loop': r'loop is a link to .*loop, which leads nowhere$',
    'file': r'file: no folder$',
    'file/run': r'file/run: Not a directory$',
  }.items():
    with pytest.raises(cli.UserError, match=words):
      file_io.make_folders(tmp_path / name)


def test_threads_that_cannot_start_are_no_traceback(capsys):
  def run(argv):
    raise RuntimeError("can't start new thread")

  assert cli.main('dreamer.py', run, []) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'ulimit -u' in error


def test_warnings_are_one_line(capsys):
  cli.warn('a\nb\x1b[2J is left out')
  run_folders.warn('a\nb\x1b[2J is left out')
  out, error = capsys.readouterr()
  line = 'Warning: a\\nb\\x1b[2J is left out\n'
  assert out.endswith(line) and error == line


def test_records_are_the_objects_among_lines():
  odd = [b'[1]', b'7', b'{"a": 2', b'\xff', b'', b'[' * 10**5]
  lines = [b'{"a": 1}', *odd, '{"b": "ü"}'.encode()]
  assert list(file_io.records(b'\n'.join(lines))) == [dict(a=1), dict(b='ü')]


def test_attr_dict():
  config = tools.AttrDict(a=1)
  config.b = 2
  assert (config.a, config['b']) == (1, 2)
  with pytest.raises(AttributeError):
    config.missing  # noqa: B018


def test_nearest():
  choices = ['batch_size', 'batch_length', 'horizon']
  assert 'horizon' in cli.nearest('horizen', choices)
  assert cli.nearest('zzz', choices) == ''


def test_stopwatch_leaves_the_first_call_out(monkeypatch):
  # Call 1 is not timed; then one second and three.
  clock = iter([0.0, 100.0, 101.0, 200.0, 203.0])
  fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
  monkeypatch.setattr(learner, 'time', fake)
  watch = learner.Stopwatch()
  assert watch.mean == 0
  for _ in range(3):
    with watch():
      pass
  assert watch.count == 3
  assert watch.mean == 2


def test_interrupt_while_it_loads_leaves_no_traceback():
  """Ctrl-C in the seconds before there is a run to be saved."""
  code = """
import cli, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
with cli.interruptible():
  print(1, flush=True)
  time.sleep(60)
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=ROOT,
  )
  assert process.stdout.readline() == b'1\n'
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=20)
  assert (process.returncode, error) == (-signal.SIGINT, b'')


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """A virtual environment with tqdm alone: its python and its packages."""
  folder = tmp_path_factory.mktemp('bare')
  words = [sys.executable, '-m', 'venv', '--without-pip', str(folder)]
  subprocess.run(words, check=True)
  packages = next(folder.glob('lib/python*/site-packages'))
  (packages / 'tqdm').symlink_to(pathlib.Path(tqdm.__file__).parent)
  return folder / 'bin/python', packages


SCRIPTS = 'dreamer', 'evaluate', 'compare', 'report', 'sweep', 'benchmark'


@pytest.mark.parametrize('script', SCRIPTS)
def test_commands_outside_of_the_virtual_environment(bare, script):
  """Ends with what to do, not with Python's traceback."""
  python, _ = bare
  command = [python, '-S', ROOT / f'{script}.py', '--logdir', 'x']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  start = f'{script}.py: error: {python} finds no tqdm: activate the virtual'
  assert done.stderr.startswith(start) and done.stderr.count('\n') == 1


def test_a_package_that_is_missing(bare, tmp_path):
  python, packages = bare
  command = [python, ROOT / 'evaluate.py', '--logdir', 'x']
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert f'{python} finds no keras: ' in done.stderr
  # A user's script has its own errors, and a broken package its own, too.
  script = tmp_path / 'script.py'
  script.write_text('import cli\nimport keras')
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  done = subprocess.run([python, script], capture_output=True, env=env)
  assert done.returncode == 1 and b'ModuleNotFoundError' in done.stderr
  (packages / 'keras.py').write_text('import keras.inner')
  done = subprocess.run(command, capture_output=True)
  assert done.returncode == 1 and b'No module named' in done.stderr


def run_evaluate(tmp_path, **variables):
  """Without a run in its logdir, so that it ends once all has loaded."""
  command = [sys.executable, ROOT / 'evaluate.py', f'--logdir={tmp_path}']
  env = dict(os.environ, **variables)
  return subprocess.run(command, capture_output=True, text=True, env=env)


def test_what_a_notebook_and_strict_warnings_set_is_no_error(tmp_path):
  """Keras loads matplotlib, and what TensorFlow loads gives warnings."""
  backend = 'module://matplotlib_inline.backend_inline'  # may be elsewhere
  done = run_evaluate(tmp_path, MPLBACKEND=backend, PYTHONWARNINGS='error')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert f'{tmp_path} is not the logdir of a run' in done.stderr


@pytest.mark.parametrize(
  'variables, message',
  [
    (dict(PYTHONOPTIMIZE='2'), 'unset PYTHONOPTIMIZE, or set it to 1'),
    (dict(TF_NUM_INTRAOP_THREADS='-1'), 'TF_NUM_INTRAOP_THREADS is -1: the n'),
    (dict(TF_NUM_INTEROP_THREADS=' -12'), 'TF_NUM_INTEROP_THREADS is  -12: '),
  ],
)
def test_what_tensorflow_cannot_load_with(tmp_path, variables, message):
  done = run_evaluate(tmp_path, **variables)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert done.stderr.startswith('evaluate.py: error: ')
  assert message in done.stderr


def test_no_folder_for_temporary_files(monkeypatch):
  """As in a container of which all but the logdir is read-only."""
  import quiet

  monkeypatch.setattr(tempfile, 'tempdir', None)
  monkeypatch.setattr(tempfile, '_candidate_tempdir_list', lambda: ['/nowhere'])
  with pytest.raises(cli.UserError, match='set TMPDIR to one'):
    quiet._check()


@pytest.mark.parametrize(
  'words, code',
  [
    ('dreamer.py --logdir x --task nope 2>/dev/full', 2),
    ('sweep.py --nope >/dev/full 2>&1', 2),
    ('compare.py --help >/dev/full', 1),
  ],
)
def test_outputs_on_a_full_disk(words, code):
  """The exit code is that of what happened; lost output is an error."""
  command = f'{sys.executable} {ROOT}/{words}'
  done = subprocess.run(command, shell=True, capture_output=True, text=True)
  assert done.returncode == code
  lost = 'compare.py: error: cannot write the output: No space left on device\n'
  assert done.stderr == (lost if code == 1 else '')


def test_a_folder_that_is_gone(tmp_path):
  folder = tmp_path / 'gone'
  folder.mkdir()
  script = (
    f'rmdir {folder} && exec {sys.executable} {ROOT}/compare.py --indir x'
  )
  done = subprocess.run(
    ['sh', '-c', script], cwd=folder, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stderr.endswith('the current folder is gone: change to another\n')
  assert 'Traceback' not in done.stderr


def test_collector_leaves_out_what_imports_made():
  import quiet  # noqa: F401

  assert gc.isenabled()
  assert gc.get_freeze_count() > 200_000  # objects of TensorFlow and Keras


@pytest.mark.parametrize('words', [['--help'], ['--tsk', 'x']])
def test_flags_are_checked_before_tensorflow_loads(words):
  command = [sys.executable, '-X', 'importtime', str(ROOT / 'dreamer.py')]
  done = subprocess.run([*command, *words], capture_output=True, text=True)
  assert done.returncode == (0 if words == ['--help'] else 2)
  loaded = {x.rpartition('|')[2].strip() for x in done.stderr.splitlines()}
  assert 'configs' in loaded and 'tensorflow' not in loaded


def test_closed_streams_take_no_other_file(tmp_path):
  """Else what is printed would be in the first file that is opened."""
  code = """
    import os, sys
    import cli
    def run(argv):
      with open(argv[0], 'w') as file:
        os.write(1, b'out')
        os.write(2, b'err')
        print(sys.stdin.read(), flush=True)
        print('err', file=sys.stderr, flush=True)
        file.write('kept')
    sys.exit(cli.main('test', run, sys.argv[1:]))
  """
  script = tmp_path / 'script.py'
  script.write_text(textwrap.dedent(code))
  words = f'"$0" "{script}" "{tmp_path}/file" <&- >&- 2>&-'
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  done = subprocess.run(['sh', '-c', words, sys.executable], env=env)
  assert done.returncode == 0
  assert (tmp_path / 'file').read_text() == 'kept'
  words = f'"$0" "{ROOT}/dreamer.py" --help 2>&-'
  done = subprocess.run(
    ['sh', '-c', words, sys.executable], capture_output=True, text=True
  )
  assert done.returncode == 0 and '--logdir' in done.stdout
