"""Runs beside the paper's numbers: a table, and curves.

    python compare.py --indir ./logdir --outdir ./plots --json compare.json

Finds runs anywhere below the folders: logdirs of `dreamer.py` by their
config.json, and the layout task/method/seed/metrics.jsonl, which the 2020
release's plots read. Reads only. What is compared, and by which rule:

- The score of a run is the mean of its evaluation returns in the window of
  `--window` environment steps that ends at the last that every seed of its task
  and method reached. The standard deviation over seeds divides by their number.
- It is held against the paper's Dreamer at the nearest published step: eleven
  from 1e5 to 4.9e6 from the released curves, which are such means too, and 5e6
  from Appendix G (which gives no spread; that of 4.9e6 is used).
- Verdict: `within` where the 95% interval of the difference of the means
  (Welch's t, over seeds) holds zero, or the difference is at most 10 of the
  1000 that a return can reach; else `above` or `below`. No verdict with fewer
  than 3 seeds, or before 90,000 environment steps, the first published less
  10%.
"""

import collections
import json
import math
import pathlib
import sys

import cli
import file_io

with cli.interruptible():
  import numpy as np
  from scipy import stats

import arguments
import run_folders
from cli import UserError

PAPER = pathlib.Path(__file__).with_name('scores') / 'paper.json'
BASELINES = ('planet', 'd4pg', 'a3c')
SCALE = 1000  # the largest return of a control suite task
MARGIN = 10  # a difference in return that does not matter
LEAST_SEEDS = 3
LEAST_STEPS = 90_000


# --- Comparing --------------------------------------------------------------


def load_paper():
  """The paper's figures (scores/paper.json)."""
  try:
    return json.loads(PAPER.read_text())
  except OSError:
    raise UserError(
      f'{PAPER} is missing: run compare.py in a clone of its repository'
    ) from None


def published(paper, task, steps):
  """What the paper's Dreamer has at the published step nearest to `steps`.

  Returns:
    Dictionary of steps, mean, std (sample standard deviation over seeds),
    seeds, source; None for a task that the paper does not have.
  """
  if task not in paper['final']:
    return None
  curve = paper['curves'][task]
  choices = [*curve['steps'], paper['methods']['dreamer']['steps']]
  nearest = int(np.argmin(np.abs(np.array(choices, float) - steps)))
  index = min(nearest, len(curve['steps']) - 1)
  final = nearest > index
  seeds = curve['seeds'][index]
  return dict(
    steps=choices[nearest],
    mean=paper['final'][task]['dreamer'] if final else curve['mean'][index],
    std=curve['std'][index] * (seeds / (seeds - 1)) ** 0.5,
    seeds=seeds,
    source='Appendix G' if final else 'released curve',
  )


def score(run, steps, window):
  """Mean of a run's returns in (steps - window, steps], NaN if none."""
  inside = (steps - run.steps < window) & (run.steps <= steps)
  return float(run.scores[inside].mean()) if inside.any() else float('nan')


def difference(scores, reference):
  """Ours less the paper's: (mean, half width of Welch's 95% interval)."""
  mean = float(np.mean(scores) - reference['mean'])
  if len(scores) < 2:
    return mean, None
  n, m = len(scores), reference['seeds']
  ours, theirs = np.var(scores, ddof=1) / n, reference['std'] ** 2 / m
  if not ours + theirs:
    return mean, 0.0
  freedom = (ours + theirs) ** 2 / (
    ours**2 / (n - 1) + theirs**2 / max(1, m - 1)
  )
  half = stats.t.ppf(0.975, freedom) * (ours + theirs) ** 0.5
  return mean, float(half)


def verdict(steps, seeds, reference, mean, half):
  """In words, by the rule at the top of this file."""
  if not seeds:
    return 'no evaluation yet'
  if reference is None:
    return 'not in the paper'
  if steps < LEAST_STEPS:
    return 'too few steps'
  if seeds < LEAST_SEEDS:
    return 'too few seeds'
  if abs(mean) <= max(half, MARGIN):
    return 'within'
  return 'above' if mean > 0 else 'below'


