"""What all commands share: errors and exit codes, warnings, signals.

Nothing here imports TensorFlow.
"""

import contextlib
import difflib
import errno
import gc
import os
import pathlib
import signal
import stat
import sys
import threading

# --- Errors -----------------------------------------------------------------

NO_THREADS = (
  'no more threads can be started here: raise the limit of processes (ulimit '
  "-u, or a container's)"
)


class Failure(Exception):
  """Ends a program with a message of one line and an exit code.

  Attributes:
    code: exit code.
    detail: text that is printed before the message, such as a traceback.
  """

  code = 1
  detail = ''

  def leave(self):
    """Called when the message has been printed."""


class UserError(Failure):
  """Bad input: the message says what was wrong and what to do.

  Input that it quotes may hold what breaks lines or moves the cursor.
  """

  code = 2

  def __str__(self):
    return printable(super().__str__())


def printable(text):
  """A text in one line, without what moves the cursor of a terminal."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def _say_error(name, text):
  """Prints what ends a program, if standard error still takes it."""
  try:
    print(f'{name}: error: {text}', file=sys.stderr, flush=True)
  except OSError:  # what it holds back would be tried, and fail, at the end
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def explain_import(kind, error, trace):
  """In the place of `sys.excepthook`, while a command's imports are made.

  Says which package is not installed, or what they cannot be made with.
  """
  name = getattr(error, 'name', None)
  if kind is ModuleNotFoundError and name and '.' not in name:  # else broken
    error = UserError(
      f'{sys.executable} finds no {name}: activate the virtual environment '
      'first (source .venv/bin/activate) or install what requirements.txt '
      'names (README.md, Quick start)'
    )
  if not isinstance(error, Failure):
    sys.__excepthook__(kind, error, trace)
    return
  _say_error(pathlib.Path(sys.argv[0]).name, error)
  sys.exit(error.code)


_script = getattr(sys.modules['__main__'], '__file__', None) or os.devnull
if len({pathlib.Path(x).resolve().parent for x in (_script, __file__)}) == 1:
  sys.excepthook = explain_import  # one of our commands, whose imports follow
  os.environ['MPLBACKEND'] = 'agg'  # notebooks name one of their own

import tqdm  # noqa: E402


class Stopped(BaseException):
  """Ctrl-C, SIGTERM or SIGHUP asked the run to save and leave.

  As KeyboardInterrupt no Exception: what handles errors lets it pass.
  """


def main(name, run, argv=None):
  """Calls `run(argv)` and turns what it raises into an exit code.

  Args:
    name: of the program, before its messages.
    run: function of the command line that may return an exit code.
    argv: list of words; None for those of this process.

  Returns:
    0 when finished or stopped on request, 1 for a run that cannot go on or an
    output that nobody takes, 2 for bad input, 130 after Ctrl-C.
  """
  gc.set_threshold(20_000, 20, 20)  # the many objects of graphs mostly stay
  open_streams()
  for stream in (sys.stdout, sys.stderr):  # whatever the terminal can show
    with contextlib.suppress(AttributeError):
      stream.reconfigure(errors='backslashreplace')
  try:
    _check_folder()
    code = run(sys.argv[1:] if argv is None else argv) or 0
    print(end='', flush=True)
    return code
  except Stopped:
    print('Stopped at once; the same command resumes from what was saved.')
    return 0
  except Failure as error:
    if error.detail and error.detail not in str(error):
      with contextlib.suppress(OSError):
        print(error.detail, file=sys.stderr)
    _say_error(name, error)
    error.leave()
    return error.code
  except KeyboardInterrupt:
    return 130
  except RuntimeError as error:
    if str(error) != "can't start new thread":
      raise
    _say_error(name, NO_THREADS)
    return 1
  except OSError as error:
    if error.filename or error.errno not in (errno.ENOSPC, errno.EPIPE):
      raise
    if not isinstance(error, BrokenPipeError):  # else the reader has enough
      _say_error(name, f'cannot write the output: {error.strerror}')
    return 1


def _check_folder():
  try:
    os.getcwd()
  except OSError:
    raise UserError('the current folder is gone: change to another') from None


def end_by_sigterm():
  """SIGTERM ends the program as Ctrl-C does, with what it has started."""
  signal.signal(signal.SIGTERM, signal.default_int_handler)


def check(name, parse):
  """Ends the program where its command line is refused, or asks for help.

  Args:
    name, parse: as of `main`; what `parse` returns is not looked at.
  """
  code = main(name, lambda words: parse(words) and None)
  if code:
    sys.exit(code)


def warn(message):
  """Prints a warning above a progress bar."""
  tqdm.tqdm.write(f'Warning: {printable(message)}', file=sys.stdout)
  sys.stdout.flush()


def nearest(word, choices, cutoff=0.5):
  """The choices most like `word`, as a phrase for an error message."""
  lower = {choice.lower(): choice for choice in choices}
  found = difflib.get_close_matches(word.lower(), lower, cutoff=cutoff)
  names = ' or '.join(lower[name] for name in found)
  return f'; did you mean {names}?' if found else ''


def open_streams():
  """Gives standard input, output and errors that are closed a place to go.

  Else the next file that is opened would get what is printed.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the first number that is free
      os.set_inheritable(number, True)
    if getattr(sys, name) is None:
      stream = open(number, 'w' if number else 'r', closefd=False)
      setattr(sys, name, stream)


