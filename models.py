"""The networks of Dreamer (Appendix A), as Keras layers.

Layers compute in the dtype of the Keras policy (`--precision`), the last ones,
but for images, in float32. What passes between networks (states, features,
distribution parameters) is float32.

Letters in shapes: B batch, T time, A action; S = 30 stochastic, D = 200
deterministic state size; feature = S + D.
"""

import functools

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import distribute
import tools
from layers import Conv, Deconv, Dense, GRUCell, add_bias, float32, read

# The last layer of numbers, alike in every precision: in bfloat16, numbers near
# 45, which a value may be, are 0.25 apart.
Output = functools.partial(Dense, dtype='float32')


class RSSM(keras.layers.Layer):
  """Recurrent state space model (Hafner et al., 2018).

           a_{t-1}                       o_t
              |                           |
              v                           v
      s_{t-1} --> [dense] --> [GRU h_t] --+--> [dense] --> posterior s_t
      h_{t-1} ----------------^   |
                                  +----------> [dense] --> prior s_t

  The state of Eq. 1 is the pair of h_t (`deter`) and s_t (`stoch`). The
  posterior is the paper's representation model, the prior its transition
  model. A state is a dictionary of float32: mean, std, stoch [..., S] and
  deter [..., D].

  Args:
    stoch: S, size of the Gaussian part.
    deter: D, size of the GRU.
    hidden: units of the dense layers.
    act: activation of the dense layers.

  Attributes:
    unroll: whether loops over time are unrolled, as of `tools.static_scan`.
  """

  def __init__(self, stoch=30, deter=200, hidden=200, act='elu', **kwargs):
    super().__init__(**kwargs)
    self.unroll = False
    self._stoch_size = stoch
    self._deter_size = deter
    self._cell = GRUCell(deter, name='gru')
    self._img1 = Dense(hidden, act, name='img1')
    self._img2 = Dense(hidden, act, name='img2')
    self._img3 = Output(2 * stoch, name='img3')
    self._obs1 = Dense(hidden, act, name='obs1')
    self._obs2 = Output(2 * stoch, name='obs2')

  def initial(self, batch_size):
    """The state before an episode: zeros [B, ...]."""
    stoch = tf.zeros([batch_size, self._stoch_size])
    deter = tf.zeros([batch_size, self._deter_size])
    return dict(mean=stoch, std=stoch, stoch=stoch, deter=deter)

  def observe(self, embed, action, state=None, seed=None):
    """Posterior and prior states along a sequence.

    Args:
      embed: [B, T, embed]; `embed[:, t]` is the image that followed
      action: [B, T, A] at the same index.
      state: the state before the sequence; None is `initial`.
      seed: int32 [T, 2], for each time; None draws them.

    Returns:
      (posterior, prior), dictionaries of float32 [B, T, ...].
    """
    if state is None:
      state = self.initial(tf.shape(action)[0])
    seed = tools.make_seeds(tf.shape(action)[1]) if seed is None else seed
    post, prior = tools.static_scan(
      lambda carry, x: self.obs_step(carry[0], *x),
      (_swap(action), _swap(embed), seed),
      (state, state),
      unroll=self.unroll,
    )
    return _map(_swap, post), _map(_swap, prior)

  def imagine(self, action, state=None, seed=None):
    """Prior states [B, T, ...] for actions [B, T, A], without images.

    Never unrolled: planning calls it within a loop of its own.
    """
    if state is None:
      state = self.initial(tf.shape(action)[0])
    seed = tools.make_seeds(tf.shape(action)[1]) if seed is None else seed
    prior = tools.static_scan(
      lambda carry, x: self.img_step(carry, *x), (_swap(action), seed), state
    )
    return _map(_swap, prior)

  def get_feat(self, state):
    """What all heads see: float32 [..., S + D]."""
    return tf.concat([state['stoch'], state['deter']], -1)

  def get_dist(self, state):
    """Diagonal Gaussian over the stochastic part, event shape [S]."""
    return tfd.Independent(tfd.Normal(state['mean'], state['std']), 1)

  def obs_step(self, prev_state, prev_action, embed, seed=None):
    """Representation model p(s_t | s_{t-1}, a_{t-1}, o_t) (Eq. 1, 9).

    Args:
      prev_state: state [B, ...].
      prev_action: [B, A], the action that led to
      embed: [B, embed], the encoded image o_t.
      seed: int32 [2]; None draws one.

    Returns:
      (posterior, prior), states [B, ...].
    """
    seed = tools.make_seeds(1)[0] if seed is None else seed
    prior = self.img_step(prev_state, prev_action, seed)
    x = tf.concat([prior['deter'], float32(embed)], -1)
    stats = self._stats(self._obs2(self._obs1(x)))
    # Another stream than the prior's: the two samples are independent.
    stoch = _sample(stats, tf.bitwise.invert(seed))
    return dict(stoch=stoch, deter=prior['deter'], **stats), prior

  def img_step(self, prev_state, prev_action, seed=None):
    """Transition model q(s_t | s_{t-1}, a_{t-1}) (Eq. 1, 9)."""
    seed = tools.make_seeds(1)[0] if seed is None else seed
    x = tf.concat([prev_state['stoch'], float32(prev_action)], -1)
    deter = self._cell(self._img1(x), prev_state['deter'])
    stats = self._stats(self._img3(self._img2(deter)))
    return dict(stoch=_sample(stats, seed), deter=float32(deter), **stats)

  def _stats(self, x):
    mean, std = tf.split(float32(x), 2, -1)
    return dict(mean=mean, std=tf.nn.softplus(std) + 0.1)


