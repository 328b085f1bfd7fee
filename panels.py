"""Charts of runs: returns beside the paper, and what learning logs."""

import collections
import contextlib
import dataclasses

import numpy as np

import plots
import run_folders
from charts import Chart, Level, Line
from paper_scores import SCALE, brief

RETURN = run_folders.AXES[1]
COLORS = 8  # of methods, in templates/style.css
POINTS = 500  # of a curve that are kept in memory
STYLES = ('', 'dashed', 'dotted')  # of several numbers in one chart


@dataclasses.dataclass
class Panel:
  """A chart of numbers that runs log.

  Attributes:
    title: what it shows.
    about: unit and meaning.
    names: {key of metrics.jsonl: its word in the legend}.
  """

  title: str
  about: str
  names: dict


# Headings of a task's page, and the charts below them, where logged.
SECTIONS = {
  'World model': [
    Panel('Image loss', 'nats for an image', {'image_loss': ''}),
    Panel('Vector loss', 'nats for all vectors', {'vector_loss': ''}),
    Panel('Contrastive loss', 'nats for a state', {'state_loss': ''}),
    Panel('Reward loss', 'nats, times --reward_scale', {'reward_loss': ''}),
    Panel('KL divergence', 'nats, posterior from prior', {'div': ''}),
    Panel('Discount loss', 'nats, scaled', {'pcont_loss': ''}),
  ],
  'Behavior': [
    Panel('Entropy', 'nats for an action', {'action_ent': ''}),
    Panel('Entropy of an entry', 'nats for a number', {'action_ent_each': ''}),
    Panel(
      'Saturated actions',
      'share of numbers beyond 0.99',
      {'saturated': 'training', 'test_saturated': 'evaluation'},
    ),
    Panel(
      'Values',
      'imagined, beside what the states of episodes were worth',
      {
        'imag_value': 'imagined',
        'real_value': 'training',
        'test_real_value': 'evaluation',
      },
    ),
    Panel('Imagined return', 'mean of imagined states', {'imag_return': ''}),
  ],
  'Run': [
    Panel('Episode length', 'environment steps', {'train/length': ''}),
    Panel('Speed', 'environment steps a second', {'fps': ''}),
    Panel('Updates', 'gradient steps so far', {'updates': ''}),
  ],
}
TRAIN = Panel('Training', 'return of episodes with noise', {'train/return': ''})
NAMES = [RETURN, *TRAIN.names] + [
  name for panels in SECTIONS.values() for p in panels for name in p.names
]


class Reader:
  """Reads a metrics.jsonl once for all keys, and again when it has grown."""

  def __init__(self):
    self._files = {}  # {path: (size and time, {name: (x, y)})}

  def __call__(self, path, xaxis, yaxis):
    """As `run_folders.read_metrics`."""
    state = file_state(path)
    if path not in self._files or self._files[path][0] != state:
      series = run_folders.read_series(path, xaxis, NAMES)
      whole = yaxis, 'train/return'  # its first are those of random actions
      thin = {k: _thinned(*v) for k, v in series.items() if k not in whole}
      self._files[path] = state, {**series, **thin}
    return self._files[path][1][yaxis]

  def state(self, run):
    """Size and time of what was read of a run."""
    return self._files[run.folder / 'metrics.jsonl'][0]

  def of(self, run, name):
    """The run with other numbers in the place of its scores."""
    x, y = self._files[run.folder / 'metrics.jsonl'][1][name]
    return dataclasses.replace(run, steps=x, scores=y)


def file_state(path):
  """What changes with a file, or with the parts of a metrics.jsonl."""
  state = []
  for file in run_folders.metrics_files(path):
    with contextlib.suppress(OSError):
      about = file.stat()
      state.append((about.st_size, about.st_mtime_ns))
  return state


def _thinned(x, y):
  """At most `POINTS` means of numbers that follow each other."""
  if len(x) <= POINTS:
    return x, y
  parts = np.array_split(np.stack([x, y]), POINTS, 1)
  return np.array([part.mean(1) for part in parts]).T


def method_colors(methods):
  """{method: class of the style sheet}; after `COLORS` they come again."""
  return {name: f'c{i % COLORS}' for i, name in enumerate(methods)}


