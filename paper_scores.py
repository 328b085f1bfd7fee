"""The paper's figures: scores/paper.json."""

import json
import pathlib

import numpy as np

from cli import UserError

PAPER = pathlib.Path(__file__).with_name('scores') / 'paper.json'
BASELINES = ('planet', 'd4pg', 'a3c')
SCALE = 1000  # the largest return of a control suite task


def load():
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


def brief(value):
  return f'{value:.3g}'.replace('e+0', 'e').replace('e+', 'e')
