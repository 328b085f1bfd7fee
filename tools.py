"""Everything of Dreamer that needs neither a network nor an environment.

Returns and scans, distributions, the optimizer, replay in `.npz` files, the
simulation loop, checkpoints, logging and schedules.

Letters in shapes: B batch, T time, H horizon, A action, E environments.
Units: an *environment step* is one step of the simulator, an *agent step* is
one action (`action_repeat` environment steps), an *update* is one gradient
step of all three optimizers.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import functools
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import sys
import time
import uuid
import zipfile

import imageio.v3 as imageio
import keras
import numpy as np
import tensorflow as tf
import tqdm
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd
from tensorflow_probability import random as tfr

from cli import UserError as UserError


class NonFiniteError(Exception):
  """A loss or gradient became NaN or infinite; nothing was saved since."""


class Stopped(Exception):  # noqa: N818 (a request, not an error)
  """Ctrl-C or SIGTERM asked the run to save and leave."""


class AttrDict(dict):
  """A dictionary whose keys are attributes too."""

  __setattr__ = dict.__setitem__

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError:
      raise AttributeError(name) from None


# --- Schedules --------------------------------------------------------------


class Every(tf.Module):
  """True at the first call and then once for every `every` steps passed.

  Steps that were skipped are made up for: after a jump of 3 * every, three
  calls in a row are true. The state is a variable, so checkpoints hold it.
  """

  def __init__(self, every):
    super().__init__()
    self._every = int(every)
    self._last = tf.Variable(-1, dtype=tf.int64, trainable=False)

  def __call__(self, step):
    last = int(self._last.numpy())
    if last < 0:
      self._last.assign(step)
      return True
    if self._every and step >= last + self._every:
      self._last.assign(last + self._every)
      return True
    return False


class Once(tf.Module):
  """True at the first call of a run, resumed or not, and never again."""

  def __init__(self):
    super().__init__()
    self._fresh = tf.Variable(True, trainable=False)

  def __call__(self):
    fresh = bool(self._fresh.numpy())
    self._fresh.assign(False)
    return fresh


# --- Scans and returns ------------------------------------------------------


def static_scan(fn, inputs, start, reverse=False):
  """Runs `carry = fn(carry, inputs[t])` over the leading axis.

  Args:
    fn: maps (carry, input at one time) to the next carry, same structure.
    inputs: nested tensors, each [T, ...].
    start: nested tensors, the carry before the first input.
    reverse: run from the last input to the first.

  Returns:
    The carries, stacked: nested [T, ...], in the order of the inputs.
  """
  return tf.scan(fn, inputs, start, reverse=reverse)


def lambda_return(reward, value, pcont, bootstrap, lambda_, axis):
  """V_lambda of Eq. 6, computed backwards.

      index            0      1     ...    N-1
      reward          r_0    r_1    ...  r_{N-1}
      pcont           g_0    g_1    ...  g_{N-1}
      value           v_0    v_1    ...  v_{N-1}   bootstrap = v_N

      V(n) = r_n + g_n * ((1 - lambda) * v_{n+1} + lambda * V(n+1)),  V(N) = v_N

  Unrolled, this is Eq. 6: the (1 - lambda) lambda^{k-1} weighted mean of the
  k-step estimates V_N^k of Eq. 5, the longest of which takes the remaining
  weight. Special cases: `lambda_=1` gives V_N^k to the end of the horizon
  (Eq. 5 with the largest k), `lambda_=0` gives V_N^1; `lambda_=1, pcont=1`
  and a zero bootstrap give V_R (Eq. 4), the plain sum of rewards.

  Args:
    reward, value: float tensors of one shape, N along `axis`.
    pcont: the discount at each index, a tensor of the same shape or a number.
    bootstrap: the value after the last index, without `axis`; None is zero.
    lambda_: number in [0, 1].
    axis: the time axis.

  Returns:
    Tensor of the shape of `reward`.
  """
  if isinstance(pcont, (int, float)):
    pcont = pcont * tf.ones_like(reward)
  order = list(range(reward.shape.rank))
  order[0], order[axis] = order[axis], order[0]
  reward, value, pcont = (
    tf.transpose(x, order) for x in (reward, value, pcont)
  )
  if bootstrap is None:
    bootstrap = tf.zeros_like(value[-1])
  next_value = tf.concat([value[1:], bootstrap[None]], 0)
  one_step = reward + pcont * (1 - lambda_) * next_value
  returns = static_scan(
    lambda carry, x: x[0] + x[1] * lambda_ * carry,  # Eq. 6
    (one_step, pcont),
    bootstrap,
    reverse=True,
  )
  return tf.transpose(returns, order)


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


def cross_entropy_method(score, shape, candidates, best, iterations, seed):
  """Plans actions in [-1, 1], as PlaNet does (Hafner et al., 2018).

  Draws candidates from a Gaussian, at first the standard one, and fits the
  Gaussian to the best of them, again and again.

  Args:
    score: function from actions [E, N, H, A] to expected returns [E, N].
    shape: (E, H, A).
    candidates: N.
    best: how many of them the Gaussian is fitted to.
    iterations: number of fits.
    seed: int32 [2].

  Returns:
    The mean of the last Gaussian, float32 [E, H, A].
  """
  envs, *rest = shape

  def fit(gaussian, seed):
    mean, std = (x[:, None] for x in gaussian)
    noise = tf.random.stateless_normal([envs, candidates, *rest], seed)
    actions = tf.clip_by_value(mean + std * noise, -1.0, 1.0)
    index = tf.math.top_k(score(actions), best).indices
    actions = tf.gather(actions, index, batch_dims=1)
    mean, variance = tf.nn.moments(actions, 1)
    return mean, tf.sqrt(variance)

  seeds = tf.random.experimental.stateless_split(seed, iterations)
  means, _ = static_scan(fit, seeds, (tf.zeros(shape), tf.ones(shape)))
  return means[-1]


# --- Replicas ---------------------------------------------------------------
# A batch may be split over several devices (distribute.py). On one, these are
# what they would be without the splitting.


def replica():
  """(index, count): which part of the whole batch is computed here."""
  context = tf.distribute.get_replica_context()
  if context is None or context.num_replicas_in_sync == 1:
    return 0, 1
  return context.replica_id_in_sync_group, context.num_replicas_in_sync


def mean_over_replicas(tensors):
  """Means of nested tensors over the replicas, the same in each."""
  if replica()[1] == 1:
    return tensors
  return tf.distribute.get_replica_context().all_reduce('MEAN', tensors)


def sum_over_replicas(tensors):
  """As `mean_over_replicas`, the sums."""
  if replica()[1] == 1:
    return tensors
  return tf.distribute.get_replica_context().all_reduce('SUM', tensors)


def gather(tensor):
  """Rows of all replicas, [R * N, ...] of [N, ...], with their gradient."""
  if replica()[1] == 1:
    return tensor
  return tf.distribute.get_replica_context().all_gather(tensor, 0)


def dims(tensor):
  """Its shape, a list: integers where they are known, else scalar tensors."""
  known, shape = tensor.shape, tf.shape(tensor)
  return [shape[i] if n is None else n for i, n in enumerate(known)]


def normal(shape, seed, axis=0):
  """Standard normal noise, independent for every entry of the whole batch.

  Replicas draw the noise of all and take their own rows, so that the result
  does not depend on their number.

  Args:
    shape: of the part of the batch that is here, list of integers or tensors.
    seed: int32 [2].
    axis: of the batch.
  """
  return _own_rows(tf.random.stateless_normal, shape, seed, axis)


def uniform(shape, seed, axis=0):
  """As `normal`, uniform in (0, 1)."""
  least = np.finfo(np.float32).tiny
  draw = functools.partial(tf.random.stateless_uniform, minval=least)
  return _own_rows(draw, shape, seed, axis)


def _own_rows(draw, shape, seed, axis):
  index, count = replica()
  if count == 1:
    return draw(shape, seed)
  start = [0] * len(shape)
  start[axis] = index * shape[axis]
  whole = [n * count if i == axis else n for i, n in enumerate(shape)]
  return tf.slice(draw(whole, seed), start, shape)


# --- Randomness and distributions -------------------------------------------


def make_seeds(count, generator=None):
  """Draws `count` seeds for stateless sampling: int32 [count, 2].

  From `generator`, whose state a checkpoint holds, or else from TensorFlow's
  global one.
  """
  draw = generator.uniform if generator else tf.random.uniform
  return draw([count, 2], tf.int32.min, tf.int32.max, dtype=tf.int32)


class TanhBijector(tfb.Bijector):
  """y = tanh(x), with finite log-probabilities for saturated actions.

  In floating point tanh(x) is exactly 1 from x = 9 or so on, and its inverse
  infinite. The inverse clips to the largest number below 1, so that any
  action in [-1, 1] has a finite log-probability.
  """

  def __init__(self, validate_args=False, name='tanh'):
    super().__init__(
      forward_min_event_ndims=0, validate_args=validate_args, name=name
    )

  def _forward(self, x):
    return tf.tanh(x)

  def _inverse(self, y):
    limit = np.nextafter(y.dtype.as_numpy_dtype(1), y.dtype.as_numpy_dtype(0))
    return tf.atanh(tf.clip_by_value(y, -limit, limit))

  def _forward_log_det_jacobian(self, x):
    # ln(1 - tanh(x)^2), in a form that does not round to ln(0).
    return 2.0 * (np.log(2.0).astype(np.float32) - x - tf.nn.softplus(-2.0 * x))


class SampleDist:
  """A distribution with mean, mode and entropy estimated from samples.

  For tanh-transformed Gaussians, which have none of the three in closed form.
  """

  def __init__(self, dist, samples=100):
    self._dist = dist
    self._samples = samples

  def __getattr__(self, name):
    return getattr(self._dist, name)

  def mean(self, seed=None):
    return tf.reduce_mean(self._dist.sample(self._samples, seed=seed), 0)

  def mode(self, seed=None):
    """For each batch entry, the most likely of its own samples."""
    sample = self._dist.sample(self._samples, seed=seed)  # [S, ..., A]
    best = tf.argmax(self._dist.log_prob(sample), 0)  # [...]
    sample = tf.experimental.numpy.moveaxis(sample, 0, -2)  # [..., S, A]
    return tf.gather(sample, best, axis=-2, batch_dims=best.shape.rank)

  def entropy(self, seed=None):
    sample = self._dist.sample(self._samples, seed=seed)
    return -tf.reduce_mean(self._dist.log_prob(sample), 0)


class Normal(tfd.Normal):
  """A Gaussian over [N, ...] with the noise of `normal`."""

  def _sample_n(self, n, seed=None):
    shape = [n, *dims(self.loc + self.scale)]
    noise = normal(shape, tfr.sanitize_seed(seed), axis=1)
    return self.loc + self.scale * noise


class UnitNormal(tfd.Independent):
  """A Gaussian of unit variance (q(o_t | s_t) of Eq. 9).

  TFP's own goes over images some ten times for a log-probability with its
  gradient, this one four times.

  Args:
    mean: float [..., *event].
    dims: rank of the event.
  """

  def __init__(self, mean, dims):
    super().__init__(tfd.Normal(mean, 1.0), dims)
    self._parameters = dict(mean=mean, dims=dims)
    self._dims = dims

  def _log_prob(self, value):
    """-1/2 |x - mean|^2 - n/2 ln 2 pi, [...]; x has the shape of the mean."""
    dims, scale = self._dims, 0.5 * np.log(2.0 * np.pi)

    @tf.custom_gradient
    def like(mean, value):
      error = value - mean
      axes = list(range(error.shape.rank - dims, error.shape.rank))
      constant = scale * int(np.prod([error.shape[i] for i in axes]))

      def grad(dy):
        dy = tf.reshape(dy, [*tf.unstack(tf.shape(dy)), *[1] * dims]) * error
        return dy, -dy

      return -0.5 * tf.reduce_sum(tf.square(error), axes) - constant, grad

    return like(self.distribution.loc, value)


class OneHotDist(tfd.OneHotCategorical):
  """One-hot categorical with straight-through gradients (section 3).

  Samples are one-hot; their gradient is that of the probabilities.
  """

  def __init__(self, logits=None, probs=None):
    super().__init__(logits=logits, probs=probs, dtype=tf.float32)
    self._parameters = dict(logits=logits, probs=probs)

  @classmethod
  def _parameter_properties(cls, dtype, num_classes=None):
    return super()._parameter_properties(dtype, num_classes)

  def _sample_n(self, n, seed=None):
    """By the largest of logits and Gumbel noise, which is a draw of them."""
    logits = self.logits_parameter()
    shape = [n, *dims(logits)]
    noise = uniform(shape, tfr.sanitize_seed(seed), axis=1)
    noise = -tf.math.log(-tf.math.log(noise))
    return tf.one_hot(tf.argmax(logits + noise, -1), logits.shape[-1])

  def mode(self):
    probs = self.probs_parameter()
    hard = tf.one_hot(tf.argmax(probs, -1), probs.shape[-1])
    return tf.stop_gradient(hard - probs) + probs

  def sample(self, sample_shape=(), seed=None):
    hard = tf.stop_gradient(super().sample(sample_shape, seed=seed))
    probs = tf.broadcast_to(self.probs_parameter(), tf.shape(hard))
    return tf.stop_gradient(hard - probs) + probs


class FactoredOneHotDist:
  """Independent choices side by side, each with an `OneHotDist`.

  Args:
    logits: float [..., A].
    choices: how many of the A belong to each choice.
  """

  def __init__(self, logits, choices):
    self._choices = choices
    self._dists = [OneHotDist(part) for part in self._split(logits)]

  def sample(self, sample_shape=(), seed=None):
    seeds = tfr.split_seed(seed, len(self._dists))
    pairs = zip(self._dists, seeds, strict=True)
    return tf.concat([d.sample(sample_shape, s) for d, s in pairs], -1)

  def mode(self):
    return tf.concat([d.mode() for d in self._dists], -1)

  def log_prob(self, value):
    pairs = zip(self._dists, self._split(value), strict=True)
    return tf.add_n([dist.log_prob(part) for dist, part in pairs])

  def entropy(self):
    return tf.add_n([dist.entropy() for dist in self._dists])

  def _split(self, vector):
    return tf.split(vector, self._choices, -1)


# --- Optimizer --------------------------------------------------------------


class _KerasAdam(keras.optimizers.Adam):
  """Keras' Adam without its own sum over replicas, which is after clipping."""

  def _all_reduce_sum_gradients(self, grads_and_vars):
    return grads_and_vars