def curves(runs, label, color, style=''):
  """Lines of each seed, thin, and of their mean, by `plots.mean_curve`."""
  runs = [run for run in runs if len(run.steps)]
  if not runs:
    return []
  edges, bins = plots.binned(runs)
  lines = []
  for values in bins if len(runs) > 1 else ():
    has = np.isfinite(values)
    lines.append(
      Line(label, color, edges[has], values[has], f'thin {style}', shown=False)
    )
  x, mean, _ = plots.mean_curve(edges, bins)
  if len(x):
    return [*lines, Line(label, color, x, mean, style)]
  lines[0].shown = True  # seeds that have no steps in common
  return lines


def panel_chart(panel, reader, groups, colors):
  """A `Panel` for {method: runs}, None where none has logged it."""
  lines = []
  for method, runs in groups.items():
    for style, (name, word) in zip(STYLES, panel.names.items(), strict=False):
      label = f'{method}, {word}' if word else method
      numbers = [reader.of(run, name) for run in runs]
      lines += curves(numbers, label, colors[method], style)
  return Chart(panel.title, panel.about, lines) if lines else None


def return_chart(task, groups, colors, paper, random):
  """Evaluations of {method: runs} beside the paper and random actions."""
  lines, levels, span = [], [], None
  for method, runs in groups.items():
    lines += curves(runs, method, colors[method])
  if not lines:
    return None
  last = max(line.x[-1] for line in lines)
  if task in paper['final']:
    curve, span = paper['curves'][task], (0, SCALE)
    lines.insert(0, _paper_line(curve['steps'], curve['mean'], last))
    last = max(last, lines[0].x[-1])
    levels.append(_paper_level(paper, paper['final'][task]['dreamer']))
  if random is not None:
    label = f'random actions, {random:.4g}'
    levels.append(Level(label, 'other', random, 'dotted'))
  return Chart('Evaluation', 'return', lines, levels, span, last)


def _paper_line(steps, values, last):
  """The paper's curve up to `last`, and at least its first point."""
  steps, values = np.array(steps), np.array(values)
  has = steps <= max(last, steps[0])
  return Line('paper, Dreamer', 'paper', steps[has], values[has])


def _paper_level(paper, value):
  steps = brief(paper['methods']['dreamer']['steps'])
  return Level(f'paper at {steps}, {value:.4g}', 'paper', value)


def score_charts(groups, paper):
  """For each method the normalized score of its tasks, those of most first.

  Beside it is the paper's for these tasks. It is drawn as far as all runs have
  gone, so that it is of the same tasks at each step; between evaluations it is
  interpolated.
  """
  methods = collections.defaultdict(dict)
  for (task, method), runs in groups.items():
    runs = [run for run in runs if len(run.steps)]
    if runs and task in paper['final']:
      methods[method][task] = runs
  charts = [
    _score_chart(method, tasks, paper)
    for method, tasks in sorted(methods.items(), key=lambda x: -len(x[1]))
  ]
  return list(filter(None, charts))


def _score_chart(method, tasks, paper):
  runs = [run for group in tasks.values() for run in group]
  first = max(run.steps[0] for run in runs)
  last = min(run.steps[-1] for run in runs)
  if first > last:
    return None
  steps = np.linspace(first, last, 30 if first < last else 1)
  scores = [np.mean([_at(r, steps) for r in g], 0) for g in tasks.values()]
  theirs = _paper_line(*_paper_mean(tasks, paper), last)
  final = np.mean([paper['final'][task]['dreamer'] for task in tasks])
  count = f'{len(tasks)} task{"s" * (len(tasks) > 1)}'
  return Chart(
    method,
    f'return / {SCALE}, mean of {count}',
    [theirs, Line(method, 'c0', steps, np.mean(scores, 0) / SCALE)],
    [_paper_level(paper, final / SCALE)],
    (0, 1),
    max(last, theirs.x[-1]),
  )


def _paper_mean(tasks, paper):
  """Steps of the paper's curves, and their normalized mean over tasks."""
  curves = [paper['curves'][task] for task in tasks]
  steps = np.array(min((curve['steps'] for curve in curves), key=len))
  means = [np.interp(steps, curve['steps'], curve['mean']) for curve in curves]
  return steps, np.mean(means, 0) / SCALE


def _at(run, steps):
  """Scores of a run at steps, interpolated between evaluations."""
  places, index = np.unique(run.steps, return_inverse=True)
  means = np.bincount(index, run.scores) / np.bincount(index)
  return np.interp(steps, places, means)
