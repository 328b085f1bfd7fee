"""Drop-in replacements for Keras layers: same weights and results, faster.

docs/performance.md says why each is there.
"""

import dataclasses
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
    bias: [C].
  """

  @tf.custom_gradient
  def add(x, bias):
    return tf.nn.bias_add(x, bias), lambda dy: (dy, _bias_gradient(dy))

  return add(x, bias)


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


class Tapes:
  """Gradient tapes on weights, one for each loss that has weights of its own.

  Within it layers read each weight once, and what a weight of `affine` gathers
  from many uses, as in an unrolled loop, is one product:

      sum_t x_t^T dy_t  =  [x_1; ...; x_T]^T [dy_1; ...; dy_T]

  So within it the outputs y are sources of the tape, and the weights are
  constants. Loops of TensorFlow, whose tensors are of another graph, use the
  weights as usual.

  There is a tape for each loss, as a persistent one would also trace the second
  derivatives of every loop, which takes half of the tracing time.

  Args:
    groups: lists of Keras variables, one for each loss.
  """

  _here = threading.local()

  def __init__(self, *groups):
    self._tapes = [
      tf.GradientTape(watch_accessed_variables=False) for _ in groups
    ]
    self._groups = list(zip(self._tapes, groups, strict=True))
    self._owners = {id(v): tape for tape, group in self._groups for v in group}
    self._values, self._uses = {}, {}

  def __enter__(self):
    self._graph, self._outer = _graph(), getattr(self._here, 'one', None)
    self._here.one = self
    for tape, group in self._groups:
      tape.__enter__()
      for variable in group:
        tape.watch(variable.value)
    return self

  def __exit__(self, *error):
    self._here.one = self._outer
    for tape in reversed(self._tapes):
      tape.__exit__(*error)

  def watch(self, tensors):
    """Lets `gradient` have these as `inputs`."""
    for tape in self._tapes:
      tape.watch(tensors)

  @classmethod
  def active(cls):
    """The innermost that layers are called within, or None."""
    one = getattr(cls._here, 'one', None)
    return one if one and one._graph is _graph() else None

  def read(self, variable):
    """As the function `read`."""
    return self._once(variable, None, tf.convert_to_tensor)

  def _once(self, variable, part, function):
    key = id(variable), part
    if key not in self._values:
      self._values[key] = function(variable)
    return self._values[key]

  def _fixed(self, variable, row=None):
    """A weight without gradient, or a row of it."""

    def fix(variable):
      value = tf.stop_gradient(self.read(variable))
      return value if row is None else tf.unstack(value)[row]

    return self._once(variable, ('fixed', row), fix)

  def affine(self, x, kernel, bias, row):
    """As the function `affine`."""
    y = tf.matmul(x, self._fixed(kernel))
    y = tf.nn.bias_add(y, self._fixed(bias, row))
    for variable in (kernel, bias):
      if id(variable) in self._owners:
        self._owners[id(variable)].watch(y)
    key = id(kernel), id(bias), row
    use = self._uses.setdefault(key, _Uses(kernel, bias, row, [], []))
    use.x.append(x)
    use.y.append(y)
    return y

  def gradient(self, loss, variables, scale=None, inputs=()):
    """Gradients of a loss; once for each group.

    Args:
      loss: scalar.
      variables: Keras variables of one group.
      scale: scalar that they are multiplied with; None for 1.
      inputs: tensors that `watch` was told.

    Returns:
      A list of tensors, float32 for the variables; None for what the loss does
      not depend on.
    """
    tape, wanted = self._owners[id(variables[0])], {id(v) for v in variables}
    uses = [
      use
      for use in self._uses.values()
      if wanted & {id(use.kernel), id(use.bias)}
    ]
    values = [v.value for v in variables]
    sources = [values, list(inputs), *(use.y for use in uses)]
    own, others, *parts = tape.gradient(loss, sources, scale)
    grads = dict(zip(map(id, variables), own, strict=True))
    for use, dys in zip(uses, parts, strict=True):
      use.add_gradients(grads, dys)
    return [*grads.values(), *others]


@dataclasses.dataclass
class _Uses:
  """Calls of `affine` with the same weights, y_t for x_t."""

  kernel: keras.Variable
  bias: keras.Variable
  row: int | None
  x: list
  y: list

  def add_gradients(self, grads, dys):
    """Adds to {id of a variable: gradient} those by these uses.

    Args:
      grads: of the variables that are wanted, or None.
      dys: gradients of the loss by y_t; None where it does not depend on it.
    """
    pairs = zip(self.x, dys, strict=True)
    pairs = [(x, dy) for x, dy in pairs if dy is not None]
    if not pairs:
      return
    x, dy = (tf.concat(part, 0) for part in zip(*pairs, strict=True))
    offset = _bias_gradient(dy)
    if self.row is not None:
      mask = tf.one_hot(self.row, self.bias.shape[0], dtype=dy.dtype)
      offset = mask[:, None] * offset
    kernel = tf.matmul(x, dy, transpose_a=True)
    for variable, grad in ((self.kernel, kernel), (self.bias, offset)):
      if id(variable) in grads:
        grad, before = tf.cast(grad, variable.dtype), grads[id(variable)]
        grads[id(variable)] = grad if before is None else before + grad


def _graph():
  """The one that TensorFlow's operations now go to; None if they run."""
  return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def read(variable):
  """A Keras variable as a tensor, in the dtype of the layer that is called."""
  tapes = Tapes.active()
  return tapes.read(variable) if tapes else tf.convert_to_tensor(variable)