class Adam:
  """Adam with global norm clipping, decoupled weight decay and loss scaling.

  Args:
    name: prefix of the metrics.
    modules: Keras layers, built; their trainable variables are optimized.
    lr: learning rate.
    clip: gradients are scaled down to this global norm; None for no limit.
    wd: decoupled weight decay (AdamW), 0 for none.
    wdpattern: regular expression; only variables whose path matches decay.
    eps: Adam's epsilon.
    loss_scaling: scale the loss dynamically, for float16.
  """

  def __init__(
    self,
    name,
    modules,
    lr,
    clip=None,
    wd=None,
    wdpattern=r'.*',
    eps=1e-7,
    loss_scaling=False,
  ):
    self._name = name
    self.variables = [v for m in modules for v in m.trainable_variables]
    # Clipping belongs into the inner optimizer: LossScaleOptimizer divides
    # by the scale inside `apply`, so outside the norm is still scaled.
    adam = _KerasAdam(
      lr,
      epsilon=eps,
      global_clipnorm=clip or None,
      weight_decay=wd or None,
      name=name,
    )
    if wd:
      skip = [v for v in self.variables if not re.search(wdpattern, v.path)]
      adam.exclude_from_weight_decay(skip)
    # What checkpoints hold has a loss scale in every precision, so that a run
    # can resume in another one.
    self.optimizer = keras.optimizers.LossScaleOptimizer(adam)
    self.optimizer.build(self.variables)
    self._scaling = loss_scaling
    self._active = self.optimizer if loss_scaling else adam

  def set_learning_rate(self, value):
    """For the updates to come."""
    self._active.learning_rate = value

  def gradient(self, tape, loss):
    """Gradients of the loss, times the loss scale where there is one.

    With several replicas, this one's share, the sum of which is the gradient
    of the mean of their losses.
    """
    assert loss.dtype == tf.float32 and loss.shape == (), loss
    scale = self._active.scale_loss(tf.ones_like(loss)) / replica()[1]
    variables = [v.value for v in self.variables]
    return tape.gradient(loss, variables, output_gradients=scale)

  def apply(self, grads):
    """Moves the variables; returns the norm before clipping as a metric.

    The gradients are those of the whole batch, alike on every replica.
    """
    scale = self._active.scale_loss(tf.constant(1.0))
    norm = tf.linalg.global_norm(grads) / scale
    metrics = {f'{self._name}_grad_norm': norm}
    if self._scaling:
      finite = tf.math.is_finite(norm)
      metrics[f'{self._name}_loss_scale'] = scale
      metrics[f'{self._name}_skipped'] = 1.0 - tf.cast(finite, tf.float32)
    self._active.apply(grads, self.variables)
    return metrics

  def __call__(self, tape, loss):
    return self.apply(self.gradient(tape, loss))


