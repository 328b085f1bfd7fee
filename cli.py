"""What all commands share: errors, the values of flags, and their parser.

A *kind* of value reads the text that a user gives, or says what it takes
instead. Nothing here imports TensorFlow.
"""

import argparse
import difflib
import json
import math
import pathlib
import re
import warnings


class UserError(Exception):
  """Bad input: the message says what was wrong and what to do (exit code 2)."""


def nearest(word, choices, count=3, cutoff=0.5):
  """The choices most like `word`, as a phrase for an error message."""
  found = difflib.get_close_matches(word, list(choices), count, cutoff)
  return f'; did you mean {" or ".join(found)}?' if found else ''


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
      return pathlib.Path(text).expanduser()
    except UnicodeEncodeError:  # TensorFlow takes no others
      raise Refused(' (it is not UTF-8)') from None
    except RuntimeError:
      raise Refused(' (there is no such user)') from None


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
      description=description.replace('%', '%%'),
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
    given, unknown = self.parse_known_args(argv)
    for word in unknown:
      names = [name for name, _, _ in self._flags.values()]
      hint = nearest(word.split('=')[0], names, cutoff=0.7)
      raise UserError(f'unknown argument {word}{hint or f"; {self._hint}"}')
    return {
      key: self._read(*self._flags[key][:2], text)
      for key, text in vars(given).items()
      if text is not None
    }

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
