"""Keras layers with the mathematics of the stock ones, and faster.

Each layer has the weights of its Keras layer; docs/performance.md says why.
"""

import contextlib
import threading

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
  """The sum [C] of dy [N, ..., C].

  The product is over N alone: with the few columns of C it is slow. What is
  left, a row for each pixel, is summed in float32.
  """
  rows = tf.shape(dy)[0]
  sums = tf.matmul(tf.ones([1, rows], dy.dtype), tf.reshape(dy, [rows, -1]))
  if dy.shape.rank == 2:
    return sums[0]
  sums = tf.reduce_sum(float32(tf.reshape(sums, [-1, dy.shape[-1]])), 0)
  return tf.cast(sums, dy.dtype)


class Gathering:
  """Gradients of weights that are used many times, as in an unrolled loop.

  Each use adds a product to the gradient of the same weights. Here the parts
  are gathered, and all are one product:

      sum_t x_t^T dy_t  =  [x_1; ...; x_T]^T [dy_1; ...; dy_T]
  """

  _here = threading.local()

  def __init__(self):
    self._graph, self._uses = _graph(), {}

  @classmethod
  @contextlib.contextmanager
  def active(cls):
    """Within it `tape.gradient` leaves out what `added` has."""
    cls._here.one = cls()
    try:
      yield cls._here.one
    finally:
      cls._here.one = None

  @classmethod
  def take(cls, weights, x, dy):
    """Whether x and dy are taken: not from within a loop of TensorFlow.

    Args:
      weights: Keras variables: a kernel, its bias, and the row of the bias.
    """
    one = getattr(cls._here, 'one', None)
    if one is None or _graph() is not one._graph:
      return False
    uses = one._uses.setdefault(id(weights[0]), (weights, [], []))
    uses[1].append(x)
    uses[2].append(dy)
    return True

  def added(self, grads, variables):
    """Gradients with the parts that were taken.

    Args:
      grads: of `tape.gradient`, None where all parts were taken.
      variables: Keras variables that they are of.
    """
    grads = dict(zip(map(id, variables), grads, strict=True))

    def add(variable, grad):
      if id(variable) in grads:
        grad, before = tf.cast(grad, variable.dtype), grads[id(variable)]
        grads[id(variable)] = grad if before is None else before + grad

    for (kernel, bias, row), *parts in self._uses.values():
      if not grads.keys() & {id(kernel), id(bias)}:
        continue  # a loss of others has its gradient through these
      x, dy = (tf.concat(part, 0) for part in parts)
      add(kernel, tf.matmul(x, dy, transpose_a=True))
      offset = _bias_gradient(dy)
      if row is not None:
        offset = (
          tf.one_hot(row, bias.shape[0], dtype=dy.dtype)[:, None] * offset
        )
      add(bias, offset)
    return list(grads.values())


def _graph():
  """The one that TensorFlow's operations now go to; None if they run."""
  return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def affine(x, kernel, bias, row=None):
  """x @ kernel + bias, with gradients that may be gathered.

  Args:
    x: [N, I].
    kernel, bias: Keras variables [I, O] and [O], or [R, O] with a `row`.
  """

  @tf.custom_gradient
  def apply(x, weights, offset):
    def grad(dy):
      dx = tf.matmul(dy, weights, transpose_b=True)
      if Gathering.take((kernel, bias, row), x, dy):
        return dx, None, None
      return dx, tf.matmul(x, dy, transpose_a=True), _bias_gradient(dy)

    return tf.nn.bias_add(tf.matmul(x, weights), offset), grad

  offset = tf.convert_to_tensor(bias)
  offset = offset if row is None else tf.unstack(offset)[row]
  return apply(x, tf.convert_to_tensor(kernel), offset)


class Dense(kl.Dense):
  """Keras' layer, with the gradients of `affine` and `add_bias`."""

  def call(self, x):
    if x.shape.rank == 2:
      return self.activation(affine(x, self.kernel, self.bias))
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

  From 1x1 pixels it is a matrix product, and with an even kernel a
  convolution; TensorFlow's kernel is slower there (docs/performance.md).
  """

  def call(self, x):
    if self.kernel_size[0] % 2 == 0:
      weights = self.kernel, self.bias
      weights = [tf.convert_to_tensor(w) for w in weights]
      relu = self.activation is keras.activations.relu
      x = _subpixel_deconv(x, *weights, relu)
      return x if relu else self.activation(x)
    if x.shape[1:3] == (1, 1):
      x = tf.einsum('nc,hwoc->nhwo', x[:, 0, 0], self.kernel)
    else:
      x = keras.ops.conv_transpose(x, self.kernel, self.strides, self.padding)
    return self.activation(add_bias(x, self.bias))


def _subpixel_deconv(x, kernel, bias, relu):
  """Transposed convolution of stride 2 as a convolution of stride 1.

  Each pixel of the result's 2x2 blocks sees the same (K/2)x(K/2) pixels of x,
  through taps of the kernel of its own: a convolution to 4 * O channels, the
  four pixels of a block. TensorFlow makes one pass of it, bias and relu.

  Args:
    x: [N, h, w, C].
    kernel: [K, K, O, C], K even.
    bias: [O].
    relu: whether the result goes through it.

  Returns:
    [N, 2 * h + K - 2, 2 * w + K - 2, O].
  """
  size, _, out, channels = kernel.shape
  taps = size // 2
  height, width = (n + taps - 1 for n in x.shape[1:3])

  @tf.custom_gradient
  def apply(x, kernel, bias):
    blocks = tf.reshape(kernel, [taps, 2, taps, 2, out, channels])
    blocks = tf.reverse(tf.transpose(blocks, [0, 2, 5, 1, 3, 4]), [0, 1])
    blocks = tf.reshape(blocks, [taps, taps, channels, 4 * out])
    border = [taps - 1, taps - 1]
    y = tf.nn.conv2d(x, blocks, 1, [[0, 0], border, border, [0, 0]])
    y = tf.nn.bias_add(y, tf.tile(bias, [4]))
    y = tf.nn.relu(y) if relu else y
    # As depth_to_space: upper and lower halves of blocks become rows.
    y = tf.reshape(y, [-1, width, 2, 2 * out])
    y = tf.transpose(y, [0, 2, 1, 3])
    y = tf.reshape(y, [-1, 2 * height, 2 * width, out])

    def grad(dy):
      if relu:
        dy = tf.raw_ops.ReluGrad(gradients=dy, features=y)
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

  return apply(x, kernel, bias)


class GRUCell(kl.GRUCell):
  """Keras' cell in plain TensorFlow: one split for the gates, no slices.

  With Keras' `reset_after`: the reset gate works on U h, not on h.
  """

  def call(self, x, state):
    x = affine(x, self.kernel, self.bias, 0)
    inner = affine(state, self.recurrent_kernel, self.bias, 1)
    x_update, x_reset, x_new = tf.split(x, 3, -1)
    h_update, h_reset, h_new = tf.split(inner, 3, -1)
    update = _sigmoid(x_update + h_update)
    reset = _sigmoid(x_reset + h_reset)
    new = tf.tanh(x_new + reset * h_new)
    return update * state + (1 - update) * new


def _sigmoid(x):
  """In float32: TensorFlow's for bfloat16 takes twice as long on the CPU."""
  return tf.cast(tf.sigmoid(float32(x)), x.dtype)