@contextlib.contextmanager
def quiet_stderr():
  """Drops what libraries write to standard error, from C++ too.

  For imports: gym prints a notice under NumPy 2, TensorFlow several lines
  before its log level counts. Exceptions pass.
  """
  open_streams()
  sys.stderr.flush()
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


class AttrDict(dict):
  """A dictionary whose keys are attributes too."""

  __setattr__ = dict.__setitem__

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError:
      raise AttributeError(name) from None


# --- Signals ----------------------------------------------------------------


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def signal_name(number):
  """SIGTERM for 15; those without a name, of real time, by their numbers."""
  try:
    return signal.Signals(number).name
  except ValueError:
    return str(number)


def take_signals(handle):
  """Has a function called for each of `SIGNALS`.

  SIGHUP says that the terminal or the parent is gone; where it is ignored, as
  under nohup, it stays so.
  """
  for number in SIGNALS:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handle)


def leave_terminal():
  """What is printed to a terminal that is gone is dropped, and no error."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for number in (1, 2):
    with contextlib.suppress(OSError):  # it may be closed
      device = stat.S_ISCHR(os.fstat(number).st_mode)
      if device and not os.isatty(number):
        os.dup2(nowhere, number)
  os.close(nowhere)


@contextlib.contextmanager
def interruptible():
  """Ctrl-C ends the program at once, without a traceback: while it loads."""
  handler = signal.getsignal(signal.SIGINT)
  if not _in_main_thread() or handler is not signal.default_int_handler:
    yield
    return
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)


def _in_main_thread():
  return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def kept_signals():
  """What takes signals is afterwards what it was, for a caller's program."""
  before = {number: signal.getsignal(number) for number in SIGNALS}
  try:
    yield
  finally:
    if _in_main_thread():
      for number, handler in before.items():
        if handler is not None:  # else one that Python does not know
          signal.signal(number, handler)


class StopSignal:
  """Lets a run end at a safe place after Ctrl-C, SIGTERM or SIGHUP.

  The first signal is noted, and `check` then raises `Stopped`; inside
  `immediate`, where nothing has changed since the last checkpoint, it is
  raised at once. A second signal always is, but for SIGHUP, which often comes
  with another.
  """

  def __init__(self):
    self._requested = False
    self._asked = 0  # signals but for SIGHUP
    self._immediate = False

  @property
  def requested(self):
    return self._requested

  def install(self):
    """Takes the signals; in other threads than the main one it cannot."""
    if _in_main_thread():
      take_signals(self._handle)

  def check(self):
    if self._requested:
      raise Stopped

  @contextlib.contextmanager
  def immediate(self):
    self._immediate = True
    try:
      self.check()
      yield
    finally:
      self._immediate = False

  def _handle(self, number, frame):
    self._requested = True
    if number == signal.SIGHUP:
      leave_terminal()
    else:
      self._asked += 1
    if self._immediate or self._asked > 1:
      raise Stopped
