"""What lies in a logdir."""

import json

import numpy as np
import tensorflow as tf


def read_metrics(logdir):
  """Lines of metrics.jsonl."""
  lines = (logdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def metrics_but_fps(logdir):
  """Lines of metrics.jsonl without what depends on the clock."""
  return [
    {k: v for k, v in line.items() if k != 'fps'}
    for line in read_metrics(logdir)
  ]


def read_episodes(logdir):
  """All arrays of all episodes, in order."""
  episodes = []
  for path in sorted(logdir.glob('episodes/*.npz')):
    with np.load(path, allow_pickle=False) as file:
      episodes.append({k: file[k].tobytes() for k in sorted(file.files)})
  return episodes


def read_weights(logdir):
  """All that the newest checkpoint holds: networks, optimizers, counters."""
  numbers = [int(p.stem[5:]) for p in logdir.glob('checkpoints/ckpt-*.index')]
  path = logdir / f'checkpoints/ckpt-{max(numbers)}'
  reader = tf.train.load_checkpoint(str(path))
  own = ('_CHECKPOINTABLE_OBJECT_GRAPH', 'save_counter')
  return {
    name: np.asarray(reader.get_tensor(name)).tobytes()
    for name in reader.get_variable_to_shape_map()
    if not name.startswith((*own, 'run/'))
  }


def everything(logdir):
  """What an exact run repeats to the last bit."""
  return metrics_but_fps(logdir), read_episodes(logdir), read_weights(logdir)
