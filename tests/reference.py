"""An update as the equations read, of stock Keras layers and loops.

    python tests/reference.py --repeats 7
    python tests/reference.py --precision 32 --preset cpu

What `Dreamer.train` is held against: same weights, batch and noise give the
same losses and gradients (test_dreamer.py), and as a script this times both in
turn, at full size, on random images. The plain update is in float32, with
whatever is usual: transposed convolutions of Keras, loops that Python unrolls,
a forward pass of the value model for each of Eq. 7 and 8, and an entropy of
the action model from 100 samples at each state, for the log.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import gym
import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from tensorflow_probability import distributions as tfd

import configs
import dreamer
import run_setup
import tools

LAYER = dict(dtype='float32')


class Reference:
  """Copies of an agent's networks, and their losses and gradients (float32).

  Args:
    agent: `dreamer.Dreamer`, with continuous actions and without `pcont`.
  """

  def __init__(self, agent):
    self._agent, c = agent, agent._c
    self._c = c
    depth, elu = c.cnn_depth, dict(activation='elu', **LAYER)
    self._encoder = [
      kl.Conv2D(n * depth, 4, 2, activation='relu', **LAYER)
      for n in (1, 2, 4, 8)
    ]
    deconv = kl.Conv2DTranspose
    self._decoder = [
      kl.Dense(32 * depth, **LAYER),
      deconv(4 * depth, 5, 2, activation='relu', **LAYER),
      deconv(2 * depth, 5, 2, activation='relu', **LAYER),
      deconv(depth, 6, 2, activation='relu', **LAYER),
      deconv(3, 6, 2, **LAYER),
    ]
    self._gru = kl.GRUCell(c.deter_size, **LAYER)
    self._img1 = kl.Dense(c.deter_size, **elu)
    self._img2 = kl.Dense(c.deter_size, **elu)
    self._img3 = kl.Dense(2 * c.stoch_size, **LAYER)
    self._obs1 = kl.Dense(c.deter_size, **elu)
    self._obs2 = kl.Dense(2 * c.stoch_size, **LAYER)

    def head(layers, size):
      hidden = [kl.Dense(c.num_units, **elu) for _ in range(layers)]
      return [*hidden, kl.Dense(size, **LAYER)]

    self._reward = head(c.reward_layers, 1)
    self._value = head(c.value_layers, 1)
    self._actor = head(c.actor_layers, 2 * agent.actions)
    self.groups = dict(
      model=[
        *self._encoder,
        *(self._gru, self._img1, self._img2, self._img3),
        *(self._obs1, self._obs2, *self._decoder, *self._reward),
      ],
      actor=self._actor,
      value=self._value,
    )
    self._build()
    self._opts = {
      name: keras.optimizers.Adam(
        c[f'{name}_lr'], global_clipnorm=c.grad_clip, epsilon=c.opt_eps
      )
      for name in self.groups
    }
    for name, opt in self._opts.items():
      opt.build(self.variables(name))
    self.update = tf.function(self._update)

  def variables(self, name):
    """Of one optimizer, in the order of the agent's."""
    return [v for layer in self.groups[name] for v in layer.trainable_variables]

  def _build(self):
    """Runs all networks once, and copies the weights."""
    embed = self._encode(tf.zeros([1, 64, 64, 3]))
    state = self._agent.world.dynamics.initial(1)
    state, _ = self._observe(
      state, tf.zeros([1, self._agent.actions]), embed, tf.zeros(2, tf.int32)
    )
    feat = self._feat(state)
    self._decode(feat)
    for layers in (self._reward, self._value, self._actor):
      self._run(layers, feat)
    for name in self.groups:
      own, given = self.variables(name), self._agent.optimizers[name].variables
      for variable, source in zip(own, given, strict=True):
        variable.assign(source)

  def _run(self, layers, x):
    for layer in layers:
      x = layer(x)
    return x

  def _encode(self, image):
    x = self._run(self._encoder, tf.reshape(image, [-1, 64, 64, 3]))
    return tf.reshape(x, [*image.shape[:-3], -1])

  def _decode(self, feat):
    x = self._decoder[0](tf.reshape(feat, [-1, feat.shape[-1]]))
    x = self._run(self._decoder[1:], x[:, None, None])
    mean = tf.reshape(x, [*feat.shape[:-1], 64, 64, 3])
    return tfd.Independent(tfd.Normal(mean, 1.0), 3)

  def _head(self, layers, feat):
    return tfd.Normal(self._run(layers, feat)[..., 0], 1.0)

  def _policy(self, feat):
    """Eq. 3."""
    mean, std = tf.split(self._run(self._actor, feat), 2, -1)
    mean = 5.0 * tf.tanh(mean / 5.0)
    raw = np.log(np.expm1(self._c.action_init_std)).astype(np.float32)
    std = tf.nn.softplus(std + raw) + 1e-4
    dist = tfd.TransformedDistribution(
      tfd.Normal(mean, std), tools.TanhBijector()
    )
    return tools.SampleDist(tfd.Independent(dist, 1))

  def _feat(self, state):
    return tf.concat([state['stoch'], state['deter']], -1)

  def _gaussian(self, x, seed):
    mean, std = tf.split(x, 2, -1)
    std = tf.nn.softplus(std) + 0.1
    stoch = mean + std * tf.random.stateless_normal(tf.shape(mean), seed)
    return dict(mean=mean, std=std, stoch=stoch)

  def _transit(self, state, action, seed):
    """The transition model of Eq. 9, on states [B, ...]."""
    x = self._img1(tf.concat([state['stoch'], action], -1))
    deter, _ = self._gru(x, [state['deter']])
    stats = self._gaussian(self._img3(self._img2(deter)), seed)
    return dict(stats, deter=deter)

  def _observe(self, state, action, embed, seed):
    """The representation model of Eq. 9: posterior and prior [B, ...]."""
    prior = self._transit(state, action, seed)
    x = self._obs1(tf.concat([prior['deter'], embed], -1))
    stats = self._gaussian(self._obs2(x), tf.bitwise.invert(seed))
    return dict(stats, deter=prior['deter']), prior

  def _model_loss(self, data):
    """Eq. 10, a scalar, and posterior states {...: [B, T, ...]}."""
    agent, steps = self._agent, data['action'].shape[1]
    seeds = agent.seeds(steps, 0)
    embed = self._encode(data['image'])
    state = agent.world.dynamics.initial(len(embed))
    posts, priors = [], []
    for t in range(steps):
      state, prior = self._observe(
        state, data['action'][:, t], embed[:, t], seeds[t]
      )
      posts.append(state)
      priors.append(prior)
    post, prior = (
      {k: tf.stack([s[k] for s in states], 1) for k in states[0]}
      for states in (posts, priors)
    )
    feat = self._feat(post)
    image = tf.reduce_mean(self._decode(feat).log_prob(data['image']))
    reward = self._head(self._reward, feat).log_prob(data['reward'])
    dists = [
      tfd.Independent(tfd.Normal(s['mean'], s['std']), 1) for s in (post, prior)
    ]
    div = tf.reduce_mean(tfd.kl_divergence(*dists))
    loss = self._c.kl_scale * tf.maximum(div, self._c.free_nats)
    return loss - image - tf.reduce_mean(reward), post  # Eq. 10

  def _dream(self, post):
    """Features of imagined states, a list of [N, F]."""
    seeds = self._agent.seeds(2 * self._c.horizon, 1)
    state = {
      k: tf.reshape(tf.stop_gradient(v), [-1, v.shape[-1]])
      for k, v in post.items()
    }
    feats = []
    for t in range(self._c.horizon):
      dist = self._policy(tf.stop_gradient(self._feat(state)))
      action = dist.sample(seed=seeds[2 * t])
      state = self._transit(state, action, seeds[2 * t + 1])
      feats.append(self._feat(state))
    return feats

  def _returns(self, rewards, values):
    """V_lambda [H-1, N] of lists of [N], for the states but the last."""
    c, returns = self._c, [values[-1]]
    for t in reversed(range(len(rewards) - 1)):
      following = (1 - c.disclam) * values[t + 1] + c.disclam * returns[0]
      returns.insert(0, rewards[t] + c.discount * following)  # Eq. 6
    return tf.stack(returns[:-1])

  def losses(self, data):
    """Of model, actor and value (Eq. 10, 7, 8), as {name: (tape, loss)}.

    And the posterior features.
    """
    with tf.GradientTape() as model_tape:
      model, post = self._model_loss(data)
    with tf.GradientTape() as actor_tape:
      feat = tf.stack(self._dream(post))
      reward = self._head(self._reward, feat).mean()
      value = self._head(self._value, feat).mean()
      returns = self._returns(tf.unstack(reward), tf.unstack(value))
      weights = self._c.discount ** np.arange(len(returns), dtype=np.float32)
      actor = -tf.reduce_mean(weights[:, None] * returns)  # Eq. 7
    with tf.GradientTape() as value_tape:
      dist = self._head(self._value, tf.stop_gradient(feat[:-1]))
      like = dist.log_prob(tf.stop_gradient(returns))
      value = -tf.reduce_mean(weights[:, None] * like)  # Eq. 8
    losses = dict(
      model=(model_tape, model),
      actor=(actor_tape, actor),
      value=(value_tape, value),
    )
    return losses, self._feat(post)

  def gradients(self, data):
    """Losses and gradients by name, and the posterior features."""
    losses, feat = self.losses(data)
    grads = {
      name: tape.gradient(loss, self.variables(name))
      for name, (tape, loss) in losses.items()
    }
    return {k: loss for k, (_, loss) in losses.items()}, grads, feat

  def _update(self, data):
    data = dreamer.preprocess(data, self._c)
    metrics, grads, feat = self.gradients(data)
    for name, opt in self._opts.items():
      opt.apply(grads[name], self.variables(name))
    metrics['entropy'] = tf.reduce_mean(self._policy(feat).entropy())
    return metrics