def compare(groups, paper, window):
  """One row, a dictionary, for each task and method.

  Args:
    groups: from `run_folders.group_runs`.
    paper: from `load_paper`, or None to leave it out.
    window: environment steps.
  """
  return [_row(*key, runs, paper, window) for key, runs in groups.items()]


def _row(task, method, runs, paper, window):
  steps, scores = _scores(task, method, runs, window)
  values = list(scores.values())
  reference = paper and published(paper, task, steps)
  mean = half = None
  if reference and values and steps >= LEAST_STEPS:
    mean, half = difference(values, reference)
  final = (paper or {}).get('final', {}).get(task, {})
  return dict(
    task=task,
    method=method,
    steps=steps,
    seeds=len(values),
    scores=scores,
    mean=float(np.mean(values)) if values else None,
    std=float(np.std(values)) if len(values) > 1 else None,
    paper=reference,
    paper_final=final.get('dreamer'),
    **{name: final.get(name) for name in BASELINES},
    difference=mean,
    interval=None if half is None else [mean - half, mean + half],
    verdict=paper and verdict(steps, len(values), reference, mean, half),
  )


def _scores(task, method, runs, window):
  """The last step that all runs reached, and {seed: score} there.

  Warns of runs that are left out, and where the others are much longer.
  """
  logged = [run for run in runs if len(run.steps)]
  lasts = [run.steps[-1] for run in logged]
  steps = float(min(lasts, default=0))
  steps = int(steps) if steps.is_integer() else steps
  if 0 < steps < max(lasts, default=0) / 2:
    run_folders.warn(
      f'{task}, {method}: compared at {steps} steps, where the shortest '
      f'run is; the longest has {max(lasts):.12g}'
    )
  scores = {run.seed: score(run, steps, window) for run in logged}
  scores = {k: v for k, v in scores.items() if np.isfinite(v)}
  for run in runs:
    if run.seed not in scores:
      run_folders.warn(
        f'{run.folder} is left out: it has nothing in the window of '
        f'{window:.12g} that ends at {steps}'
      )
  return steps, scores


def summarize(rows):
  """{method: figures over its tasks that can be held against the paper}."""
  methods = collections.defaultdict(list)
  for row in rows:
    if row['paper'] and row['seeds'] and row['steps'] >= LEAST_STEPS:
      methods[row['method']].append(row)
  return {method: _summary(group) for method, group in methods.items()}


def _summary(rows):
  ours = np.array([row['mean'] for row in rows])
  paper = np.array([row['paper']['mean'] for row in rows])
  summary = dict(
    tasks=len(rows),
    normalized=float(ours.mean() / SCALE),
    paper_normalized=float(paper.mean() / SCALE),
    share=float(np.mean(ours >= paper)),
    iqm=None,
    iqm_interval=None,
  )
  if all(row['seeds'] > 1 for row in rows):
    samples = [np.array(list(row['scores'].values())) / SCALE for row in rows]
    value, interval = interquartile_mean(samples)
    summary.update(iqm=value, iqm_interval=interval)
  return summary


def interquartile_mean(samples):
  """Mean of the middle half of all runs, with its 95% bootstrap interval.

  Seeds are drawn again within each task, as Agarwal et al. (2021) do. (Their
  package, rliable 1.2.0, does not import beside pandas 3.)

  Args:
    samples: for each task the scores of its runs, an array [seeds >= 2].

  Returns:
    The interquartile mean and (low, high).
  """

  def iqm(*tasks, axis=-1):
    return stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis=axis)

  result = stats.bootstrap(
    samples, iqm, n_resamples=5000, method='percentile', rng=0
  )
  return float(iqm(*samples)), [float(x) for x in result.confidence_interval]


# --- Reporting --------------------------------------------------------------


def number(value):
  if value is None:
    return '-'
  return f'{value:.2f}' if abs(value) < 10 else f'{value:.0f}'


def brief(value):
  return f'{value:.3g}'.replace('e+0', 'e').replace('e+', 'e')


# fmt: off
TITLES = (
  'task', 'method', 'steps', 'seeds', 'return', 'paper, at', 'difference',
  'verdict', 'paper 5e6', 'PlaNet 5e6', 'D4PG 1e8', 'A3C 1e8',
)
# fmt: on