# --- Files ------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
  """Yields a binary file that appears under `path` whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
  except OSError as error:  # such as a full disk
    error.filename = error.filename or str(path)
    raise
  finally:
    temporary.unlink(missing_ok=True)


def warn(message):
  tqdm.tqdm.write(f'Warning: {message}', file=sys.stdout)
  sys.stdout.flush()


# --- Replay -----------------------------------------------------------------


def save_episodes(directory, episodes):
  """Writes episodes as `{timestamp}-{uuid}-{length}.npz`; returns the paths.

  `length` counts rows: the reset and one row for each agent step. Files are
  not compressed, so that windows can be read from their place in the file.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  paths = []
  for episode in episodes:
    stamp = _next_stamp(directory)
    name = f'{stamp}-{uuid.uuid4().hex}-{len(episode["reward"])}.npz'
    with atomic_write(directory / name) as file:
      np.savez(file, **episode)
    paths.append(directory / name)
  return paths


def _next_stamp(directory):
  """The time, but after all names there, so that they sort by their age."""
  form = '%Y%m%dT%H%M%S%f'
  now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
  newest = max((p.name for p in directory.glob('*.npz')), default='')
  with contextlib.suppress(ValueError):
    last = datetime.datetime.strptime(newest.partition('-')[0], form)
    now = max(now, last + datetime.timedelta(microseconds=1))
  return now.strftime(form)


