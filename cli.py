"""What all commands share: errors, files, signals, and the flags' values.

A *kind* of value reads the text that a user gives, or says what it takes
instead. Nothing here imports TensorFlow.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import warnings

import tqdm

# --- Errors -----------------------------------------------------------------


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
  """Bad input: the message says what was wrong and what to do."""

  code = 2


class Stopped(Exception):  # noqa: N818 (a request, not an error)
  """Ctrl-C or SIGTERM asked the run to save and leave."""


def main(name, run, argv=None):
  """Calls `run(argv)` and turns what it raises into an exit code.

  Args:
    name: of the program, before its messages.
    run: function of the command line that may return an exit code.
    argv: list of words; None for those of this process.

  Returns:
    0 when finished or stopped on request, 1 for a run that cannot go on, 2 for
    bad input, 130 after Ctrl-C.
  """
  for stream in (sys.stdout, sys.stderr):  # whatever the terminal can show
    with contextlib.suppress(AttributeError):
      stream.reconfigure(errors='backslashreplace')
  try:
    return run(sys.argv[1:] if argv is None else argv) or 0
  except Stopped:
    print('Stopped while starting; the same command resumes.')
    return 0
  except Failure as error:
    if error.detail and error.detail not in str(error):
      print(error.detail, file=sys.stderr)
    print(f'{name}: error: {error}', file=sys.stderr, flush=True)
    error.leave()
    return error.code
  except KeyboardInterrupt:
    return 130


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
  tqdm.tqdm.write(f'Warning: {message}', file=sys.stdout)
  sys.stdout.flush()


def nearest(word, choices, count=3, cutoff=0.5):
  """The choices most like `word`, as a phrase for an error message."""
  lower = {choice.lower(): choice for choice in choices}
  found = difflib.get_close_matches(word.lower(), lower, count, cutoff)
  names = ' or '.join(lower[name] for name in found)
  return f'; did you mean {names}?' if found else ''


@contextlib.contextmanager
def quiet_stderr():
  """Drops what libraries write to standard error, from C++ too.

  For imports: gym prints a notice under NumPy 2, TensorFlow several lines
  before its log level counts. Exceptions pass.
  """
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


# --- Files ------------------------------------------------------------------


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


class AttrDict(dict):
  """A dictionary whose keys are attributes too."""

  __setattr__ = dict.__setitem__

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError:
      raise AttributeError(name) from None


def make_folders(*paths):
  """Makes the folders of what will be written, before the work is done.

  Raises:
    UserError: one cannot be made or written to.
  """
  for path in filter(None, paths):
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f'cannot write to {path}: {error.strerror}') from None
    if not os.access(path, os.W_OK):
      raise UserError(f'cannot write to {path}')


TEMPORARY = r'\..+\.\d+\.tmp'  # names of files that `atomic_write` is at


@contextlib.contextmanager
def atomic_write(path):
  """Yields a binary file that appears under `path` whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
  except OSError as error:  # such as a full disk
    error.filename = error.filename or str(path)
    raise
  finally:
    temporary.unlink(missing_ok=True)


def remove_temporary_files(directory):
  """Removes temporary files that `atomic_write` left when it was killed."""
  for path in pathlib.Path(directory).glob('.*.tmp'):
    if re.fullmatch(TEMPORARY, path.name):
      path.unlink()


# --- Signals ----------------------------------------------------------------


SIGNALS = signal.SIGINT, signal.SIGTERM


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
  """Lets a run end at a safe place after Ctrl-C or SIGTERM.

  The first signal is noted, and `check` then raises `Stopped`; inside
  `immediate`, where nothing has changed since the last checkpoint, it is
  raised at once. A second signal always is.
  """

  def __init__(self):
    self._requested = False
    self._immediate = False

  @property
  def requested(self):
    return self._requested

  def install(self):
    """Takes both signals; in other threads than the main one it cannot."""
    if _in_main_thread():
      for number in SIGNALS:
        signal.signal(number, self._handle)

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
    again, self._requested = self._requested, True
    if self._immediate or again:
      raise Stopped


# --- Kinds of values --------------------------------------------------------
# `str` says what is taken, and `metavar` stands for it in --help. `parse`
# raises ValueError, or Refused where there is more to say.


class Refused(ValueError):  # noqa: N818 (of a value, not of the program)
  """A value that is not taken, and why: how a message goes on."""


class Whole:
  """A whole number from `low` to `high`; it may be written as 1e6."""

  metavar = 'int'

  def __init__(self, low=0, high=10**15):
    self.low, self.high = low, high

  def __str__(self):
    return f'a whole number from {self.low:,} to {self.high:,}'

  def parse(self, text):
    try:
      value = int(text)
    except ValueError:
      value = int(float(text))
      if value != float(text):
        raise
    if not self.low <= value <= self.high:
      raise ValueError
    return value


class Number:
  """A number from `low`, which is left out with `above`, to `high`."""

  metavar = 'float'

  def __init__(self, low=0.0, high=1e6, above=False):
    self.low = math.nextafter(low, math.inf) if above else low
    self.high = high
    self._words = f'above {low:g}, at most' if above else f'from {low:g} to'

  def __str__(self):
    return f'a number {self._words} {self.high:,.12g}'

  def parse(self, text):
    value = float(text)
    if not self.low <= value <= self.high:  # nan is not
      raise ValueError
    return value


class Choice:
  """One of several words."""

  def __init__(self, *words):
    self.words = words
    self.metavar = '|'.join(words)

  def __str__(self):
    return f'one of {", ".join(self.words)}'

  def parse(self, text):
    if text not in self.words:
      raise Refused(nearest(text, self.words))
    return text


