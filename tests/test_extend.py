"""The recipes of docs/extend.md: applied to a copy, and trained with."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import tensorflow as tf

from logdirs import read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'extend.md').read_text()
REACH = ('--task', 'toy_reach', '--parallel', 'none')
TITLE = re.compile(r'^## (?:A |An )?(.*)$', re.MULTILINE)
BLOCK = re.compile(
  r'^```python\n# (\S+\.py)(?:, (before|after): ([^\n]*))?\n(.*?)^```$',
  re.MULTILINE | re.DOTALL,
)


def recipe(title):
  """[(file, 'before', 'after' or '', the line meant, code)] of a section."""
  parts = TITLE.split(PAGE)
  sections = dict(zip(parts[1::2], parts[2::2], strict=True))
  return BLOCK.findall(sections[title])


def apply(title, folder):
  """Copies the repository's scripts and follows a recipe there."""
  for path in ROOT.glob('*.py'):
    shutil.copy(path, folder)
  blocks = recipe(title)
  for name, place, line, code in blocks:
    path = folder / name
    text = path.read_text() if path.exists() else ''
    if place:
      assert text.count(f'{line}\n') == 1, f'{name} has no line {line!r}'
      both = [f'{line}\n', code][:: 1 if place == 'after' else -1]
      text = text.replace(f'{line}\n', ''.join(both))
    else:
      text += f'\n\n{code}' if text else code
    path.write_text(text)
  return {name for name, *_ in blocks}


def train(folder, *flags):
  """A debug run of the copy: its metrics, merged, and its method."""
  command = [sys.executable, 'dreamer.py', '--logdir', 'run']
  flags = ['--preset', 'debug', '--precision', '32', '--steps', '500', *flags]
  flags += ['--pretrain', '2', '--train_steps', '1']
  done = subprocess.run(
    [*command, *flags], cwd=folder, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-2000:]
  config = json.loads((folder / 'run' / 'config.json').read_text())
  metrics = {
    k: v for line in read_metrics(folder / 'run') for k, v in line.items()
  }
  return metrics, config['method']


def check_style(folder, names):
  ruff = [sys.executable, '-m', 'ruff', 'check', '--config']
  settings = str(ROOT / 'pyproject.toml')
  paths = sorted(names)
  subprocess.run([*ruff, settings, *paths], cwd=folder, check=True)


def test_a_suite(tmp_path):
  names = apply('suite', tmp_path)
  assert names == {'line.py', 'suites.py'}
  check_style(tmp_path, names)
  metrics, _ = train(tmp_path, '--task', 'line_easy')
  assert metrics['step'] == 500 and 0 < metrics['test/return'] < 100
  command = [sys.executable, 'dreamer.py', '--logdir=other', '--task=line_eas']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 2 and 'line_easy' in done.stderr


def test_a_representation(tmp_path):
  names = apply('representation', tmp_path)
  assert names == {'thumbnail.py', 'configs.py'}
  check_style(tmp_path, names)
  flags = '--representation', 'thumbnail'
  metrics, method = train(tmp_path, *REACH, *flags)
  assert method == 'dreamer-thumbnail'
  assert metrics['thumbnail_loss'] > 0 and 'image_loss' not in metrics


def test_a_behavior(tmp_path):
  names = apply('behavior', tmp_path)
  assert names == {'shooting.py', 'configs.py'}
  check_style(tmp_path, names)
  flags = '--behavior', 'shooting', '--plan_candidates', '100'
  metrics, method = train(tmp_path, *REACH, *flags)
  assert method == 'shooting'
  assert metrics['test/return'] > 0 and 'actor_loss' not in metrics


def test_a_head(tmp_path):
  names = apply('head', tmp_path)
  assert names == {'world_model.py'}
  check_style(tmp_path, names)
  metrics, _ = train(tmp_path, *REACH)
  assert metrics['brightness_loss'] > 0
  newest = tf.train.latest_checkpoint(tmp_path / 'run' / 'checkpoints')
  saved = [name for name, _ in tf.train.list_variables(newest)]
  assert any(name.startswith('brightness/') for name in saved)


def test_a_flag(tmp_path):
  names = apply('flag', tmp_path)
  assert names == {'behaviors.py', 'configs.py'}
  check_style(tmp_path, names)
  metrics, _ = train(tmp_path, *REACH, '--actor_halving', '10')
  assert metrics['actor_loss'] != 0
  code = """
import types
import behaviors, commandline
config = commandline.parse_flags(['--logdir=run', '--actor_halving=10'])
behavior = types.SimpleNamespace(_c=config)
print(behaviors.Behavior.learning_rate(behavior, 'actor', 20) / config.actor_lr)
"""
  out = subprocess.check_output([sys.executable, '-c', code], cwd=tmp_path)
  assert float(out) == 0.25
