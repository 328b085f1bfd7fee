"""Charts of curves as SVG: what templates/charts.html draws, in numbers.

The area of a chart is as wide as its page allows. Its curves are stretched to
that, and places of text are shares of it, so text keeps its size on a phone.
"""

import dataclasses
import math

import numpy as np

SIDE = 1000  # width and height of the area in units of its paths
HUGE = 1e30  # larger numbers are drawn at the edge
TINY = 1e-30  # numbers that differ by less are drawn as one


@dataclasses.dataclass
class Line:
  """A curve.

  Attributes:
    label: its name in the legend.
    color: class of the page's style sheet.
    x, y: numbers [N], x in order.
    style: more classes, such as `thin`.
    shown: whether the legend has it.
  """

  label: str
  color: str
  x: np.ndarray
  y: np.ndarray
  style: str = ''
  shown: bool = True


@dataclasses.dataclass
class Level:
  """A horizontal line: a number to hold the curves against."""

  label: str
  color: str
  y: float
  style: str = 'dashed'


class Chart:
  """What a template needs of a chart.

  Args:
    title: what it shows.
    about: unit and meaning.
    lines: curves, those in front last.
    levels: horizontal lines.
    span: lowest and highest y; None: that of the curves and levels.
    last: greatest x; None: that of the curves.
  """

  def __init__(self, title, about, lines, levels=(), span=None, last=None):
    self.title, self.about = title, about
    last = last or max(line.x[-1] for line in lines)
    self._x = 0.0, max(1.02 * float(last), 1.0)
    self._y = _padded(*(span or _extent(lines, levels)))
    self.paths = [(_style(line), self._path(line)) for line in lines]
    self.levels = [(_style(level), self._down(level.y)) for level in levels]
    shown = [*(line for line in lines if line.shown), *levels]
    self.legend = [(_style(entry), entry.label) for entry in shown]
    self.columns = [
      (f'{100 * x / self._x[1]:.1f}%', short(x)) for x in ticks(*self._x, 5)
    ]
    self.rows = [
      (f'{self._down(y) / SIDE:.1%}', short(y)) for y in ticks(*self._y, 5)
    ]
    ends = '; '.join(
      f'{line.label} ends at {short(line.y[-1])}'
      for line in lines
      if line.shown
    )
    self.words = f'{title} by environment steps, to {short(self._x[1])}: {ends}'

  def _path(self, line):
    """The curve as the data of an SVG path; a single point is a dot."""
    across = np.rint(np.clip(line.x / self._x[1], -1, 2) * SIDE).astype(int)
    places = zip(across, map(self._down, line.y), strict=True)
    text = 'L'.join(f'{x} {y}' for x, y in places)
    return f'M{text}' if len(line.x) > 1 else f'M{text}h0'

  def _down(self, y):
    """How far below the top of the area a number is."""
    low, high = self._y
    share = (min(max(y, -HUGE), HUGE) - low) / (high - low)
    return round(SIDE * min(max(1 - share, -1), 2))


def _style(entry):
  """Classes of the style sheet; a curve of one point is a dot."""
  point = ' point' if isinstance(entry, Line) and len(entry.x) == 1 else ''
  return f'{entry.color} {entry.style}{point}'


def _extent(lines, levels):
  values = np.concatenate(
    [*(line.y for line in lines), [level.y for level in levels]]
  )
  values = np.clip(values, -HUGE, HUGE)
  return float(values.min()), float(values.max())


def _padded(low, high):
  """A range with some room above and below, and some for a single number."""
  rooms = 0.05 * (high - low), 0.5 * abs(high), 0.5
  room = next(room for room in rooms if room > TINY)
  return low - room, high + room


def ticks(low, high, count):
  """Round numbers in a range, at most `count` of them but for rounding."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
  first, last = math.ceil(low / step), math.floor(high / step)
  return [i * step for i in range(first, last + 1)]


def short(value):
  """A number in few characters: 1.5M, 200k, 1000, 0.25."""
  value = float(f'{value:.4g}')
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if max(size, 1e4) <= abs(value) < 1e3 * size:
      return f'{value / size:.4g}{letter}'
  return f'{value:.4g}'.replace('e+', 'e')