def episode_length(path):
  """Rows of an episode file, the reset included, from its name."""
  try:
    return int(pathlib.Path(path).stem.rsplit('-', 1)[-1])
  except ValueError:
    return 0


def count_episodes(directory):
  """Number of episodes in a folder, and of agent steps in them."""
  lengths = [episode_length(p) for p in pathlib.Path(directory).glob('*.npz')]
  return len(lengths), sum(n - 1 for n in lengths if n)


class EpisodeFile:
  """One episode on disk, read a window at a time.

  The members of an uncompressed `.npz` file lie in it as they are in memory.
  Where they start is looked up once; a window is then one read for each key
  and the page cache keeps what is hot. (Reads rather than memory maps: a map
  holds a file descriptor for each episode and a truncated file would kill the
  process.) Compressed files, as the 2020 release wrote them, are read whole.
  Nothing in a file is trusted: its structure is checked before the first read,
  and its checksums once, at the first read.

  Args:
    path: of the file.
    shapes: {key: shape of a row} that the arrays must have.
  """

  LARGEST = 2**30  # bytes; a whole game of Atari has 0.33e9

  def __init__(self, path, shapes=None):
    self.path = pathlib.Path(path)
    self.length = episode_length(path)
    self._shapes = shapes or {}
    self._members = None

  def read(self, start, stop):
    """Rows [start, stop): dictionary of arrays. ValueError if broken."""
    with self._errors():
      if self._members is None:
        members = self._locate()
        self._check_sums()
        self._members = members
      if not self._members:
        whole = _load_compressed(self.path)
        rows = {k: v[start:stop] for k, v in whole.items()}
      else:
        with self.path.open('rb') as file:
          rows = {
            key: self._read(file, start, stop, *member)
            for key, member in self._members.items()
          }
      for key in ('action', 'reward', 'discount'):
        if not np.isfinite(rows[key]).all():
          raise ValueError(f'{key} is not finite')
      return rows

  def check(self):
    """ValueError if its structure is broken; reads no images."""
    with self._errors():
      self._locate()

  @contextlib.contextmanager
  def _errors(self):
    try:
      yield
    except ValueError:
      raise
    except Exception as error:  # anything may be wrong with such a file
      raise ValueError(f'{type(error).__name__}: {error}') from error

  def _locate(self):
    """Maps each key to (offset, dtype, row shape); empty if compressed."""
    members, arrays, stored = {}, {}, True
    with zipfile.ZipFile(self.path) as archive:
      infos = archive.infolist()
      if sum(i.file_size for i in infos) > self.LARGEST:
        raise ValueError('it unpacks to more than a GiB')
      if len({i.filename for i in infos}) < len(infos):
        raise ValueError('it holds a name twice')
      for info in infos:
        with archive.open(info) as file:
          version = np.lib.format.read_magic(file)
          read_header = getattr(
            np.lib.format, f'read_array_header_{version[0]}_{version[1]}'
          )
          shape, fortran, dtype = read_header(file)
          header = file.tell()
        if dtype.kind not in 'biuf' or (fortran and len(shape) > 1):
          raise ValueError(f'{info.filename} is not a plain array')
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if info.file_size != header + size:
          raise ValueError(f'{info.filename} has not the size of its array')
        key = info.filename.removesuffix('.npy')
        if '/' in key or '\\' in key:
          raise ValueError(f'{info.filename} is no name of an array')
        arrays[key] = shape, dtype
        stored = stored and info.compress_type == zipfile.ZIP_STORED
        if stored:
          offset = self._data_offset(info) + header
          members[key] = offset, dtype, shape[1:]
    self._check(arrays)
    return members if stored else {}

  def _data_offset(self, info):
    with self.path.open('rb') as file:
      file.seek(info.header_offset + 26)  # lengths in the local header
      return sum(struct.unpack('<HH', file.read(4))) + file.tell()

  def _check_sums(self):
    """Reads all of it once, as bits may have flipped."""
    with zipfile.ZipFile(self.path) as archive:
      broken = archive.testzip()
    if broken:
      raise ValueError(f'the checksum of {broken} is wrong')

  def _check(self, arrays):
    missing = {'image', 'action', 'reward', 'discount'} - set(arrays)
    if missing:
      raise ValueError(f'it lacks {", ".join(sorted(missing))}')
    for key, (shape, _) in arrays.items():
      if not shape or shape[0] != self.length:
        raise ValueError(f'{key} has shape {shape}, not {self.length} rows')
    if arrays['image'][1] != np.uint8:
      raise ValueError(f'image is {arrays["image"][1]}, not uint8')
    for key, expected in (
      *self._shapes.items(),
      ('reward', ()),
      ('discount', ()),
    ):
      if arrays[key][0][1:] != expected:
        shape = arrays[key][0]
        raise ValueError(f'{key} has shape {shape}, each row not {expected}')

  @staticmethod
  def _read(file, start, stop, offset, dtype, shape):
    row = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    file.seek(offset + start * row)
    data = file.read((stop - start) * row)
    if len(data) != (stop - start) * row:
      raise ValueError('it is cut short')
    return np.frombuffer(data, dtype).reshape((stop - start, *shape))