def _swap(x):
  """Exchanges batch and time."""
  return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])


def _map(fn, state):
  return {k: fn(v) for k, v in state.items()}


def _sample(stats, seed):
  """mean + std * eps, eps independent for every entry of the batch."""
  mean, std = stats['mean'], stats['std']
  noise = distribute.normal(distribute.dims(mean), seed)
  return mean + std * tf.ensure_shape(noise, mean.shape)


class ConvEncoder(keras.layers.Layer):
  """Images [..., 64, 64, 3] to embeddings [..., 32 * depth].

  The convolutions of Ha and Schmidhuber (2018): four of 4x4, stride 2.
  """

  def __init__(self, depth=32, act='relu', **kwargs):
    super().__init__(**kwargs)
    self._convs = [
      Conv(factor * depth, 4, 2, activation=act, name=f'h{i + 1}')
      for i, factor in enumerate((1, 2, 4, 8))
    ]

  def call(self, obs):
    """Images in [-0.5, 0.5], or a dictionary with them as `image`."""
    image = obs['image'] if isinstance(obs, dict) else obs
    x = tf.reshape(image, [-1, *image.shape[-3:]])
    for conv in self._convs:
      x = conv(x)
    size = int(np.prod(x.shape[1:]))
    return tf.reshape(x, tf.concat([tf.shape(image)[:-3], [size]], 0))


class DenseEncoder(keras.layers.Layer):
  """Vectors [..., D] to embeddings [..., units].

  Args:
    layers, units, act: of the hidden layers; without any, it is the identity.
  """

  def __init__(self, layers, units, act='elu', **kwargs):
    super().__init__(**kwargs)
    self._hidden = _hidden_layers(layers, units, act)

  def call(self, vector):
    return _apply(self._hidden, vector)


