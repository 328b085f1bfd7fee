"""Exploration in training (`--expl`): amount and kinds (Appendix A).

The kinds are functions of actions [E, A], an amount (float scalar), a seed
int32 [2] and the numbers of choices of discrete actions or None; all return
actions [E, A]. Letters in shapes: E environments, A action.
"""

import tensorflow as tf


def amount(config, step, updates, training=True):
  """Scale of the noise, or chance of a random action.

  Args:
    config: from `configs.define_config`.
    step, updates: environment steps and updates so far.
    training: else that of evaluations.

  Returns:
    float.
  """
  c = config
  if not training:
    return c.eval_noise
  if c.expl_decay:
    return max(c.expl_min, c.expl_amount * 0.5 ** (step / c.expl_decay))
  if c.expl_ramp:
    passed = min(1.0, updates / c.expl_ramp)
    return c.expl_amount + passed * (c.expl_min - c.expl_amount)
  return max(c.expl_min, c.expl_amount)


def additive_gaussian(action, noise, seed, choices=None):
  """Normal noise on continuous actions, clipped to [-1, 1]."""
  normal = tf.random.stateless_normal(tf.shape(action), seed)
  return tf.clip_by_value(action + noise * normal, -1.0, 1.0)


def epsilon_greedy(action, noise, seed, choices=None):
  """Uniformly random actions, with probability `noise` in each environment."""
  seed_of_chance = tf.bitwise.invert(seed)
  chance = tf.random.stateless_uniform(tf.shape(action)[:1], seed_of_chance)
  fair = _fair(action, seed, choices)
  return tf.where(chance[:, None] < noise, fair, action)


def completely_random(action, noise, seed, choices=None):
  """Uniformly random actions, unless the amount is zero."""
  return tf.where(noise > 0, _fair(action, seed, choices), action)


def _fair(action, seed, choices):
  """Uniformly random actions [E, A]."""
  uniform = tf.random.stateless_uniform(tf.shape(action), seed)
  if not choices:
    return 2.0 * uniform - 1.0
  # The index of the largest of n uniform numbers is uniform over n choices.
  parts = tf.split(uniform, choices, -1)
  parts = [tf.one_hot(tf.argmax(x, -1), x.shape[-1]) for x in parts]
  return tf.concat(parts, -1)


KINDS = dict(
  additive_gaussian=additive_gaussian,
  epsilon_greedy=epsilon_greedy,
  completely_random=completely_random,
)
