"""Processes: scripts and runs in them, and which are alive."""

import contextlib
import pathlib
import subprocess
import sys
import textwrap
import time

ROOT = pathlib.Path(__file__).parents[1]


def train_toy(logdir, task, steps, *flags):
  """A whole run of a toy task in a process of its own."""
  process = subprocess.run(
    [
      *(sys.executable, str(ROOT / 'dreamer.py'), '--logdir', str(logdir)),
      *('--task', task, '--seed', '0', '--steps', str(steps)),
      *('--precision', '32', '--log_images', 'False', *flags),
    ],
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stderr


def command(logdir, *flags, task='toy_reach'):
  """Words of a debug run."""
  words = ['--preset=debug', f'--task={task}', '--precision=32', *flags]
  script = str(ROOT / 'dreamer.py')
  return [sys.executable, script, f'--logdir={logdir}', *words]


def run(logdir, *flags, **kwargs):
  """A debug run to its end; returns the finished process."""
  words = command(logdir, *flags, **kwargs)
  return subprocess.run(words, capture_output=True, text=True, timeout=600)


def run_until(logdir, words, number, *flags, **kwargs):
  """Runs until a line has these words, and sends a signal then."""
  process = subprocess.Popen(
    command(logdir, *flags, **kwargs),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  seen = []
  with process:
    for line in process.stdout:
      seen.append(line)
      if words in line:
        process.send_signal(number)
        break
    seen += process.stdout.readlines()
  assert any(words in line for line in seen), seen
  # Else it had ended before the signal came.
  assert process.returncode == -number or 'Stopped' in ''.join(seen), seen
  return process.returncode, ''.join(seen)


def run_script(code, *args, timeout=60, **kwargs):
  """Runs Python code in a fresh interpreter, from the repository's root."""
  command = [sys.executable, '-c', textwrap.dedent(code), *args]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs
  )


def alive(pid):
  """Whether a process runs; one that only waits to be reaped does not."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def marked(text):
  """Process ids of all that have a text in their environment."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
    with contextlib.suppress(OSError):
      if text.encode() in path.read_bytes():
        found.append(int(path.parent.name))
  return found


def wait_until(condition, seconds=5):
  """Whether a condition comes true within some seconds."""
  end = time.time() + seconds
  while not condition():
    if time.time() > end:
      return False
    time.sleep(0.02)
  return True


def wait_for(condition, goes_on=lambda: True, seconds=180):
  """As `wait_until`; fails when time is over or `goes_on` is not True."""
  end = time.time() + seconds
  while not condition():
    assert goes_on() is True  # else what it gives says why
    assert time.time() < end
    time.sleep(0.05)
