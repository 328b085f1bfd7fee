"""Calls of a worker: its answers and errors, their limits, what it prints.

What all kinds of workers share (workers.py). No TensorFlow here.
"""

import logging
import logging.handlers
import os
import signal
import traceback
import typing

from cli import Failure, UserError, nearest, take_signals


class TaskError(UserError):
  """A task name, or a way to run a task, that does not exist here."""


class RenderError(UserError):
  """OpenGL does not work; the message says what to install."""


class WorkerError(Failure):
  """An environment failed or its worker died.

  Attributes:
    traceback: text of the worker's traceback, or its last output if it died.
  """

  code = 2
  traceback = ''

  @property
  def detail(self):
    return self.traceback


class WorkerLost(WorkerError):  # noqa: N818 (says more than WorkerLostError)
  """A worker died or hangs; a fresh one may do better."""

  code = 1


class WorkersLost(WorkerLost):
  """What runs the workers is gone, so there can be no fresh one."""


ERRORS = (TaskError, RenderError, WorkerLost, WorkerError)


def check_name(name, names, prefix):
  """Raises TaskError, with the nearest tasks, unless `name` is in `names`."""
  if name not in names:
    task, tasks = f'{prefix}{name}', [f'{prefix}{n}' for n in names]
    raise TaskError(f'There is no task {task!r}{nearest(task, tasks)}')


def fail(error):
  """Raises `error` when called: the promise of a call that cannot be kept."""
  raise error


def leave_signals():
  """Leaves the signals that stop a run to the trainer, in this process alone.

  Not by SIG_IGN, which programs that an environment starts would inherit; and
  processes that it forks end as they would elsewhere.
  """
  worker = os.getpid()

  def handle(number, frame):
    if os.getpid() != worker:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)

  take_signals(handle)


def attempt(function, *args):
  """Returns (True, result), or (False, error as text) if `function` fails."""
  try:
    return True, function(*args)
  except (Exception, SystemExit) as error:  # sys.exit() ends no run
    kind = next((x.__name__ for x in ERRORS if isinstance(error, x)), '')
    message = str(error) or type(error).__name__
    if not kind:
      message += f' ({type(error).__name__} in the environment)'
    return False, (kind, message, traceback.format_exc())


def resolve(answer):
  """Returns the result in an answer of `attempt`, or raises its error."""
  success, payload = answer
  if success:
    return payload
  kind, message, trace = payload
  classes = {x.__name__: x for x in ERRORS}
  error = classes.get(kind, WorkerError)(message)
  error.traceback = trace
  error.add_note(f'In the environment worker:\n{trace}')
  raise error


def describe(env):
  return env.observation_space, env.action_space, getattr(env, 'about', [])


class Limit(typing.NamedTuple):
  """Seconds that an answer may take (0: any), and what to say after them."""

  seconds: float
  text: str

  def __str__(self):
    return self.text.format(self.seconds)


def call_limit(seconds):
  text = 'gave no answer for {:g} seconds, the limit of --worker_timeout'
  return Limit(seconds, text)


def start_limit(seconds):
  text = 'took more than {:g} seconds to start, the limit of --start_timeout'
  return Limit(seconds, text)


# --- What workers print -----------------------------------------------------


class _Log(logging.handlers.RotatingFileHandler):
  """A log that does without what it cannot write, as on a full disk."""

  def handleError(self, record):  # noqa: N802 (the library's name)
    pass


def open_log(path):
  """A file for what workers print, of 2 MB at most: `path` and `path`.1."""
  log = _Log(path, maxBytes=10**6, backupCount=1, encoding='utf8', delay=True)
  log.setFormatter(logging.Formatter('%(asctime)s %(name)s: %(message)s'))
  return log


class Output:
  """What one worker prints: the end of it, and all of it in a log.

  Args:
    log: from `open_log`, which workers may share; None for no file.
    name: of the worker, for the log.
  """

  TAIL = 4000  # bytes
  LINE = 4000  # bytes of a line; longer ones are broken

  def __init__(self, log=None, name=''):
    self._log, self._name = log, name
    self._tail = self._line = b''

  def write(self, data):
    self._tail = (self._tail + data)[-self.TAIL :]
    *lines, self._line = (self._line + data).split(b'\n')
    if len(self._line) > self.LINE:
      lines, self._line = [*lines, self._line], b''
    for line in lines:
      for start in range(0, len(line) or 1, self.LINE):
        self._record(line[start : start + self.LINE])

  def follow(self, pipe):
    """Takes all that comes from a pipe, until its other end is closed."""
    with pipe:
      while data := pipe.read1(2**16):
        self.write(data)
    if self._line:
      self.write(b'\n')

  def _record(self, line):
    if self._log:
      text = line.decode(errors='replace')
      self._log.handle(logging.makeLogRecord(dict(name=self._name, msg=text)))

  def where(self):
    """A sentence that names the log, if there is one."""
    path = self._log and self._log.baseFilename
    return f' What workers print is in {path}.' if path else ''

  def lost(self, cause, tail=None):
    """The answer that stands for that of a worker which has ended.

    Args:
      cause: how it ended, in words.
      tail: the last that it printed, if not what was written here.
    """
    tail = (self._tail if tail is None else tail).decode(errors='replace')
    message = f'The environment worker {cause}.{self.where()}'
    if tail.strip():
      message += f' Its last output:\n{tail.strip()}'
    return False, ('WorkerLost', message, tail.strip())