class Truth:
  """True or False."""

  metavar = 'bool'

  def __str__(self):
    return 'True or False'

  def parse(self, text):
    return {'True': True, 'False': False}[text]


class Text:
  """Any text for which `check` raises no error."""

  metavar = 'str'

  def __init__(self, check=lambda text: None):
    self._check = check

  def __str__(self):
    return 'a text'

  def parse(self, text):
    self._check(text)
    return text


class Names:
  """Names with commas between them, without spaces and repetitions.

  Args:
    each: kind of a name.
    empty: whether there may be none.
  """

  metavar = 'names'

  def __init__(self, each=None, empty=False):
    self.each, self._empty = each, empty

  def __str__(self):
    return f'{self.each or "names"}, with commas between them'

  def parse(self, text):
    words = [word.strip() for word in text.split(',')] if text.strip() else []
    if '' in words or not (words or self._empty):
      raise ValueError
    for word in words if self.each else ():
      self.each.parse(word)
    return ','.join(dict.fromkeys(words))


class Pattern:
  """A regular expression."""

  metavar = 'regex'

  def __str__(self):
    return 'a regular expression'

  def parse(self, text):
    try:
      with warnings.catch_warnings(action='ignore'):  # of what may change
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
      raise Refused(f': {error}') from None
    return text


class Path:
  """A file or folder; a leading ~ stands for the home folder."""

  metavar = 'path'

  def __str__(self):
    return 'a path'

  def parse(self, text):
    if not text or '\0' in text:
      raise ValueError
    try:
      text.encode()
      path = pathlib.Path(text).expanduser()
      if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise Refused(' (names have at most 255 bytes)')
      return path
    except UnicodeEncodeError:  # TensorFlow takes no others
      raise Refused(' (it is not UTF-8)') from None
    except RuntimeError:
      raise Refused(' (there is no such user)') from None


class Folder(Path):
  """A folder, as text; none may be given."""

  def __str__(self):
    return 'a folder'

  def parse(self, text):
    return str(super().parse(text)) if text else ''


class File(Path):
  """A file to be written, in a folder that may not be there yet."""

  def __str__(self):
    return 'a path of a file'

  def parse(self, text):
    path = super().parse(text)
    if path.is_dir():
      raise Refused(' (it is a folder)')
    return path


class Arguments:
  """Names and values, as a JSON object."""

  metavar = 'json'

  def __str__(self):
    return """a JSON object such as '{"map_name": "4x4"}'"""

  def parse(self, text):
    try:
      value = json.loads(text, parse_constant=lambda name: 1 / 0)
    except json.JSONDecodeError as error:
      raise Refused(f': {error}') from None
    except (ZeroDivisionError, RecursionError):
      raise ValueError from None
    if not isinstance(value, dict):
      raise ValueError
    return value


# --- The parser -------------------------------------------------------------


class Parser(argparse.ArgumentParser):
  """Flags with kinds; what is wrong is a `UserError` of one line.

  Args:
    description: of the program, for --help.
    hint: what an unknown flag is answered with, if there is none like it.
    kwargs: of `ArgumentParser`.
  """

  def __init__(self, description, hint='--help lists all', **kwargs):
    super().__init__(
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **kwargs,
    )
    self._hint = hint
    self._flags = {}  # {attribute: (name, kind, default)}

  def flag(
    self, name, kind, default=None, help='', section=None, nargs=None, **kwargs
  ):
    """Adds a flag.

    Args:
      name: with its dashes.
      kind: one of the kinds above.
      default: its value where it is not given.
      help: what it means.
      section: of the help, from `add_argument_group`.
      nargs: '+' for a list of one or more values.
      kwargs: for `add_argument`.
    """
    action = (section or self).add_argument(
      name,
      metavar=kwargs.pop('metavar', kind.metavar),
      help=help if help is argparse.SUPPRESS else help.replace('%', '%%'),
      nargs=nargs,
      **kwargs,
    )
    self._flags[action.dest] = name, kind, default

  def parse(self, argv=None):
    """All flags, a namespace."""
    defaults = {key: default for key, (_, _, default) in self._flags.items()}
    return argparse.Namespace(**{**defaults, **self.parse_given(argv)})

  def parse_given(self, argv=None):
    """Those that were given: {name: value}.

    Raises:
      UserError: unknown flag, or a value that its kind does not take.
    """
    words = sys.argv[1:] if argv is None else argv
    for word in words:  # first, as a required one may be misspelt
      if word.startswith('--'):
        self._check_name(word)
    given, unknown = self.parse_known_args(words)
    for word in unknown:
      raise UserError(f'unknown argument {word}; {self._hint}')
    return {
      key: self._read(*self._flags[key][:2], text)
      for key, text in vars(given).items()
      if text is not None
    }

  def _check_name(self, word):
    name, names = word.split('=')[0], [x for x, _, _ in self._flags.values()]
    if name not in (*names, '--help'):
      hint = nearest(name, names, cutoff=0.7) or f'; {self._hint}'
      raise UserError(f'unknown argument {word}{hint}')

  def _read(self, name, kind, text):
    if isinstance(text, list):
      return [self._read(name, kind, part) for part in text]
    try:
      return kind.parse(text)
    except (ValueError, KeyError, OverflowError) as error:
      reason = str(error) if isinstance(error, Refused) else ''
      raise UserError(f'{name} takes {kind}, not {text!r}{reason}') from None

  def error(self, message):
    raise UserError(message)
