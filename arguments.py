"""Flags of all commands: kinds of values, and the parser that reads them.

A *kind* of value reads the text that a user gives, or says what it takes
instead: `str` says what is taken, `metavar` stands for it in --help, and
`parse` raises ValueError, or `Refused` where there is more to say.

No TensorFlow.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
import warnings

from cli import UserError, nearest


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
    order: function that puts them in order; they stay as given without it.
  """

  metavar = 'names'

  def __init__(self, each=None, empty=False, order=list):
    self.each, self._empty, self._order = each, empty, order

  def __str__(self):
    return f'{self.each or "names"}, with commas between them'

  def parse(self, text):
    words = [word.strip() for word in text.split(',')] if text.strip() else []
    if '' in words or not (words or self._empty):
      raise ValueError
    if self.each:
      words = [str(self.each.parse(word)) for word in words]
    return ','.join(self._order(dict.fromkeys(words)))


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
      path = pathlib.Path(text).expanduser()
      if not (str(path).isascii() or sys.getfilesystemencoding() == 'utf-8'):
        raise Refused(' (the locale is not UTF-8: set PYTHONUTF8=1)')
      text.encode()
      if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise Refused(' (names have at most 255 bytes)')
      return path
    except UnicodeEncodeError:  # TensorFlow takes no others
      raise Refused(' (it is not UTF-8)') from None
    except RuntimeError:
      raise Refused(' (there is no such user)') from None


class Folder(Path):
  """A folder, as text from the root on; none may be given."""

  def __str__(self):
    return 'a folder'

  def parse(self, text):
    return os.path.abspath(super().parse(text)) if text else ''


def text(value):
  """A flag's value as it is written on a command line."""
  if isinstance(value, dict):
    return json.dumps(value)
  if isinstance(value, (list, tuple)):
    return ','.join(map(str, value))
  return str(value)


class Arguments:
  """Names and values, as a JSON object."""

  metavar = 'json'

  def __str__(self):
    return """a JSON object such as '{"map_name": "4x4"}'"""

  def parse(self, text):
    try:
      value = json.loads(text, parse_constant=lambda name: 1 / 0)
      json.dumps(value, allow_nan=False)  # as 1e400 is infinite
    except json.JSONDecodeError as error:
      raise Refused(f': {error}') from None
    except (ZeroDivisionError, RecursionError):
      raise ValueError from None
    if not isinstance(value, dict):
      raise ValueError
    return value


def split(argv):
  """The words before the first `--`, and those after it, for dreamer.py.

  Raises:
    UserError: these ask for help.
  """
  end = argv.index('--') if '--' in argv else len(argv)
  own, others = argv[:end], argv[end + 1 :]
  if {'-h', '--help'} & set(others):
    raise UserError('python dreamer.py --help lists its flags')
  return own, others


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

  def print_help(self, file=None):
    """An OSError where nobody takes it, of which argparse says nothing."""
    print(self.format_help(), end='', file=file, flush=True)

  def error(self, message):
    if 'expected' in message:  # a value, and there may be what looks like none
      message += ' (write --flag=VALUE for one that begins with a dash)'
    raise UserError(message)
