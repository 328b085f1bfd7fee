"""Small agents, batches for them, and runs in this process."""

import contextlib
import pathlib

import keras
import numpy as np
import tensorflow as tf

import cli
import dreamer
import tools
from spaces import gym

SMALL = {
  'deter_size': 8,
  'stoch_size': 3,
  'num_units': 8,
  'cnn_depth': 2,
  'batch_size': 2,
  'batch_length': 5,
  'horizon': 4,
}


@contextlib.contextmanager
def eagerly():
  """Without graphs, which take longer to make than ten small updates."""
  before = tf.config.functions_run_eagerly()
  tf.config.run_functions_eagerly(True)
  try:
    yield
  finally:
    tf.config.run_functions_eagerly(before)


def run_here(words):
  """Exit code of `dreamer.main`, for a run of few updates."""
  with cli.kept_signals(), eagerly():
    return dreamer.main(words)


def random_episode(rng, rows=12, size=2):
  return {
    'image': rng.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8),
    'action': rng.uniform(-1, 1, (rows, size)).astype(np.float32),
    'reward': rng.uniform(0, 1, rows).astype(np.float32),
    'discount': np.ones(rows, np.float32),
  }


def make_agent(folder, size=2, **changes):
  """A small agent with three episodes to learn from."""
  keras.utils.set_random_seed(0)
  config = dreamer.define_config()
  config.update(SMALL, logdir=pathlib.Path(folder), **changes)
  datadir = config.logdir / 'episodes'
  rng = np.random.default_rng(0)
  tools.save_episodes(datadir, [random_episode(rng, 12, size) for _ in '123'])
  space = gym.spaces.Box(-1, 1, (size,), np.float32)
  return dreamer.Dreamer(config, space)


def batch_of(agent):
  folder = agent._c.logdir / 'episodes'
  return next(dreamer.load_dataset(folder, agent._c))


def model_losses(agent, batch=None):
  """Loss of the world model, metrics, posterior."""
  batch = batch_of(agent) if batch is None else batch
  data = dreamer.preprocess(batch, agent._c)
  seeds = agent.seeds(data['action'].shape[1], 0)
  losses, metrics, post = agent.world.losses(data, seeds)
  return losses['model'], metrics, post


def weights(opt):
  return [v.numpy().copy() for v in opt.variables]


def moved(opt, before):
  return any((a != b).any() for a, b in zip(weights(opt), before, strict=True))
