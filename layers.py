"""Keras layers with the mathematics of the stock ones, and faster.

Each layer has the weights of its Keras layer; docs/performance.md says why.
"""

import keras
import tensorflow as tf
from keras import layers as kl


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
  faster than TensorFlow's kernels (docs/performance.md).
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
  convolution; TensorFlow's kernel is slower there (docs/performance.md).
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
  four pixels of a block. Padded to 16 channels for vectorization.

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
