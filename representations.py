"""What states are learned from besides rewards (`--representation`).

Each class owns its networks and its term of the world model's objective:
J_O of Eq. 10, J_S of Eq. 12, or none. configs.REPRESENTATIONS names them.

Letters in shapes: B batch, T time, F feature, E embedding.
"""

import numpy as np
import tensorflow as tf

import distribute
import models
import tools


class RewardOnly:
  """Rewards alone are explained: no term for images (Figure 8).

  Args:
    config: from `commandline.parse_flags`.
    images: names of the images among the inputs.

  Attributes:
    networks: {name in checkpoints: Keras layer}.
    decoders: {image: the network that makes it of features}.
  """

  def __init__(self, config, images):
    self._c = config
    self.networks = {}
    self.decoders = {}

  def build(self, feat, embed):
    """Makes the variables, from a feature [1, F] and an embedding [1, E]."""

  def likes(self, feat, embed, data, seed):
    """What states should say of images, in nats.

    Args:
      feat: features of the posterior, [B, T, F].
      embed: embedded images, [B, T, E].
      data: preprocessed batch.
      seed: int32 [2].

    Returns:
      {name: [B, T], or means of them over fewer}.
    """
    return {}


class Reconstruction(RewardOnly):
  """States tell the images that they came from: J_O of Eq. 10."""

  def __init__(self, config, images):
    super().__init__(config, images)
    for name in images:
      suffix = name.removeprefix('image')
      self.decoders[name] = self.networks[f'decode{suffix}'] = (
        models.ConvDecoder(
          config.cnn_depth, config.cnn_act, name=f'decoder{suffix}'
        )
      )

  def build(self, feat, embed):
    for decoder in self.decoders.values():
      decoder(feat)

  def likes(self, feat, embed, data, seed):
    rows = dict(feat=feat, **{name: data[name] for name in self.decoders})
    rows = {k: tf.reshape(v, [-1, *v.shape[2:]]) for k, v in rows.items()}
    rows = distribute.some_rows(rows, self._c.decode_images, seed)
    return {  # J_O of Eq. 10
      name: decoder(rows['feat']).log_prob(rows[name])
      for name, decoder in self.decoders.items()
    }


class Contrastive(RewardOnly):
  """Observations tell which state they led to, of many: J_S of Eq. 12."""

  def __init__(self, config, images):
    super().__init__(config, images)
    size = config.stoch_size + config.deter_size
    self._state = models.StateModel(
      size, config.num_units, config.dense_act, name='state'
    )
    self.networks = dict(state=self._state)

  def build(self, feat, embed):
    self._state(embed)

  def likes(self, feat, embed, data, seed):
    state, image = (tf.reshape(x, [-1, x.shape[-1]]) for x in (feat, embed))
    gaussian = self._state(image)  # Eq. 11
    mask, first = self._negatives(*feat.shape[:2]), 0
    if mask is None:
      gaussian = [distribute.gather(x) for x in gaussian]
      first = distribute.replica()[0] * tf.shape(state)[0]
    likes = tools.contrast(state, *gaussian, mask, first)  # J_S of Eq. 12
    return dict(state=likes)

  def _negatives(self, batch, length):
    """Which images each state is held against: bool [B*T, B*T], or None."""
    if self._c.contrast == 'batch':
      return None
    sequence, time = np.divmod(np.arange(batch * length), length)
    mask = sequence[:, None] == sequence
    if self._c.contrast == 'window':
      mask &= abs(time[:, None] - time) <= self._c.contrast_window
    return mask