@functools.lru_cache(maxsize=16)
def _load_compressed(path):
  with np.load(path, allow_pickle=False) as episode:
    return {k: episode[k] for k in episode.files}


class Replay:
  """The episodes of a folder, and windows drawn from them.

  Args:
    directory: folder of episode files; `rescan` looks for new ones.
    capacity: agent steps to draw from, the newest; 0 for all.
    shapes: {key: shape of a row} that all episodes must have.
  """

  def __init__(self, directory, capacity=0, shapes=None):
    self._directory = pathlib.Path(directory)
    self._capacity = capacity
    self._shapes = shapes
    self._episodes = {}
    self._recent = []
    self._changed = None

  def rescan(self):
    changed = self._directory.stat().st_mtime_ns
    if changed == self._changed:
      return
    self._changed = changed
    names = sorted(p.name for p in self._directory.glob('*.npz'))
    known = self._episodes
    self._episodes = {
      n: known.get(n) or EpisodeFile(self._directory / n, self._shapes)
      for n in names
    }
    self._recent, steps = [], 0
    for name in reversed(names):
      if self._capacity and steps >= self._capacity:
        break
      self._recent.append(self._episodes[name])
      steps += self._episodes[name].length - 1
    self._recent.reverse()

  def check(self):
    """Sets aside files whose structure is broken, all at once."""
    self.rescan()
    for episode in list(self._episodes.values()):
      try:
        episode.check()
      except ValueError as error:
        self._set_aside(episode, error)

  def window(self, rng, length=None, balance=False):
    """One window: dictionary of arrays [length, ...], and `source`.

    An episode is drawn uniformly, then a window of it: any that fits, the
    one that ends in the last row included. With `balance`, draws that do not
    fit count as the last window, so that ends of episodes come more often.
    Without `length` it is the whole episode.
    """
    while True:
      fit = [e for e in self._recent if e.length >= (length or 1)]
      if not fit:
        longest = max([e.length for e in self._recent], default=0)
        if not longest:
          raise UserError(
            f'learning needs episodes, and there are none in {self._directory}'
          )
        raise UserError(
          f'batch_length {length} is longer than any episode in '
          f'{self._directory}: the longest has {longest} rows. '
          f'Choose --batch_length {max(longest, 2)} or less.'
        )
      episode = fit[rng.integers(len(fit))]
      total = length or episode.length
      last = episode.length - total
      start = int(rng.integers((episode.length if balance else last) + 1))
      start = min(start, last)
      try:
        window = episode.read(start, start + total)
        return dict(window, source=f'{episode.path.name}, row {start}')
      except ValueError as error:
        self._set_aside(episode, error)

  def _set_aside(self, episode, error):
    target = episode.path.with_suffix('.npz.broken')
    with contextlib.suppress(FileNotFoundError):
      episode.path.rename(target)
    warn(f'set aside the broken episode {target}: {error}')
    self._changed = None
    self.rescan()


def load_episodes(
  directory,
  rescan,
  length=None,
  balance=False,
  seed=0,
  capacity=0,
  start=0,
  shapes=None,
  stream=0,
):
  """Yields windows of episodes for ever.

  Windows come in blocks of `rescan`, for each of which new episodes are
  looked for and a random stream is begun from (seed, block). So a reader
  that stopped after n blocks goes on with `start=n`.

  Args:
    directory: folder of episode files.
    rescan: windows in a block.
    length: rows in a window; None for whole episodes.
    balance: see `Replay.window`.
    seed, start: of the random stream.
    capacity: agent steps to draw from, the newest; 0 for all.
    shapes: see `Replay`.
    stream: number of the reader, where several draw from one folder.

  Raises:
    UserError: no episode is long enough.
  """
  replay = Replay(directory, capacity, shapes)
  for block in itertools.count(start):
    replay.rescan()
    rng = np.random.default_rng([seed, block, stream])
    for _ in range(rescan):
      yield replay.window(rng, length, balance)


def prefetch(iterator):
  """Yields what `iterator` does, taking the next in another thread."""
  with concurrent.futures.ThreadPoolExecutor(1, 'prefetch') as executor:
    upcoming = executor.submit(next, iterator)
    while True:
      current, upcoming = upcoming, executor.submit(next, iterator)
      yield current.result()


# --- Simulation -------------------------------------------------------------


def simulate(agent, envs, steps=0, episodes=0, state=None):
  """Runs an agent in environments, all of them at the same time.

  Stops when the episodes that ended hold `steps` agent steps, or when
  `episodes` of them ended; what is under way then goes on at the next call
  with the state returned here. Episodes with `info['lost']`, whose worker died,
  do not count.

  Args:
    agent: maps (obs, reset, agent_state) to (action, agent_state), where obs
      is a dictionary of arrays [E, ...], reset [E] is true where an episode
      begins, and action is [E, A].
    envs: E environments whose `reset` and `step` take `blocking=False` and
      then return a function that waits for the result.
    steps: agent steps; 0 for no limit.
    episodes: episodes; 0 for no limit.
    state: what the last call returned, or None to begin anew.

  Returns:
    The state: surplus of steps and episodes, and where each environment is.
  """
  if state is None:
    state = (0, 0, np.ones(len(envs), bool), [0] * len(envs), {}, None)
  step, episode, done, length, obs, agent_state = state
  while (steps and step < steps) or (episodes and episode < episodes):
    waiting = {i: envs[i].reset(blocking=False) for i in np.flatnonzero(done)}
    obs.update({i: promise() for i, promise in waiting.items()})
    batch = {k: np.stack([obs[i][k] for i in range(len(envs))]) for k in obs[0]}
    action, agent_state = agent(batch, done, agent_state)
    action = np.asarray(action)
    assert len(action) == len(envs), (action.shape, len(envs))
    waiting = [
      e.step(a, blocking=False) for e, a in zip(envs, action, strict=True)
    ]
    for index, promise in enumerate(waiting):
      obs[index], _, done[index], info = promise()
      length[index] += 1
      if done[index]:
        if not info.get('lost'):
          step, episode = step + length[index], episode + 1
        length[index] = 0
  return (
    max(0, step - steps),
    max(0, episode - episodes),
    *(
      done,
      length,
      obs,
      agent_state,
    ),
  )