def affine(x, kernel, bias, row=None):
  """x @ kernel + bias, with one gradient for all uses within `Tapes`.

  Args:
    x: [N, I].
    kernel, bias: Keras variables [I, O] and [O], or [R, O] with a `row`.
  """
  tapes = Tapes.active()
  if tapes:
    return tapes.affine(x, kernel, bias, row)
  offset = read(bias) if row is None else tf.unstack(read(bias))[row]
  return add_bias(tf.matmul(x, read(kernel)), offset)


class Dense(kl.Dense):
  """Keras' layer, with the gradients of `affine` and `add_bias`."""

  def call(self, x):
    if x.shape.rank == 2:
      return self.activation(affine(x, self.kernel, self.bias))
    x = keras.ops.matmul(x, read(self.kernel))
    return self.activation(add_bias(x, read(self.bias)))


class Conv(kl.Conv2D):
  """Keras' layer, stride 2 and an even kernel, with the bias of `add_bias`.

  Where it puts out 2x2 pixels it is one matrix product of patches, with few
  filters it makes two pixels at a time, and with few channels its gradient is a
  convolution of stride 1, which are faster than TensorFlow's kernels
  (docs/performance.md). An odd last column is left out with few filters: the
  windows of another such layer do not reach it.
  """

  def call(self, x):
    kernel, bias = read(self.kernel), read(self.bias)
    size = self.kernel_size[0]
    if x.shape[1:3] == (size + 2, size + 2):
      kernel = tf.reshape(kernel, [-1, self.filters])
      x = tf.reshape(_four_patches(x), [-1, kernel.shape[0]])
      x = self.activation(add_bias(tf.matmul(x, kernel), bias))
      return tf.reshape(x, [-1, 2, 2, self.filters])
    if self.filters <= 8:
      x = tf.nn.conv2d(x, _two_pixels(kernel), [1, 2, 4, 1], 'VALID')
      x = self.activation(add_bias(x, tf.tile(bias, [2])))
      return tf.reshape(x, [-1, x.shape[1], 2 * x.shape[2], self.filters])
    few = kernel.shape[2] < 32
    x = _strided(x, kernel) if few else self.convolution_op(x, kernel)
    return self.activation(add_bias(x, bias))


def _two_pixels(kernel):
  """[K, K, C, O] as [K, K + 2, C, 2 * O]: beside it that of the next pixel.

  Of so few filters the numbers of one pixel do not fill a vector register.
  """
  side = [0, 0]
  both = [tf.pad(kernel, [side, pad, side, side]) for pad in ([0, 2], [2, 0])]
  return tf.concat(both, -1)


@tf.custom_gradient
def _strided(x, kernel):
  """Convolution of stride 2 without padding, its gradient by `_transposed`.

  Args:
    x: [N, h, w, C].
    kernel: [K, K, C, O], K even.

  Returns:
    [N, (h - K) // 2 + 1, (w - K) // 2 + 1, O].
  """

  def grad(dy):
    dx = _transposed(dy, kernel)
    unseen = [[0, x.shape[i] - dx.shape[i]] for i in (1, 2)]
    dx = tf.pad(dx, [[0, 0], *unseen, [0, 0]])
    return dx, _kernel_gradient(x, kernel, dy)

  return tf.nn.conv2d(x, kernel, 2, 'VALID'), grad


