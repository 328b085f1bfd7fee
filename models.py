"""The networks of Dreamer (Appendix A), as Keras layers.

Layers compute in the dtype of the Keras policy (`--precision`); what passes
between networks (states, features, distribution parameters) is float32.

Letters in shapes: B batch, T time, A action; S = 30 stochastic, D = 200
deterministic state size; feature = S + D.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from tensorflow_probability import distributions as tfd

import tools


def float32(x):
  return tf.cast(x, tf.float32)


def add_bias(x, bias):
  """x + bias; the gradient of the bias is summed in float32.

  TensorFlow on the CPU sums bfloat16 in bfloat16, where adding to a sum that
  is 256 times as large does nothing: of the gradient of the decoder's last
  bias, over all pixels of a batch, a thousandth was left. Matrix products sum
  in float32, and faster.

  Args:
    x: [..., C], in the dtype of the Keras policy.
    bias: Keras variable or tensor [C].
  """

  @tf.custom_gradient
  def add(x, bias):
    return tf.nn.bias_add(x, bias), lambda dy: (dy, _bias_gradient(dy))

  return add(x, tf.convert_to_tensor(bias))


def _bias_gradient(dy):
  """The sum [C] of dy [..., C]."""
  rows = tf.reshape(dy, [-1, dy.shape[-1]])
  return tf.matmul(tf.ones([1, tf.shape(rows)[0]], dy.dtype), rows)[0]


class Dense(kl.Dense):
  """Keras' layer, with the bias of `add_bias`."""

  def call(self, x):
    x = keras.ops.matmul(x, self.kernel)
    return self.activation(add_bias(x, self.bias))


class Conv(kl.Conv2D):
  """Keras' layer, stride 2, with the bias of `add_bias`.

  Where it puts out 2x2 pixels it is one matrix product of patches, which is
  faster than TensorFlow's kernels (README, Performance).
  """

  def call(self, x):
    size = self.kernel_size[0]
    if x.shape[1:3] == (size + 2, size + 2):
      kernel = tf.reshape(self.kernel, [-1, self.filters])
      x = tf.reshape(_four_patches(x), [-1, kernel.shape[0]])
      x = self.activation(add_bias(tf.matmul(x, kernel), self.bias))
      return tf.reshape(x, [-1, 2, 2, self.filters])
    x = self.convolution_op(x, self.kernel)
    return self.activation(add_bias(x, self.bias))


@tf.custom_gradient
def _four_patches(x):
  """From [N, K + 2, K + 2, C] those at stride 2: [N, 4, K, K, C].

  The gradient adds padded patches; that of slices fills whole tensors.
  """
  size = x.shape[1] - 2

  def join(first, second, axis):
    pads = [[0, 0]] * 4, [[0, 0]] * 4
    pads[0][axis], pads[1][axis] = [0, 2], [2, 0]
    return tf.pad(first, pads[0]) + tf.pad(second, pads[1])

  def grad(dy):
    patches = tf.unstack(dy, axis=1)
    return join(join(*patches[:2], 2), join(*patches[2:], 2), 1)

  rows = [x[:, i : i + size] for i in (0, 2)]
  patches = [row[:, :, i : i + size] for row in rows for i in (0, 2)]
  return tf.stack(patches, 1), grad


class Deconv(kl.Conv2DTranspose):
  """Keras' layer, stride 2, with the bias of `add_bias`.

  From 1x1 pixels it is a matrix product, and to few channels (images) a
  convolution; TensorFlow's kernel is slower there (README, Performance).
  """

  def call(self, x):
    if self.filters < 8 and self.kernel_size[0] % 2 == 0:
      weights = self.kernel, self.bias
      weights = [tf.convert_to_tensor(w) for w in weights]
      return self.activation(_subpixel_deconv(x, *weights))
    if x.shape[1:3] == (1, 1):
      x = tf.einsum('nc,hwoc->nhwo', x[:, 0, 0], self.kernel)
    else:
      x = keras.ops.conv_transpose(x, self.kernel, self.strides, self.padding)
    return self.activation(add_bias(x, self.bias))


