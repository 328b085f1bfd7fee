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
import sys

import cli
import file_io

with cli.interruptible():
  import numpy as np
  from scipy import stats

import arguments
import paper_scores
import plots
import run_folders
from cli import UserError
from paper_scores import BASELINES, SCALE, brief

MARGIN = 10  # a difference in return that does not matter
LEAST_SEEDS = 3
LEAST_STEPS = 90_000


# --- Comparing --------------------------------------------------------------


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
    paper: from `paper_scores.load`, or None to leave it out.
    window: environment steps.
  """
  return [_row(*key, runs, paper, window) for key, runs in groups.items()]


def _row(task, method, runs, paper, window):
  steps, scores = _scores(task, method, runs, window)
  values = list(scores.values())
  reference = paper and paper_scores.published(paper, task, steps)
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
  paper = paper_scores.load() if axes == run_folders.AXES else None
  rows = compare(groups, paper, args.window)
  summary = summarize(rows)
  print(table(rows), end='\n\n')
  for line in sentences(rows, summary, paper, axes, args.window):
    print(line)
  with file_io.file_errors():
    if args.json:  # first, as a picture may be refused
      file_io.write_json(args.json, figures(rows, summary, axes, args.window))
    if args.outdir:
      for path in plots.plot(groups, paper, args.outdir, *axes, args.bins):
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