def _kernel_gradient(x, kernel, dy):
  """Of a convolution of stride 2 without padding, from x to y."""
  return tf.raw_ops.Conv2DBackpropFilter(
    input=x,
    filter_sizes=kernel.shape,
    out_backprop=dy,
    strides=[1, 2, 2, 1],
    padding='VALID',
  )


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
    kernel, bias = read(self.kernel), read(self.bias)
    if self.kernel_size[0] % 2 == 0:
      relu = self.activation is keras.activations.relu
      x = _subpixel_deconv(x, kernel, bias, relu)
      return x if relu else self.activation(x)
    if x.shape[1:3] == (1, 1):
      x = tf.einsum('nc,hwoc->nhwo', x[:, 0, 0], kernel)
    else:
      x = keras.ops.conv_transpose(x, kernel, self.strides, self.padding)
    return self.activation(add_bias(x, bias))


def _subpixel_deconv(x, kernel, bias, relu):
  """Transposed convolution of stride 2, with a bias, by `_transposed`.

  Args:
    x: [N, h, w, C].
    kernel: [K, K, O, C], K even.
    bias: [O].
    relu: whether the result goes through it.

  Returns:
    [N, 2 * h + K - 2, 2 * w + K - 2, O].
  """

  @tf.custom_gradient
  def apply(x, kernel, bias):
    y = _transposed(x, kernel, bias, relu)

    def grad(dy):
      if relu:
        dy = tf.raw_ops.ReluGrad(gradients=dy, features=y)
      dx = tf.nn.conv2d(dy, kernel, 2, 'VALID')
      return dx, _kernel_gradient(dy, kernel, x), _bias_gradient(dy)

    return y, grad

  return apply(x, kernel, bias)


def _transposed(x, kernel, bias=None, relu=False):
  """Transposed convolution of stride 2 as a convolution of stride 1.

  Each pixel of the result's 2x2 blocks sees the same (K/2)x(K/2) pixels of x,
  through taps of the kernel of its own: a convolution to 4 * O channels, the
  four pixels of a block. TensorFlow makes one pass of it, bias and relu.

  Args, result: as of `_subpixel_deconv`; no bias is a bias of 0.
  """
  size, _, out, channels = kernel.shape
  taps = size // 2
  height, width = (n + taps - 1 for n in x.shape[1:3])
  blocks = tf.reshape(kernel, [taps, 2, taps, 2, out, channels])
  blocks = tf.reverse(tf.transpose(blocks, [0, 2, 5, 1, 3, 4]), [0, 1])
  blocks = tf.reshape(blocks, [taps, taps, channels, 4 * out])
  border = [taps - 1, taps - 1]
  y = tf.nn.conv2d(x, blocks, 1, [[0, 0], border, border, [0, 0]])
  y = y if bias is None else tf.nn.bias_add(y, tf.tile(bias, [4]))
  y = tf.nn.relu(y) if relu else y
  # As depth_to_space: upper and lower halves of blocks become rows.
  y = tf.reshape(y, [-1, width, 2, 2 * out])
  y = tf.transpose(y, [0, 2, 1, 3])
  return tf.reshape(y, [-1, 2 * height, 2 * width, out])


class GRUCell(kl.GRUCell):
  """Keras' cell in plain TensorFlow: one sigmoid for both gates, no slices.

  With Keras' `reset_after`: the reset gate works on U h, not on h.
  """

  def call(self, x, state):
    x = affine(x, self.kernel, self.bias, 0)
    inner = affine(state, self.recurrent_kernel, self.bias, 1)
    sizes = [2 * self.units, self.units]
    x_gates, x_new = tf.split(x, sizes, -1)
    h_gates, h_new = tf.split(inner, sizes, -1)
    update, reset = tf.split(_sigmoid(x_gates + h_gates), 2, -1)
    new = tf.tanh(x_new + reset * h_new)
    return new + update * (state - new)


def _sigmoid(x):
  """In float32: TensorFlow's for bfloat16 takes twice as long on the CPU."""
  return tf.cast(tf.sigmoid(float32(x)), x.dtype)