# --- Logging ----------------------------------------------------------------


def encode_gif(frames, fps):
  """Encodes uint8 frames [T, H, W, 3] as an animated GIF that loops."""
  buffer = io.BytesIO()
  imageio.imwrite(buffer, frames, extension='.gif', loop=0, duration=1000 / fps)
  return buffer.getvalue()


def plot_rewards(truth, model, context=5):
  """Draws rewards [B, T], true and predicted, as an image uint8 [H, W, 3].

  A line marks where the `context` agent steps with images end.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(2.4 * len(truth), 2), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots(1, len(truth), sharey=True, squeeze=False)[0]
  for axis, true, predicted in zip(axes, truth, model, strict=True):
    axis.plot(true, label='true')
    axis.plot(predicted, label='model')
    axis.axvline(context - 0.5, color='gray', linewidth=0.8)  # then imagined
  axes[0].legend(loc='best', fontsize='small')
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def video_summary(name, video, step=None, fps=20):
  """Writes videos [B, T, H, W, C], uint8 or in [0, 1], as one GIF summary.

  The B videos stand side by side. TensorBoard shows GIFs under IMAGES.
  """
  if np.issubdtype(video.dtype, np.floating):
    video = np.clip(255 * video, 0, 255).astype(np.uint8)
  count, length, height, width, channels = video.shape
  frames = video.transpose((1, 2, 0, 3, 4))
  frames = frames.reshape((length, height, count * width, channels))
  summary = tf.compat.v1.Summary()
  image = tf.compat.v1.Summary.Image(height=height, width=count * width)
  image.colorspace = channels
  image.encoded_image_string = encode_gif(frames, fps)
  metadata = tf.compat.v1.SummaryMetadata(
    summary_description=METRICS.get(name, '')
  )
  summary.value.add(tag=name, image=image, metadata=metadata)
  tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step)


# Names on TensorBoard's page, by group, and what it says about them. Lines of
# metrics.jsonl leave out the group, but for train and test.
METRICS = {
  'test/return': 'Sum of rewards of an evaluation episode, without noise',
  'test/length': 'Environment steps of an evaluation episode',
  'test/policy': 'An evaluation episode, one image for each agent step',
  'train/return': 'Sum of rewards of an episode with exploration noise',
  'train/length': 'Environment steps of an episode',
  'run/episodes': 'Episodes in the replay',
  'run/updates': 'Gradient steps of all optimizers, so far',
  'run/fps': 'Environment steps a second since the last entry',
  'run/env_restarts': 'Workers that died or hung and were replaced, so far',
  'run/resumed': 'The run was resumed here; later steps were lost',
  'world_model/model_loss': 'Nats for a state: Eq. 10 or 12, negated',
  'world_model/image_loss': 'Nats for an image; 11,291.9 where it is exact',
  'world_model/state_loss': 'Nats: J_S of Eq. 12 and ln K, negated',
  'world_model/reward_loss': 'Nats for a reward; 0.919 where it is exact',
  'world_model/pcont_loss': 'Nats for a discount, times --pcont_scale',
  'world_model/div': 'Nats: KL divergence of posterior and prior',
  'world_model/prior_ent': 'Nats: entropy of the transition model',
  'world_model/post_ent': 'Nats: entropy of the representation model',
  'agent/openl': 'Truth, model and difference, from 5 images of context',
  'agent/openl_reward': 'Rewards, true and from 5 images of context',
  'behavior/actor_loss': 'Imagined return, discounted and negated: Eq. 7',
  'behavior/action_ent': 'Nats: entropy of the action model, of one sample',
  'behavior/value_loss': 'Nats for a state: Eq. 8',
  'behavior/imag_reward': 'Mean reward of imagined states',
  'behavior/imag_return': 'Mean return of imagined states: Eq. 6, or 4',
  'behavior/imag_value': 'Mean value of imagined states',
}
for _name in ('model', 'actor', 'value'):
  METRICS[f'optimizers/{_name}_grad_norm'] = 'Gradient norm before clipping'
  METRICS[f'optimizers/{_name}_loss_scale'] = 'Factor of the loss in float16'
  METRICS[f'optimizers/{_name}_skipped'] = 'Share of updates that overflowed'
_GROUPED = {
  name.split('/')[1]: name
  for name in METRICS
  if not name.startswith(('train/', 'test/', 'agent/'))
}


class Logger:
  """Writes `metrics.jsonl` and TensorBoard events, and talks to the user.

  On a terminal there is one progress bar with lines above it; elsewhere there
  are plain lines, flushed. All of it goes to standard output.

  Args:
    logdir: folder of the run.
    total: environment steps of the whole run, for the progress bar.
    step: environment steps so far.
    worker: number of this process among several; only 0 writes files.
  """

  def __init__(self, logdir, total, step=0, worker=0):
    logdir = pathlib.Path(logdir)
    self._worker = worker
    self._metrics = logdir / 'metrics.jsonl'
    self._writer = tf.summary.create_noop_writer()
    if not worker:
      self._cut_half_line()
      self._writer = tf.summary.create_file_writer(
        str(logdir), max_queue=1000, flush_millis=20000
      )
    self._bar = tqdm.tqdm(
      total=total,
      initial=step,
      unit=' steps',
      file=sys.stdout,
      disable=not sys.stdout.isatty(),
      dynamic_ncols=True,
      smoothing=0.05,
    )

  def _cut_half_line(self):
    """A run killed while writing leaves half a line; the next cuts it off."""
    if not self._metrics.exists():
      return
    content = self._metrics.read_bytes()
    whole = content[: content.rfind(b'\n') + 1]
    if len(whole) < len(content):
      with atomic_write(self._metrics) as file:
        file.write(whole)

  def size(self):
    """Bytes of metrics.jsonl."""
    return self._metrics.stat().st_size if self._metrics.exists() else 0

  def rewind(self, size):
    """Cuts off what metrics.jsonl has beyond `size` bytes."""
    content = self._metrics.read_bytes()
    with atomic_write(self._metrics) as file:
      file.write(content[:size])

  def largest(self, name):
    """The largest value of a name in metrics.jsonl, 0 without any."""
    values = [0]
    if self._metrics.exists():
      for line in self._metrics.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
          values.append(float(json.loads(line).get(name, 0)))
    return max(values)

  def say(self, line):
    line = f'[worker {self._worker}] {line}' if self._worker else line
    self._bar.write(line, file=sys.stdout)
    sys.stdout.flush()

  def progress(self, step, updates):
    self._bar.n = min(step, self._bar.total)
    self._bar.set_postfix_str(f'{updates} updates', refresh=False)
    self._bar.refresh()

  def scalars(self, step, values):
    """Writes numbers under `step` (environment steps); names: `METRICS`."""
    if self._worker:
      return
    values = {k: float(v) for k, v in values.items()}
    with self._metrics.open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    with self._writer.as_default(step):
      for key, value in values.items():
        name = key if key in METRICS else _GROUPED.get(key, key)
        tf.summary.scalar(name, value, description=METRICS.get(name))

  def video(self, step, name, video):
    if self._worker:
      return
    with self._writer.as_default(step):
      video_summary(name, video, step)
    self.flush()

  def flush(self):
    self._writer.flush()

  def close(self):
    self._bar.close()
    self._writer.close()


# --- Checkpoints and signals ------------------------------------------------


class RunState(tf.train.experimental.PythonState):
  """What a checkpoint holds besides tensors: a dictionary, as JSON.

  Args:
    collect: function that returns the dictionary when a checkpoint is saved.
  """

  def __init__(self, collect):
    self._collect = collect
    self.restored = {}  # what the restored checkpoint held

  def serialize(self):
    return json.dumps(self._collect())

  def deserialize(self, text):
    self.restored = json.loads(text)


def plain_path(folder):
  """A path of a folder in which TensorFlow sees no pattern.

  It takes `[ ] * ? \\` in the paths of checkpoints for patterns.

  Args:
    folder: a path; where it has such characters it exists.

  Returns:
    The path, and the file descriptor that it goes through or None.

  Raises:
    UserError: this system has no such path.
  """
  if not re.search(r'[][*?\\]', str(folder)):
    return str(folder), None
  links = pathlib.Path('/proc/self/fd')
  if not links.exists():
    raise UserError(
      f'TensorFlow cannot write to {folder}: choose a path without any of '
      '[ ] * ? and backslashes'
    )
  number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  return str(links / str(number)), number


class Checkpoints:
  """Keeps the newest two checkpoints of trackable objects in a folder."""

  KEEP = 2

  def __init__(self, directory, **objects):
    self._directory = pathlib.Path(directory)
    self._checkpoint = tf.train.Checkpoint(**objects)

  def save(self, number):
    """Saves under `number` (updates), or the next that is free."""
    self._directory.mkdir(exist_ok=True)
    number = max([number, *(n + 1 for n in self._numbers())])
    name = f'ckpt-{number}'
    with self._plain() as folder:
      try:
        self._checkpoint.write(f'{folder}/{name}')
      except tf.errors.OpError as error:
        reason = self._reason(error, folder)
        full = 'space' in reason or 'quota' in reason
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, reason, str(self._directory)) from None
      for file in self._files(number):
        with file.open('rb') as opened:
          os.fsync(opened.fileno())
    with atomic_write(self._directory / 'checkpoint') as file:
      # As TensorFlow writes it: which is the newest, for other tools.
      file.write(f'model_checkpoint_path: "{name}"\n'.encode())
    for old in self._numbers()[: -self.KEEP]:
      self._remove(old)
    return str(self._directory / name)

  def restore(self, repair=False):
    """Restores the newest that is whole; returns its path, None if none.

    Args:
      repair: rename those with wrong bytes to *.broken, and remove what a run
        that was killed left behind.

    Raises:
      UserError: it cannot be read, or does not fit these objects.
    """
    if repair:
      self._sweep()
    for number in reversed(self._numbers()):
      path = str(self._directory / f'ckpt-{number}')
      reason = self._restore(number)
      if not reason:
        return path
      if number not in self._numbers():
        continue  # a run beside us has replaced it
      warn(f'{path} is broken ({reason}); taking the checkpoint before')
      if repair and self._is_complete(number):
        for file in self._files(number):
          file.rename(file.with_name(f'{file.name}.broken'))
    return None

  def newest_trace(self):
    """Largest number of a checkpoint of which there is any file, 0 if none."""
    names = [path.name for path in self._directory.glob('ckpt-*')]
    matches = [re.match(r'ckpt-(\d+)\.', name) for name in names]
    return max([int(m[1]) for m in matches if m], default=0)

  def _restore(self, number):
    """Restores a checkpoint; returns what is wrong with its bytes, or ''."""
    with self._plain() as folder:
      path = f'{folder}/ckpt-{number}'
      try:
        status = self._checkpoint.read(path).expect_partial()
        status.assert_existing_objects_matched()
        return ''
      except (AssertionError, ValueError, KeyError) as error:
        tf.get_logger().setLevel('ERROR')  # it would list every value
        problem = 'was not made by this version of the code'
        hint = 'use the version that made it, or a new logdir'
        reason = self._reason(error, folder)
      except (tf.errors.OpError, IndexError) as error:
        reason = self._reason(error, folder)
        if number not in self._numbers() or self._is_wrong(number, path):
          return reason
        problem = 'cannot be restored, though its bytes are right'
        hint = 'make it readable, and start again; nothing was changed'
    raise UserError(
      f'{self._directory / f"ckpt-{number}"} {problem} ({reason}); {hint}'
    )

  def _is_wrong(self, number, path):
    """Whether all of a checkpoint's bytes could be read, and are not right.

    Raises:
      UserError: they cannot be read.
    """
    for file in self._files(number):
      try:
        with file.open('rb') as opened:
          while opened.read(2**20):
            pass
      except OSError as error:
        raise UserError(
          f'the checkpoint {file} cannot be read ({error.strerror}); make it '
          'readable, and start again; nothing was changed'
        ) from None
    try:
      reader = tf.train.load_checkpoint(path)
      for name in reader.get_variable_to_shape_map():
        reader.get_tensor(name)
    except (tf.errors.OpError, IndexError, ValueError):
      return True
    return False

  @contextlib.contextmanager
  def _plain(self):
    """A path of the folder for TensorFlow."""
    folder, number = plain_path(self._directory)
    try:
      yield folder
    finally:
      if number is not None:
        os.close(number)

  def _reason(self, error, folder):
    """The first line of an error, with the real path."""
    line = (str(error) or type(error).__name__).partition('\n')[0]
    return line.replace(folder, str(self._directory))[:200]

  def _numbers(self):
    """Of the checkpoints in the folder, sorted; the index is written last."""
    numbers = []
    for path in self._directory.glob('ckpt-*.index'):
      match = re.fullmatch(r'ckpt-(\d+)\.index', path.name)
      with contextlib.suppress(FileNotFoundError):  # a run beside us goes on
        if match and path.stat().st_size:
          numbers.append(int(match[1]))
    return sorted(numbers)

  def _files(self, number):
    own = rf'ckpt-{number}\.(index|data-\d+-of-\d+)'
    paths = self._directory.glob(f'ckpt-{number}.*')
    return [path for path in paths if re.fullmatch(own, path.name)]

  def _is_complete(self, number):
    """Whether there are as many files as their names say."""
    data = [p for p in self._files(number) if p.suffix != '.index']
    return bool(data) and len(data) == int(data[0].name.rpartition('-')[2])

  def _remove(self, number):
    """Removes a checkpoint, its index first, without which it is none."""
    for path in sorted(self._files(number), reverse=True):
      path.unlink()

  def _sweep(self):
    """Removes unfinished checkpoints, and all but the newest; nothing else.

    What is there stays where there is no checkpoint to go on from.
    """
    keep = {f'ckpt-{n}' for n in self._numbers()[-self.KEEP :]}
    own = r'(ckpt-\d+)(_temp|\.index|\.data-\d+-of-\d+)|checkpoint\.tmp.*'
    for path in self._directory.glob('*'):
      match = re.fullmatch(own, path.name)
      temporary = match and match[2] in ('_temp', None)
      if not match or not (temporary or (keep and match[1] not in keep)):
        continue
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink()


class Lock:
  """Keeps a second process from writing to the same folder.

  The file names the holder; the lock itself is one of the operating
  system, which ends with its process, however that ends.

  Args:
    directory: the folder.
    name: of the file.

  Raises:
    UserError: another process holds it.
  """

  def __init__(self, directory, name='lock'):
    path = pathlib.Path(directory) / name
    self._file = path.open('a+')
    self._file.seek(0)
    holder = self._file.read().strip()
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      age = datetime.timedelta(seconds=int(time.time() - path.stat().st_mtime))
      self._file.close()
      raise UserError(
        f'--logdir {directory} is in use by {holder or "another process"}, '
        f'for {age}: stop that, or choose another folder'
      ) from None
    except OSError as error:  # some network file systems have no locks
      warn(f'{path} cannot be locked: {error.strerror}')
    if holder:
      warn(f'taking over {path} from {holder}, which did not end properly')
    self._file.truncate(0)
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    self._file.flush()

  def release(self):
    """Ends it; the file stays, empty."""
    self._file.truncate(0)
    self._file.close()


def sweep(directory):
  """Removes temporary files that `atomic_write` left when it was killed."""
  for path in pathlib.Path(directory).glob('.*.tmp'):
    path.unlink()


class StopSignal:
  """Lets a run end at a safe place after Ctrl-C or SIGTERM.

  The first signal is noted, and `check` then raises `Stopped`; inside
  `immediate`, where nothing has changed since the last checkpoint, it is
  raised at once. A second signal always is.
  """

  def __init__(self):
    self._requested = False
    self._immediate = False

  @property
  def requested(self):
    return self._requested

  def install(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._handle)

  def check(self):
    if self._requested:
      raise Stopped

  @contextlib.contextmanager
  def immediate(self):
    self._immediate = True
    try:
      self.check()
      yield
    finally:
      self._immediate = False

  def _handle(self, number, frame):
    again, self._requested = self._requested, True
    if self._immediate or again:
      raise Stopped


class Stopwatch:
  """Seconds of a kind of work, without its first call (which traces)."""

  def __init__(self):
    self.count = 0
    self.seconds = 0.0

  @contextlib.contextmanager
  def __call__(self):
    start = time.perf_counter()
    yield
    self.count += 1
    if self.count > 1:
      self.seconds += time.perf_counter() - start

  @property
  def mean(self):
    return self.seconds / max(1, self.count - 1)