@tf.custom_gradient
def _subpixel_deconv(x, kernel, bias):
  """Transposed convolution of stride 2 as a convolution of stride 1.

  Each pixel of the result's 2x2 blocks sees the same (K/2)x(K/2) pixels of x,
  through taps of the kernel of its own: a convolution to 4 * O channels, the
  four pixels of a block. Filled up to 16, as vector units like it.

  Args:
    x: [N, h, w, C].
    kernel: [K, K, O, C], K even.
    bias: [O].

  Returns:
    [N, 2 * h + K - 2, 2 * w + K - 2, O].
  """
  size, _, out, channels = kernel.shape
  taps = size // 2
  blocks = tf.reshape(kernel, [taps, 2, taps, 2, out, channels])
  blocks = tf.reverse(tf.transpose(blocks, [0, 2, 5, 1, 3, 4]), [0, 1])
  blocks = tf.reshape(blocks, [taps, taps, channels, 4 * out])
  fill = [0, -4 * out % 16]
  blocks = tf.pad(blocks, [[0, 0]] * 3 + [fill])
  border = [taps - 1, taps - 1]
  y = tf.nn.conv2d(x, blocks, 1, [[0, 0], border, border, [0, 0]])
  y = tf.nn.bias_add(y, tf.pad(tf.tile(bias, [4]), [fill]))
  y = tf.nn.depth_to_space(y[..., : 4 * out], 2)

  def grad(dy):
    dx = tf.nn.conv2d(dy, kernel, 2, 'VALID')
    dkernel = tf.raw_ops.Conv2DBackpropFilter(
      input=dy,
      filter_sizes=kernel.shape,
      out_backprop=x,
      strides=[1, 2, 2, 1],
      padding='VALID',
    )
    return dx, dkernel, _bias_gradient(dy)

  return y, grad


class GRUCell(kl.GRUCell):
  """Keras' cell in plain TensorFlow: one split for the gates, no slices.

  With Keras' `reset_after`: the reset gate works on U h, not on h.
  """

  def call(self, x, state):
    bias = tf.unstack(tf.convert_to_tensor(self.bias))
    x = add_bias(tf.matmul(x, self.kernel), bias[0])
    inner = add_bias(tf.matmul(state, self.recurrent_kernel), bias[1])
    x_update, x_reset, x_new = tf.split(x, 3, -1)
    h_update, h_reset, h_new = tf.split(inner, 3, -1)
    update = _sigmoid(x_update + h_update)
    reset = _sigmoid(x_reset + h_reset)
    new = tf.tanh(x_new + reset * h_new)
    return update * state + (1 - update) * new


def _sigmoid(x):
  """In float32: TensorFlow's for bfloat16 takes twice as long on the CPU."""
  return tf.cast(tf.sigmoid(float32(x)), x.dtype)


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
  """

  def __init__(self, stoch=30, deter=200, hidden=200, act='elu', **kwargs):
    super().__init__(**kwargs)
    self._stoch_size = stoch
    self._deter_size = deter
    self._cell = GRUCell(deter, name='gru')
    self._img1 = Dense(hidden, act, name='img1')
    self._img2 = Dense(hidden, act, name='img2')
    self._img3 = Dense(2 * stoch, name='img3')
    self._obs1 = Dense(hidden, act, name='obs1')
    self._obs2 = Dense(2 * stoch, name='obs2')

  def initial(self, batch_size):
    """The state before an episode: zeros [B, ...]."""
    stoch = tf.zeros([batch_size, self._stoch_size])
    deter = tf.zeros([batch_size, self._deter_size])
    return dict(mean=stoch, std=stoch, stoch=stoch, deter=deter)

  def observe(self, embed, action, state=None, seed=None):
    """Posterior and prior states along a sequence.

    Args:
      embed: [B, T, E]; `embed[:, t]` is the image that followed
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
    )
    return _map(_swap, post), _map(_swap, prior)

  def imagine(self, action, state=None, seed=None):
    """Prior states [B, T, ...] for actions [B, T, A], without images."""
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
      embed: [B, E], the encoded image o_t.
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
  noise = tools.normal(tools.dims(mean), seed)
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
    """Dictionary with `image` in [-0.5, 0.5]; other keys are not used."""
    image = obs['image']
    x = tf.reshape(image, [-1, *image.shape[-3:]])
    for conv in self._convs:
      x = conv(x)
    size = int(np.prod(x.shape[1:]))
    return tf.reshape(x, tf.concat([tf.shape(image)[:-3], [size]], 0))


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
    weights = tf.concat([self._dense.kernel, self._dense.bias[None]], 0)
    kernel = tf.reshape(conv.kernel, [outputs, units])
    weights = tf.matmul(weights, kernel, transpose_b=True)
    x = tf.matmul(tf.concat([x, tf.ones([rows, 1], x.dtype)], 1), weights)
    x = tf.reshape(x, [rows, *conv.kernel_size, conv.filters])
    return conv.activation(add_bias(x, conv.bias))


