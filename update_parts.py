"""The parts of an update as functions of their own, and its multiplications."""

import functools

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import numpy as np
import tensorflow as tf

from layers import Tapes


def wait(tensors):
  """Until they are computed."""
  tf.nest.flatten(tensors)[-1].numpy()


def pieces(agent, batch, config):
  """The parts of an update as functions, on the same batch."""
  data = agent.world.preprocess(batch)
  seeds = agent.seeds(data['action'].shape[1], 0)
  _, _, post = agent.world.losses(data, seeds)
  opts = list(agent.optimizers.values())
  zeros = [[tf.zeros(v.shape) for v in opt.variables] for opt in opts]
  return {
    **_world_pieces(agent, data, post, seeds),
    **_behavior_pieces(agent, post, agent.seeds(2 * config.horizon, 1)),
    'optimizers': _graph(agent)(
      lambda: [o.apply(g) for o, g in zip(opts, zeros, strict=True)]
    ),
  }


def _graph(agent):
  return functools.partial(tf.function, autograph=False, jit_compile=agent.jit)


def _gradient(agent, loss, names, *inputs):
  """A function for the gradients by the weights of networks and `inputs`."""
  networks = agent.networks()
  layers = [networks[name] for name in names if name in networks]
  variables = [v for layer in layers for v in layer.trainable_variables]

  @_graph(agent)
  def run():
    given = [tf.identity(x) for x in inputs]
    with Tapes(variables) as tapes:
      tapes.watch(given)
      result = loss(*given)
    return tapes.gradient(result, variables, inputs=given)

  return run


def _world_pieces(agent, data, post, seeds):
  world = agent.world
  embed, feat = world.embed(data), world.dynamics.get_feat(post)

  def encode():
    return tf.reduce_sum(tf.cast(world.embed(data), tf.float32))

  def observe(embed):
    states = world.dynamics.observe(embed, data['action'])
    return sum(tf.reduce_sum(s[k]) for s in states for k in ('mean', 'std'))

  def heads(feat):
    terms = world.representation.likes(feat, embed, data, seeds[0])
    for name, head in world.heads.items():
      target = data['discount' if name == 'pcont' else name]
      terms[name] = head(feat).log_prob(target)
    return -sum(tf.reduce_mean(term) for term in terms.values())

  encoders = [name for name in world.networks if name.startswith('encode')]
  decoders = world.networks.keys() - {'dynamics', *encoders}
  return {
    'encoder': _gradient(agent, encode, encoders),
    'observe': _gradient(agent, observe, ['dynamics'], embed),
    'decoder_heads': _gradient(agent, heads, decoders, feat),
  }


def _behavior_pieces(agent, post, seeds):
  behavior, found = agent.behavior, {}
  if 'actor' in behavior.networks:
    found['imagination_actor'] = _gradient(
      agent, lambda: behavior.actor_loss(post, seeds)[0], ['actor']
    )
  if 'value' in behavior.networks:
    imag = behavior.actor_loss(post, seeds)[1]
    dream, _ = behavior.imagine(post, seeds)

    def value():  # the forward pass is shared with the actor's loss
      given = dict(imag, value=behavior.value(dream)[:-1].mean())
      return behavior.value_loss(**given)[0]

    found['value'] = _gradient(agent, value, ['value'])
  return found


def flops(agent, config):
  """Multiplications and additions of an update's matrix products.

  Each weight of a dense layer is used once for each row, of a convolution once
  for each pixel of its smaller side. A gradient by the inputs and one by the
  weights cost as much as the forward pass; counted are those that are needed
  where every layer is computed on its own.
  """
  images = config.batch_size * config.batch_length
  steps = images * config.horizon

  networks = agent.networks()

  def dense(*names):
    layers = (networks[name] for name in names)
    weights = [v for layer in layers for v in layer.trainable_variables]
    return sum(int(np.prod(v.shape)) for v in weights if len(v.shape) == 2)

  def convs(name, sizes):
    weights = networks[name].trainable_variables
    kernels = [v for v in weights if len(v.shape) == 4]
    pairs = zip(kernels, sizes, strict=True)
    return [int(np.prod(k.shape)) * size**2 for k, size in pairs]

  encoder = convs('encode', (31, 14, 6, 2))
  decoder = convs('decode', (1, 5, 13, 30))
  model = 3 * (sum(encoder) + sum(decoder)) - encoder[0]
  model += 3 * dense('dynamics', 'decode', 'reward')
  weights = networks['dynamics'].trainable_variables
  dynamics = [v for v in weights if 'obs' not in v.path]
  dream = 2 * sum(int(np.prod(v.shape)) for v in dynamics if len(v.shape) == 2)
  dream += 3 * dense('actor') + 2 * dense('reward') + 4 * dense('value')
  return 2.0 * (images * model + steps * dream)