class ConvDecoder(keras.layers.Layer):
  """Observation model q(o_t | s_t) (Eq. 9): features to images.

  The mirror of the encoder (Ha and Schmidhuber, 2018): a dense layer, then
  transposed convolutions 1 -> 5 -> 13 -> 30 -> 64 with stride 2.
  """

  def __init__(self, depth=32, act='relu', shape=(64, 64, 3), **kwargs):
    super().__init__(**kwargs)
    self._shape = shape
    self._dense = Dense(32 * depth, name='h1')
    self._convs = [
      Deconv(4 * depth, 5, 2, activation=act, name='h2'),
      Deconv(2 * depth, 5, 2, activation=act, name='h3'),
      Deconv(depth, 6, 2, activation=act, name='h4'),
      Deconv(shape[-1], 6, 2, name='h5'),
    ]

  def call(self, features):
    """Gaussian of unit variance with event shape [64, 64, 3]."""
    x = tf.reshape(features, [-1, features.shape[-1]])
    x = self._first(x)
    for conv in self._convs[1:]:
      x = conv(x)
    shape = tf.concat([tf.shape(features)[:-1], self._shape], 0)
    mean = float32(tf.reshape(x, shape))
    mean.set_shape([*features.shape[:-1], *self._shape])
    return tools.UnitNormal(mean, len(self._shape))

  def _first(self, x):
    """Dense layer and first convolution: [N, F] to [N, 5, 5, 4 * depth].

    From 1x1 pixels the second is a matrix product too, and nothing is between
    them. So of many features the product with the product of both matrices
    takes fewer multiplications than one after the other.
    """
    conv, rows = self._convs[0], x.shape[0] or 0
    size, units = int(np.prod(conv.kernel_size)), self._dense.units
    inputs, outputs = x.shape[1], size * conv.filters
    apart = rows * units * (inputs + outputs)
    together = inputs * outputs * (units + rows)
    if apart <= together or not conv.built:
      return conv(self._dense(x)[:, None, None])
    bias = read(self._dense.bias)[None]
    weights = tf.concat([read(self._dense.kernel), bias], 0)
    kernel = tf.reshape(read(conv.kernel), [outputs, units])
    weights = tf.matmul(weights, kernel, transpose_b=True)
    x = tf.matmul(tf.concat([x, tf.ones([rows, 1], x.dtype)], 1), weights)
    x = tf.reshape(x, [rows, *conv.kernel_size, conv.filters])
    return conv.activation(add_bias(x, read(conv.bias)))


def _hidden_layers(count, units, act):
  return [Dense(units, act, name=f'h{i + 1}') for i in range(count)]


def _apply(layers, x):
  """Dense layers on [..., F], as matrices; float32 [..., outputs].

  TensorFlow fuses product, bias and activation of matrices only.
  """
  before = distribute.dims(x)[:-1]
  x = tf.reshape(x, [-1, x.shape[-1]])
  for layer in layers:
    x = layer(x)
  return tf.reshape(float32(x), [*before, x.shape[-1]])


class DenseDecoder(keras.layers.Layer):
  """A head on features: reward q(r_t | s_t) (Eq. 9), value v (Eq. 2), pcont.

  Args:
    shape: event shape, () for a scalar.
    layers: hidden layers.
    units: their units.
    dist: 'normal', a Gaussian, or 'binary', a Bernoulli.
    act: activation.
    std: standard deviation of the Gaussian.
  """

  def __init__(
    self, shape, layers, units, dist='normal', act='elu', std=1.0, **kwargs
  ):
    super().__init__(**kwargs)
    if dist not in ('normal', 'binary'):
      raise ValueError(f"dist is 'normal' or 'binary', not {dist!r}")
    self._shape = shape
    self._dist, self._std = dist, std
    self._hidden = _hidden_layers(layers, units, act)
    self._out = Output(int(np.prod(shape)), name='out')

  def call(self, features):
    """Distribution with batch shape [...] for features [..., F]."""
    x = _apply(self._hidden + [self._out], features)
    x = tf.reshape(x, [*distribute.dims(features)[:-1], *self._shape])
    if self._dist == 'binary':
      base = tfd.Bernoulli(logits=x, dtype=tf.float32)
    else:
      base = tfd.Normal(x, self._std)
    return tfd.Independent(base, len(self._shape))