def _apply(layers, x):
  """Dense layers on [..., F], as matrices; float32 [..., outputs].

  TensorFlow fuses product, bias and activation of matrices only.
  """
  shape = tf.shape(x)[:-1]
  static = x.shape[:-1]
  x = tf.reshape(x, [-1, x.shape[-1]])
  for layer in layers:
    x = layer(x)
  x = tf.reshape(float32(x), tf.concat([shape, [x.shape[-1]]], 0))
  return tf.ensure_shape(x, [*static, x.shape[-1]])


class DenseDecoder(keras.layers.Layer):
  """A head on features: reward q(r_t | s_t) (Eq. 9), value v (Eq. 2), pcont.

  Args:
    shape: event shape, () for a scalar.
    layers: hidden layers.
    units: their units.
    dist: 'normal', a Gaussian of unit variance, or 'binary', a Bernoulli.
    act: activation.
  """

  def __init__(self, shape, layers, units, dist='normal', act='elu', **kwargs):
    super().__init__(**kwargs)
    if dist not in ('normal', 'binary'):
      raise ValueError(f"dist is 'normal' or 'binary', not {dist!r}")
    self._shape = shape
    self._dist = dist
    self._hidden = [Dense(units, act, name=f'h{i + 1}') for i in range(layers)]
    self._out = Dense(int(np.prod(shape)), name='out')

  def call(self, features):
    """Distribution with batch shape [...] for features [..., F]."""
    x = _apply(self._hidden + [self._out], features)
    x = tf.reshape(x, tf.concat([tf.shape(features)[:-1], self._shape], 0))
    x.set_shape([*features.shape[:-1], *self._shape])
    if self._dist == 'binary':
      base = tfd.Bernoulli(logits=x, dtype=tf.float32)
    else:
      base = tfd.Normal(x, 1.0)
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
    self._hidden = [Dense(units, act, name=f'h{i + 1}') for i in range(layers)]
    self._out = Dense(size if dist == 'onehot' else 2 * size, name='out')

  def call(self, features):
    """Distribution over actions [..., A] for features [..., F]."""
    x = _apply(self._hidden + [self._out], features)
    if self._dist == 'onehot' and len(self._choices) > 1:
      return tools.FactoredOneHotDist(x, self._choices)
    if self._dist == 'onehot':
      return tools.OneHotDist(logits=x)
    # Eq. 3: a = tanh(mu + sigma * eps)
    mean, std = tf.split(x, 2, -1)
    mean = self._mean_scale * tf.tanh(mean / self._mean_scale)
    std = tf.nn.softplus(std + self._raw_init_std) + self._min_std
    dist = tfd.TransformedDistribution(
      tools.Normal(mean, std), tools.TanhBijector()
    )
    return tools.SampleDist(tfd.Independent(dist, 1))


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
    self._out = Dense(2 * size, name='out')

  def call(self, embed):
    """(mean, std), float32 [..., F] each, for embeddings [..., E]."""
    mean, std = tf.split(_apply([self._hidden, self._out], embed), 2, -1)
    return mean, tf.nn.softplus(std) + 0.1