# What presets add to the equations of the paper, left out of both.
EQUATIONS = dict(imag_starts=0, kl_balance=0.0, actor_entropy=0.0, slow_value=0)


def random_batch(config, actions):
  """Noise of the shapes of a batch: what is timed does not look at it."""
  rng = np.random.default_rng(0)
  shape = [config.batch_size, config.batch_length]
  return dict(
    image=rng.integers(0, 256, [*shape, 64, 64, 3], np.uint8),
    action=rng.uniform(-1, 1, [*shape, actions]).astype(np.float32),
    reward=rng.uniform(0, 1, shape).astype(np.float32),
    discount=np.ones(shape, np.float32),
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  presets = 'release', *configs.PRESETS
  parser.add_argument('--preset', default='release', choices=presets)
  precisions = 'auto', '32', 'bfloat16'
  parser.add_argument('--precision', default='auto', choices=precisions)
  parser.add_argument('--actions', type=int, default=6)
  parser.add_argument('--repeats', type=int, default=7)
  args = parser.parse_args()
  config = dreamer.define_config('dmc_walker_walk', args.preset)
  config.update(EQUATIONS)
  run_setup.setup_precision(args.precision)
  space = gym.spaces.Box(-1, 1, (args.actions,), np.float32)
  agent = dreamer.Dreamer(config, space)
  reference = Reference(agent)
  batch = random_batch(config, args.actions)
  calls = dict(
    reference=lambda: reference.update(batch)['model'].numpy(),
    dreamer=lambda: agent.train(batch)['model_loss'].numpy(),
  )
  times = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(args.repeats):  # in turn, as other jobs come and go
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  for name, values in times.items():
    middle, low, high = np.median(values), min(values), max(values)
    print(f'{name:10} {middle:7.3f} s  ({low:.3f} to {high:.3f})')
  ratios = np.divide(times['dreamer'], times['reference'])
  low, high = min(ratios), max(ratios)
  print(f'ratio      {np.median(ratios):7.3f}    ({low:.3f} to {high:.3f})')


if __name__ == '__main__':
  main()