def cells(row):
  """A row as (text, number or text to sort by), one for each of `TITLES`."""
  paper, result, gap = row['paper'], number(row['mean']), '-'
  if row['std'] is not None:
    result += f' ± {number(row["std"])}'
  if row['difference'] is not None:
    gap = f'{row["difference"]:+.0f}'
  if row['interval'] is not None:
    gap += f' ± {row["interval"][1] - row["difference"]:.0f}'
  at = f'{paper["mean"]:.0f}, {brief(paper["steps"])}' if paper else '-'
  return [
    *((str(row[k]), row[k]) for k in ('task', 'method', 'steps', 'seeds')),
    (result, row['mean']),
    (at, paper and paper['mean']),
    (gap, row['difference']),
    (row['verdict'] or '-', row['verdict']),
    *((number(row[k]), row[k]) for k in ('paper_final', *BASELINES)),
  ]


def table(rows):
  """The rows as a Markdown table, aligned."""
  texts = [TITLES, *([text for text, _ in cells(row)] for row in rows)]
  lines = [[_plain_cell(text) for text in line] for line in texts]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(
    '| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines
  )


def _plain_cell(text):
  """A text that ends neither its cell nor its row."""
  return ' '.join(text.split()).replace('|', r'\|')


def sentences(rows, summary, paper, axes, window):
  """Yields what stands below the table.

  Args:
    rows: from `compare`.
    summary: from `summarize`.
    paper: as for `compare`.
    axes: keys of metrics.jsonl, (x, y).
    window: in units of x.
  """
  xaxis, yaxis = axes
  line = (
    f'{yaxis}: mean ± standard deviation over seeds, each the mean of its last '
    f'{window:.12g} {unit(xaxis)}'
  )
  if not paper:
    yield line + '.'
    return
  yield line + '; difference ± half of its 95% interval.'
  yield 'The released curves ("paper, at") used earlier hyperparameters.'
  missing = sorted(set(paper['final']) - {row['task'] for row in rows})
  if len(missing) == len(paper['final']):
    yield 'No run of a task of the paper.'
  elif missing:
    count = f'{len(missing)} of the {len(paper["final"])}'
    names = ', '.join(missing[:3]) + ' and others' * (len(missing) > 3)
    yield f'No run of {count} tasks of the paper: {names}.'
  for method, s in summary.items():
    line = (
      f'{method}: tasks {s["tasks"]}, mean normalized score '
      f'{s["normalized"]:.3f} (paper {s["paper_normalized"]:.3f}), at or above '
      f'the paper in {s["share"]:.0%}'
    )
    if s['iqm'] is not None:
      low, high = s['iqm_interval']
      line += f', interquartile mean {s["iqm"]:.3f} [{low:.3f}, {high:.3f}]'
    yield line + '.'


def unit(xaxis):
  return 'environment steps' if xaxis == 'step' else f'of {xaxis}'


def figures(rows, summary, axes, window):
  """All of it for a file of JSON, with the rule; see `sentences`."""
  return dict(
    xaxis=axes[0],
    yaxis=axes[1],
    window=window,
    rows=rows,
    summary=summary,
    rule=rule(axes, window),
  )


def rule(axes, window):
  """What is compared, and by which rule: a list in Markdown."""
  text = __doc__.partition('by which rule:')[2].strip()
  text = text.replace('`--window`', f'{window:,.12g}')
  if axes == run_folders.AXES:
    return text
  first = text.partition('\n- ')[0]  # the others are of the paper
  first = first.replace('evaluation returns', axes[1])
  return first.replace('environment steps', unit(axes[0]))