class ActionDecoder(keras.layers.Layer):
  """Action model q(a_t | s_t) (Eq. 2).

  Args:
    size: A.
    layers, units, act: the hidden layers.
    dist: 'tanh_normal' for the tanh-transformed Gaussian of Eq. 3, 'onehot'
      for discrete actions (Appendix A, "Discrete control").
    min_std: smallest standard deviation before tanh.
    init_std: standard deviation where the network puts out zero.
    mean_scale: bound of the mean before tanh (Appendix A: 5).
    choices: where several discrete choices make an action, how many of the A
      entries belong to each; None for one.

  Attributes:
    outputs_size: of the network, A or 2 * A.
  """

  def __init__(
    self,
    size,
    layers,
    units,
    dist='tanh_normal',
    act='elu',
    min_std=1e-4,
    init_std=5.0,
    mean_scale=5.0,
    choices=None,
    **kwargs,
  ):
    super().__init__(**kwargs)
    if dist not in ('tanh_normal', 'onehot'):
      raise ValueError(f"dist is 'tanh_normal' or 'onehot', not {dist!r}")
    self._dist = dist
    self._min_std = min_std
    self._raw_init_std = float(np.log(np.expm1(init_std)))
    self._mean_scale = mean_scale
    self._choices = choices or (size,)
    self._hidden = _hidden_layers(layers, units, act)
    self.outputs_size = size if dist == 'onehot' else 2 * size
    self._out = Output(self.outputs_size, name='out')

  def call(self, features):
    """Distribution over actions [..., A] for features [..., F]."""
    return self.dist(self.outputs(features))

  def outputs(self, features):
    """What the network puts out, [..., size]."""
    return _apply(self._hidden + [self._out], features)

  def dist(self, x):
    """Distribution over actions [..., A] for outputs [..., size]."""
    if self._dist == 'onehot' and len(self._choices) > 1:
      return tools.FactoredOneHotDist(x, self._choices)
    if self._dist == 'onehot':
      return tools.OneHotDist(logits=x)
    # Eq. 3: a = tanh(mu + sigma * eps)
    dist = tfd.TransformedDistribution(self._gaussian(x), tools.TanhBijector())
    return tools.SampleDist(tfd.Independent(dist, 1))

  def _gaussian(self, x):
    """N(mu, sigma) of Eq. 3, over actions before tanh, for [..., 2 * A]."""
    mean, std = tf.split(x, 2, -1)
    mean = self._mean_scale * tf.tanh(mean / self._mean_scale)
    std = tf.nn.softplus(std + self._raw_init_std) + self._min_std
    return tools.Normal(mean, std)

  def draw(self, x, seed):
    """Actions [..., A] for outputs [..., size], and what `log_prob` takes.

    The latter is the action itself, or mu + sigma * eps of Eq. 3, which cannot
    be told from an action that float32 rounds to 1 or -1.
    """
    if self._dist == 'onehot':
      action = self.dist(x).sample(seed=seed)
      return action, action
    before = self._gaussian(x).sample(seed=seed)
    return tf.tanh(before), before  # Eq. 3

  def log_prob(self, x, drawn):
    """Log-probability of actions, in nats [...], float32.

    Args:
      x: outputs [..., size].
      drawn: second result of `draw`, [..., A].
    """
    if self._dist == 'onehot':
      return self.dist(x).log_prob(drawn)
    log_slope = tools.TanhBijector().forward_log_det_jacobian(drawn)
    return tf.reduce_sum(self._gaussian(x).log_prob(drawn) - log_slope, -1)


class StateModel(keras.layers.Layer):
  """State model q(s_t | o_t) (Eq. 11): a Gaussian over features.

  The convolutions below it are the encoder's.

  Args:
    size: F, length of a feature.
    units, act: the hidden layer.
  """

  def __init__(self, size, units, act='elu', **kwargs):
    super().__init__(**kwargs)
    self._hidden = Dense(units, act, name='h1')
    self._out = Output(2 * size, name='out')

  def call(self, embed):
    """(mean, std), float32 [..., F] each, for embeddings [..., embed]."""
    mean, std = tf.split(_apply([self._hidden, self._out], embed), 2, -1)
    return mean, tf.nn.softplus(std) + 0.1
