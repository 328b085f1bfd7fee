"""toy_reach: the 2020 release beside this code, from the curves in scores/.

    python scores/release.py
    python dreamer.py --logdir ./logdir/reach --task toy_reach --precision 32 \\
      --seed 0 --steps 8000

Prints the mean training return of each 500 environment steps: that of the
release as it was measured (scores/release.json says how), and that of the runs
in scores/runs/toy_reach/dreamer, which the second command repeats.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np

import arguments
import cli

SCORES = pathlib.Path(__file__).parent
WIDTH = 500


def returns(folder):
  """Mean training return of each `WIDTH` steps of one run."""
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'train/return' in row]
  bins = np.array([-(-row['step'] // WIDTH) for row in rows])
  values = np.array([row['train/return'] for row in rows])
  return [values[bins == i].mean() for i in range(1, bins.max() + 1)]


def run(argv):
  arguments.Parser(__doc__).parse(argv)
  folders = sorted((SCORES / 'runs/toy_reach/dreamer').iterdir())
  record = json.loads((SCORES / 'release.json').read_text())
  curves = {f'{k} (3 seeds)': v for k, v in record['returns'].items()}
  ours = np.mean([returns(folder) for folder in folders], 0)
  curves[f'scores/runs ({len(folders)} seeds)'] = ours
  for name, values in curves.items():
    print(f'{name:30}', *(f'{round(value):2}' for value in values))


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('release.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
