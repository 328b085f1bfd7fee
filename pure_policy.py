"""Acting and imagining as pure functions of tensors.

Letters in shapes: E environments, A action, H steps of imagination.
"""

import tensorflow as tf


class Policy(tf.Module):
  """Acting as pure functions of tensors, which a SavedModel can hold.

  A state is a dictionary of what the agent remembers: the model state, its last
  action, and the seed of its next noise, int32 [2].

  Args:
    agent: `dreamer.Dreamer`.
  """

  def __init__(self, agent):
    super().__init__()
    self.agent = agent
    layers = agent.networks().values()
    self.weights = [w.value for layer in layers for w in layer.weights]

  def start(self, batch, seed):
    """The state before an episode.

    Args:
      batch: E, int32 scalar.
      seed: int32 [2], of the noise.
    """
    latent = self.agent.world.dynamics.initial(batch)
    action = tf.zeros([batch, self.agent.actions])
    return dict(latent, action=action, seed=seed)

  def act(self, obs, state, sample=False):
    """An action for each environment; no exploration noise.

    Args:
      obs: the inputs: images uint8 [E, 64, 64, 3], vectors float32 [E, ...].
      state: from `start`, or of the last call.
      sample: draw from the action model, else take its mode.

    Returns:
      Actions [E, A] in [-1, 1] or one-hot, and the new state.
    """
    seeds = tf.random.experimental.stateless_split(state['seed'], 3)
    latent = self._observe(obs, state, seeds[0])
    action = self.agent.behavior.act(latent, seeds[1], sample)
    return action, dict(latent, action=action, seed=seeds[2])

  def imagine(self, obs, state, actions):
    """What the model predicts after `obs` for actions [E, H, A].

    Args:
      obs: as in `act`; None to go on from `state` itself.
      state: as in `act`.

    Returns:
      {name: [E, H, ...]}: reward, discount where it is predicted, images about
      in [0, 1] (not clipped), and `vector`, as the model sees it.
    """
    world = self.agent.world
    seeds = tf.random.experimental.stateless_split(state['seed'], 2)
    latent = _latent(state)
    if obs is not None:
      latent = self._observe(obs, state, seeds[0])
    steps = tf.random.experimental.stateless_split(seeds[1], actions.shape[1])
    feat = world.dynamics.get_feat(
      world.dynamics.imagine(actions, latent, steps)
    )
    predictions = {k: head(feat).mean() for k, head in world.heads.items()}
    if predictions.pop('pcont', None) is not None:
      predictions['discount'] = world.continuation(feat)
    for name, decoder in world.representation.decoders.items():
      predictions[name] = decoder(feat).mean() + 0.5
    return predictions

  def _observe(self, obs, state, seed):
    return self.agent.observe(obs, _latent(state), state['action'], seed)


def _latent(state):
  """The model state within the state of a `Policy`."""
  return {k: v for k, v in state.items() if k not in ('action', 'seed')}