def plot(groups, paper, outdir, xaxis, yaxis, bins):
  """Writes curves.png and curves.pdf, one panel a task; returns the paths."""
  from matplotlib.figure import Figure

  tasks = sorted({task for task, _ in groups})
  columns = min(4, len(tasks))
  rows = math.ceil(len(tasks) / columns)
  size = 3.6 * columns, 2.8 * rows + 0.7
  figure = Figure(figsize=size, layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  methods = sorted({method for _, method in groups})
  for panel, task in zip(panels, tasks, strict=False):
    last = 0
    for (other, method), runs in groups.items():
      if other == task:
        color = f'C{methods.index(method) % 10}'
        last = max(last, _draw_runs(panel, runs, _plain(method), color, bins))
    if paper and task in paper['final']:
      _draw_paper(panel, paper, task)
    panel.set_title(_plain(task), fontsize='medium')
    panel.set_xlim(0, 1.02 * last or None)
    panel.ticklabel_format(axis='x', style='sci', scilimits=(0, 4))
  for panel in panels[len(tasks) :]:
    panel.remove()
  figure.supxlabel('environment steps' if xaxis == 'step' else _plain(xaxis))
  figure.supylabel(_plain(yaxis))
  _add_legend(figure, panels[: len(tasks)], max(1, int(1.6 * columns)))
  paths = [outdir / 'curves.png', outdir / 'curves.pdf']
  for path in paths:
    with file_io.atomic_write(path) as file:
      figure.savefig(file, dpi=100, format=path.suffix[1:])
  return paths


def _add_legend(figure, panels, columns):
  """One legend above all panels, with each label once."""
  entries = {}
  for panel in panels:
    handles, labels = panel.get_legend_handles_labels()
    entries.update(zip(labels, handles, strict=True))
  figure.legend(
    entries.values(),
    entries,
    loc='outside upper center',
    ncols=columns,
    frameon=False,
    fontsize='small',
  )


def _plain(text):
  """Text that Matplotlib shows: no formula, and nothing that is not UTF-8."""
  text = text.encode('utf-8', 'backslashreplace').decode()
  return text.replace('$', r'\$')


def binned(runs, bins=-1):
  """Means of the scores in bins of environment steps.

  Args:
    runs: R runs that have scores.
    bins: width of a bin, in steps; not above 0: a thirtieth of the longest run.

  Returns:
    Where the N bins end, [N], and the means, [R, N], NaN where a run has none.
  """
  last = max([run.steps[-1] for run in runs], default=0)
  width = bins if bins > 0 else max(last, 0) / 30 or 1
  if last / width > 1e6:
    raise UserError(f'--bins {bins:g} is too small: choose {last / 1000:g}')
  count = max(0, math.ceil(last / width - 1e-9))
  edges = width * np.arange(count + 1)
  curves = np.full([len(runs), len(edges)], np.nan)
  for curve, run in zip(curves, runs, strict=True):
    index = np.digitize(run.steps, edges, right=True)
    index = np.minimum(index, count)  # as the last edge is rounded
    for i in np.unique(index):
      curve[i] = run.scores[index == i].mean()
  return edges, curves


def mean_curve(edges, curves):
  """Mean and deviation over runs, where all have begun and none has ended.

  Runs evaluate at different steps; between its bins each is interpolated.

  Args:
    edges, curves: from `binned`.

  Returns:
    M of the edges, which may be none, the means there, [M], and the standard
    deviations, [M].
  """
  lines = np.full_like(curves, np.nan)
  for line, curve in zip(lines, curves, strict=True):
    has = np.isfinite(curve)
    line[:] = np.interp(edges, edges[has], curve[has], np.nan, np.nan)
  shown = np.isfinite(lines).all(0) & np.isfinite(curves).any(0)
  return edges[shown], lines[:, shown].mean(0), lines[:, shown].std(0)


def _draw_runs(panel, runs, label, color, bins):
  """Each run, and mean and spread over seeds; returns where they end."""
  runs = [run for run in runs if len(run.steps)]
  edges, curves = binned(runs, bins)

  def draw(x, y, **style):
    panel.plot(x, y, color=color, marker='.' if len(x) == 1 else None, **style)

  for curve in curves:
    shown = np.isfinite(curve)
    thin = dict(linewidth=0.6, alpha=0.6) if len(runs) > 1 else {}
    draw(edges[shown], curve[shown], **thin)
  x, mean, std = mean_curve(edges, curves)
  draw(x, mean, linewidth=1.8, label=label)
  if len(runs) > 1:
    spread = dict(color=color, alpha=0.2, linewidth=0)
    panel.fill_between(x, mean - std, mean + std, **spread)
  return max(edges[np.isfinite(curves).any(0)], default=0)


def _draw_paper(panel, paper, task):
  """The released curve, and final scores as dashed lines."""
  curve = paper['curves'][task]
  steps, mean, std = (np.array(curve[k]) for k in ('steps', 'mean', 'std'))
  panel.plot(steps, mean, color='black', marker='.', label='paper, Dreamer')
  panel.fill_between(steps, mean - std, mean + std, color='black', alpha=0.15)
  dashes = dict(dreamer=(6, 2), planet=(4, 4), d4pg=(2, 2), a3c=(1, 3))
  for name, dash in dashes.items():
    final, about = paper['final'][task][name], paper['methods'][name]
    if final is not None:
      label = f'{about["name"]}, {brief(about["steps"])}'
      panel.axhline(final, color='0.4', dashes=dash, linewidth=1, label=label)
  panel.set_ylim(-20, SCALE * 1.03)


# --- The command ------------------------------------------------------------


def parse_flags(argv):
  parser = arguments.Parser(__doc__)
  add_run_flags(parser)
  parser.flag('--outdir', arguments.Path(), help='folder for the curves')
  parser.flag('--json', arguments.Path(), help='file for the figures')
  parser.flag(
    '--xaxis', arguments.Text(), 'step', 'key of metrics.jsonl (step)'
  )
  text = 'another key (test/return)'
  parser.flag('--yaxis', arguments.Text(), 'test/return', text)
  text = 'width of a point of the curves (by the steps)'
  parser.flag('--bins', arguments.Number(0, 1e15, above=True), -1, text)
  return parser.parse(argv)


def add_run_flags(parser):
  """Adds the flags of which runs are compared, and over how many steps."""
  folder, text = arguments.Path(), 'folders of runs'
  parser.flag('--indir', folder, help=text, required=True, nargs='+')
  text = 'environment steps averaged (1e5)'
  parser.flag('--window', arguments.Number(0, 1e15, above=True), 1e5, text)
  for name in ('tasks', 'methods'):
    text = 'regular expressions, any of which may match'
    parser.flag(f'--{name}', arguments.Pattern(), ['.*'], text, nargs='+')


def run(argv):
  args = parse_flags(argv)
  file_io.make_outputs(args.json, args.outdir)
  with file_io.file_errors():
    groups = _find_groups(args)
  axes = args.xaxis, args.yaxis
  paper = load_paper() if axes == run_folders.AXES else None
  rows = compare(groups, paper, args.window)
  summary = summarize(rows)
  print(table(rows), end='\n\n')
  for line in sentences(rows, summary, paper, axes, args.window):
    print(line)
  with file_io.file_errors():
    if args.json:  # first, as a picture may be refused
      file_io.write_json(args.json, figures(rows, summary, axes, args.window))
    if args.outdir:
      for path in plot(groups, paper, args.outdir, *axes, args.bins):
        print(f'Wrote {path}.')


def _find_groups(args):
  """From `run_folders.group_runs`, by the flags."""
  runs = run_folders.find_runs(args.indir, args.xaxis, args.yaxis)
  runs = run_folders.select(runs, args.tasks, args.methods)
  groups = run_folders.group_runs(runs)
  if not any(len(r.steps) for group in groups.values() for r in group):
    raise UserError(
      f'no run has {args.yaxis} by {args.xaxis} in its metrics.jsonl yet'
      + _why(runs, args.xaxis, args.yaxis)
    )
  return groups


def _why(runs, xaxis, yaxis):
  """Why no run has one key by another, as a message goes on."""
  if (xaxis, yaxis) == run_folders.AXES:
    return ': no evaluation has finished'
  keys = set().union(*(run_folders.keys_of(run.folder) for run in runs))
  for flag, key in (('--xaxis', xaxis), ('--yaxis', yaxis)):
    if key not in keys:
      hint = cli.nearest(key, sorted(keys))
      return f': there is no {key} in any ({flag}){hint}'
  return ': no line has both'


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('compare.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
