"""Curves of runs beside the paper's, with Matplotlib."""

import math

import numpy as np

import file_io
from cli import UserError
from paper_scores import SCALE, brief


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
