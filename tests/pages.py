"""Runs on disk to be compared and shown, and their pages."""

import html.parser
import json
import pathlib
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np

import configs

ROOT = pathlib.Path(__file__).parents[1]
WALK = 'dmc_walker_walk'  # at 1e5 steps 137.2 with 57.7 over 5 seeds
HOSTILE = 'gym_<script>alert("x")</script> & \'ümläut\' ${1} {{ 7*7 }}'
EVIL = '"><img src=x onerror=alert(1)>'


class Page(html.parser.HTMLParser):
  """Elements and texts of a page, as a browser would see them.

  Attributes:
    elements: (name, {attribute: value}) each.
    texts: what stands between them.
  """

  def __init__(self, path):
    super().__init__()
    self.elements, self.texts = [], []
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.texts += [' '.join(data.split())] if data.strip() else []

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def write_run(folder, task, seed, pairs, method='dreamer', **flags):
  """A logdir as dreamer.py leaves it, with evaluations `pairs`."""
  folder.mkdir(parents=True)
  config = dict(
    dict(preset='release', task=task, seed=seed, horizon=15), **flags
  )
  record = dict(method=method, format=1, config=config)
  (folder / 'config.json').write_text(json.dumps(record))
  write_metrics(folder, pairs)
  return folder


def write_metrics(folder, pairs):
  folder.mkdir(parents=True, exist_ok=True)
  lines = [{'step': 1000, 'train/return': 5.0, 'episodes': 1.0}]
  lines += [{'step': s, 'test/return': r, 'episodes': 9.0} for s, r in pairs]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)


def full_config(task, seed, **flags):
  """All flags, as a config.json has them."""
  config = configs.define_config(task, flags.pop('preset', 'release'))
  return {**config, 'seed': seed, 'logdir': f'./logdir/{seed}', **flags}


def write_runs(folder):
  """Runs of many kinds: several seeds, young, broken, old, with bad names."""
  for seed in range(3):
    pairs = [(s, s / 300 + 50 * seed) for s in range(10_000, 160_000, 10_000)]
    path = folder / f'walk {seed}'
    flags = full_config(WALK, seed, horizon=10)
    del flags['task'], flags['seed']
    write_run(path, WALK, seed, pairs, **flags)
    add_lines(path, seed)
  cheetah = [(100_000, 100.0), (100_000, 300.0)]
  write_run(folder / 'cheetah', 'dmc_cheetah_run', 0, cheetah, 'planet')
  write_run(folder / 'young', 'toy_reach', 0, [])
  write_run(folder / 'old', 'toy_catch', 0, [(500, 1.0)], long_gone=7)
  with (folder / 'old/metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 600, "test/return": 0.5}\n{"step": 700, "te')
  bad = write_run(folder / 'bad', HOSTILE, 0, [(1000, 1.0)], f'm{EVIL}')
  record = json.loads((bad / 'config.json').read_text())
  record.update(machine=EVIL, code=EVIL, note=EVIL, versions={EVIL: EVIL})
  (bad / 'config.json').write_text(json.dumps(record))
  write_metrics(folder / f'toy_reach/a "b" <i> ü {EVIL[:9]}/0', [(900, 4.0)])
  return folder


def add_lines(path, seed):
  """Losses and training returns; the first 5,000 steps are random."""
  with (path / 'metrics.jsonl').open('a') as file:
    for step in range(1000, 150_000, 1000):
      first = step <= 5000
      numbers = dict(div=20 - step / 1e4 + seed, image_loss=11300.0)
      numbers.update({'train/return': 42.0 if first else 300.0})
      numbers.update(saturated=0.1, test_saturated=0.2, imag_value=9.0)
      file.write(json.dumps({'step': step, **numbers}) + '\n')


def write_pictures(folder):
  """A behavior as GIF, a prediction as GIF, one as PNG, and a broken one."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  video = rng.integers(0, 255, (30, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
  video = video.astype(np.uint8)
  for name in ('walker_walk', 'walker_walk-openl', 'dmc_cheetah_run-behavior'):
    imageio.imwrite(folder / f'{name}.gif', video, loop=0, duration=50)
  imageio.imwrite(folder / 'cheetah_run-prediction.png', video[0])
  (folder / 'toy_reach.gif').write_bytes(b'GIF89a nonsense')
  (folder / 'walker_walk.txt').write_text('no picture')
  return folder


def make_site(indir, outdir, *words, env=None):
  """Runs report.py in a process of its own."""
  command = [sys.executable, ROOT / 'report.py', '--indir', indir]
  done = subprocess.run(
    [*command, '--outdir', outdir, *words],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr
  return done
