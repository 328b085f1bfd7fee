"""What states are learned from besides rewards (`--representation`).

Each class owns its networks and its term of the world model's objective:
J_O of Eq. 10, J_S of Eq. 12, or none. configs.REPRESENTATIONS names them.

Letters in shapes: B batch, T time, F feature.
"""

import numpy as np
import tensorflow as tf

import distribute
import models


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
    """Makes the variables, from a feature [1, F] and embedding [1, embed]."""

  def likes(self, feat, embed, data, seed):
    """Log-likelihood terms of the world model's objective, in nats.

    Args:
      feat: features of the posterior, [B, T, F].
      embed: embedded images, [B, T, embed].
      data: preprocessed batch.
      seed: int32 [2].

    Returns:
      {name: [B, T], or means of them over fewer}.
    """
    return {}


class Reconstruction(RewardOnly):
  """Images are reconstructed from states: J_O of Eq. 10."""

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
  """Each state is told by its image, among other images: J_S of Eq. 12."""

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
    likes = contrast(state, *gaussian, mask, first)  # J_S of Eq. 12
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


def contrast(state, mean, std, mask=None, first=0):
  """J_S of Eq. 12 plus ln of the number of images that it chooses among.

      ln q(s_i | o_i) - ln( 1/K sum_j q(s_i | o_j) )

  It bounds the mutual information of states and images from below: 0 where
  images tell nothing, at most ln K. Costs two products [N, F] x [F, N] and
  4 N^2 bytes for each of a few matrices (25 MB at 2,500 images).

  Args:
    state: s_i, float32 [N, F].
    mean, std: of q(. | o_j), float32 [M, F] each, M >= N.
    mask: bool [N, M], which o_j each s_i is held against; None for all. That
      of the same row is true.
    first: row of the first state's image among the M.

  Returns:
    float32 [N].
  """
  precision = 1.0 / tf.square(std)
  square = tf.matmul(tf.square(state), precision, transpose_b=True)
  product = tf.matmul(state, mean * precision, transpose_b=True)
  image = tf.square(mean) * precision + 2.0 * tf.math.log(std)
  scores = product - 0.5 * (square + tf.reduce_sum(image, -1))
  count = tf.cast(tf.shape(scores)[1], tf.float32)
  if mask is not None:
    scores = tf.where(mask, scores, -np.inf)
    count = tf.reduce_sum(tf.cast(mask, tf.float32), -1)
  total = tf.reduce_logsumexp(scores, -1)
  own = tf.slice(scores, [0, first], [-1, tf.shape(scores)[0]])
  return tf.linalg.diag_part(own) - total + tf.math.log(count)
