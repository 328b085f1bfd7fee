"""One agent on several devices and hosts, by `tf.distribute`.

    --strategy single       one device
    --strategy mirrored     all GPUs of this host
    --strategy multiworker  the processes that TF_CONFIG lists, on any hosts
    --strategy auto         what there is

Each device is a replica with a copy of all variables. A batch of `batch_size`
sequences is split over the R replicas; what they compute is averaged where
the losses take means, so that the update is the one of a single device:

    batch [B, ...] --> replica 0: rows 0 .. B/R-1  --> gradients --\\
                   --> replica 1: rows B/R ..      --> gradients ---+-- sum
                   --> ...                                         /     |
    noise [B, ...] --> the same rows                                     v
                       clip, Adam: alike on every replica  <-- gradient of all

What replicas exchange goes through the functions below; on one device these
return what they are given.
"""

import contextlib
import functools
import json
import math
import os
import zlib

import numpy as np
import tensorflow as tf

import tf_config
from cli import Failure, UserError

# --- Within a replica -------------------------------------------------------


def replica():
  """(index, count): which part of the whole batch is computed here."""
  context = tf.distribute.get_replica_context()
  if context is None or context.num_replicas_in_sync == 1:
    return 0, 1
  return context.replica_id_in_sync_group, context.num_replicas_in_sync


def mean(tensors):
  """Means of nested tensors over the replicas, the same in each."""
  return _reduce('MEAN', tensors)


def sum_(tensors):
  """Sums of nested tensors over the replicas, the same in each."""
  return _reduce('SUM', tensors)


def _reduce(how, tensors):
  if replica()[1] == 1:
    return tensors
  return tf.distribute.get_replica_context().all_reduce(how, tensors)


def global_mean(value):
  """The mean over the replicas, whose gradient is that of the own part.

  The gradients of all replicas, averaged, are then those of the mean.
  """
  if replica()[1] == 1:
    return value
  return value + tf.stop_gradient(mean(value) - value)


def some_rows(tensors, wanted, seed):
  """Rows drawn without repetition, of all replicas together.

  Args:
    tensors: dictionary of [N, ...], the own part.
    wanted: how many of all replicas' rows; 0: all.
    seed: int32 [2].

  Returns:
    The same with [wanted / replicas, ...].
  """
  count = next(iter(tensors.values())).shape[0]
  wanted = math.ceil(wanted / replica()[1])
  if not 0 < wanted < count:
    return tensors
  chance = uniform([count], seed)  # other rows in each replica
  index = tf.math.top_k(chance, wanted, sorted=False).indices
  return {k: tf.gather(v, index) for k, v in tensors.items()}


def gather(tensor):
  """Rows of all replicas, [R * N, ...] of [N, ...], with their gradient."""
  if replica()[1] == 1:
    return tensor
  return tf.distribute.get_replica_context().all_gather(tensor, 0)


def dims(tensor):
  """Its shape, a list: integers where they are known, else scalar tensors."""
  known = tensor.shape
  if known.is_fully_defined():
    return list(known)
  shape = tf.shape(tensor)
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


# --- Processes and devices ---------------------------------------------------

# Collective operations end with one of these when a process of them is gone.
LOST = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
  tf.errors.InternalError,
  tf.errors.UnavailableError,
)


class PeerLost(Failure):  # noqa: N818 (as `worker_calls.WorkerLost`)
  """Another process of this run is gone, and no update can be made."""

  def leave(self):
    """Ends this process, as TensorFlow would wait for the others."""
    os._exit(self.code)


class Team:
  """The devices and processes that train one agent.

  Args:
    strategy: a `tf.distribute.Strategy`; None for one device.
    index: of this process, 0 for the chief.
    workers: number of processes.
  """

  def __init__(self, strategy=None, index=0, workers=1):
    self.strategy = strategy or tf.distribute.get_strategy()
    self.index, self.workers = index, workers
    self.chief = index == 0
    self.suffix = '' if self.chief else f'-{index}'  # of its own files
    self.folders = 1  # that hold episodes, one for all or one for each
    self.replicas = self.strategy.num_replicas_in_sync
    self._sum = tf.function(
      lambda values: [self.strategy.reduce('SUM', x, None) for x in values],
      autograph=False,
    )

  def __str__(self):
    if self.replicas == 1:
      return 'one device'
    hosts = f' of {self.workers} processes' if self.workers > 1 else ''
    return f'{self.replicas} devices{hosts}'

  def seed(self, seed):
    """A seed of this process's own; the chief's is `seed` itself."""
    if self.chief:
      return seed
    return int(np.random.SeedSequence([seed, self.index]).generate_state(1)[0])

  def scope(self):
    """Where variables are made, one copy for each replica."""
    return self.strategy.scope()

  def run(self, function, data):
    """Calls `function(data)` on every replica; returns what the first did."""
    results = self.strategy.run(function, (data,))
    return tf.nest.map_structure(
      lambda x: self.strategy.experimental_local_results(x)[0], results
    )

  def place(self, batch):
    """Moves the batch of this process to its replicas, each its rows.

    Args:
      batch: dictionary of arrays [B / workers, ...].
    """
    if self.replicas == 1:
      return {k: tf.convert_to_tensor(v) for k, v in batch.items()}
    local = self.replicas // self.workers
    rows = len(next(iter(batch.values()))) // local

    def cut(context):
      start = context.replica_id_in_sync_group % local * rows
      part = {k: v[start : start + rows] for k, v in batch.items()}
      device = self.strategy.extended.worker_devices[start // rows]
      with tf.device(device):
        return {k: tf.convert_to_tensor(v) for k, v in part.items()}

    return self.strategy.experimental_distribute_values_from_function(cut)

  def sum(self, value):
    """The sum of an integer, or array of them, over the processes.

    Blocks until every process calls it, as do the methods below.
    """
    return self._sum_all([np.asarray(value, np.int64)])[0]

  def any(self, flag):
    """Whether the flag is set in any process."""
    return bool(self.sum(bool(flag)))

  def wait(self):
    """Until all processes are here."""
    self.sum(0)

  @contextlib.contextmanager
  def chief_first(self):
    """What is inside is done by the chief, then by the other processes."""
    if not self.chief:
      self.wait()
    yield
    if self.chief:
      self.wait()

  def from_chief(self, value):
    """The chief's value of an integer, in all processes."""
    return int(self.sum(value if self.chief else 0))

  def broadcast(self, variables):
    """Gives all processes the chief's values of these variables."""
    if self.workers == 1:
      return
    own = [v.numpy() for v in variables]
    given = [x.astype(np.int64) if x.dtype == bool else x for x in own]
    if not self.chief:
      given = [np.zeros_like(x) for x in given]
    received = self._sum_all(given)
    for variable, new, old in zip(variables, received, own, strict=True):
      variable.assign(new.astype(old.dtype))

  def _sum_all(self, values):
    """Sums of a list of arrays over the processes."""
    if self.workers == 1:
      return values
    local = self.replicas // self.workers

    def give(context):
      first = context.replica_id_in_sync_group % local == 0
      return [
        tf.convert_to_tensor(x * np.asarray(first, x.dtype)) for x in values
      ]

    distribute = self.strategy.experimental_distribute_values_from_function
    with self.errors():
      return [x.numpy() for x in self._sum(distribute(give))]

  def check_flags(self, config):
    """UserError in all processes if they were started with other flags."""
    own = ('logdir', 'parallel', 'worker_timeout', 'start_timeout')
    names = [name for name in config if name not in own]
    texts = [json.dumps(config[name], sort_keys=True) for name in names]
    sums = np.array([zlib.crc32(text.encode()) for text in texts], np.int64)
    differ = np.flatnonzero(self.sum(sums) != self.workers * sums)
    if self.any(len(differ)):
      flags = ', '.join(f'--{names[i]}' for i in differ) or 'some flags'
      raise UserError(
        f'the processes of this run have different values of {flags}; start '
        'all with the same command, these flags in it, but for --logdir'
      )

  def compare_folders(self, directory):
    """Finds out whether all processes see the chief's folder, by its lock."""
    if self.workers == 1:
      return
    path = directory / 'lock'
    text = path.read_bytes() if path.exists() else b''
    mine = zlib.crc32(text)
    count = int(self.sum(mine == self.from_chief(mine)))
    if 1 < count < self.workers:
      raise UserError(
        f'{count} of {self.workers} processes share the --logdir of the '
        'chief; let all of them share it, or none'
      )
    self.folders = 1 if count == self.workers else self.workers

  @contextlib.contextmanager
  def errors(self):
    """Turns what TensorFlow raises when a process is gone into `PeerLost`."""
    try:
      yield
    except LOST as error:
      if self.workers == 1:
        raise
      lines = str(error).splitlines()
      told = [x for x in lines if 'aborted' in x or 'unhealthy' in x]
      reason = (told or lines)[0].strip()[:200]
      raise PeerLost(
        f'another process of this run is gone or cannot be reached ({reason}). '
        'The same commands, in all processes, resume'
      ) from None


def make_team(strategy, batch_size):
  """The team that `--strategy` asks for.

  Must be called before TensorFlow computes anything. With several processes
  it waits until all are there.

  Args:
    strategy: one of `configs.STRATEGY`.
    batch_size: B, which the number of replicas has to divide; `auto` takes as
      many GPUs as do.

  Raises:
    UserError: TF_CONFIG is missing or broken, or the batch cannot be split.
  """
  if strategy == 'single':
    return Team()
  cluster = tf_config.read()
  gpus = len(tf.config.list_physical_devices('GPU'))
  several = strategy == 'auto' and cluster and len(cluster[1]) > 1
  if strategy == 'multiworker' or several:
    joined = tf_config.join(cluster)
    index, addresses = cluster
    team = Team(joined, index, len(addresses))
  elif strategy == 'mirrored':
    team = _mirror(gpus)
  else:
    fitting = [n for n in range(2, gpus + 1) if batch_size % n == 0]
    return _mirror(fitting[-1]) if fitting else Team()
  if batch_size % team.replicas:
    below = batch_size // team.replicas * team.replicas
    near = [n for n in (below, below + team.replicas) if n]
    raise UserError(
      f'--batch_size {batch_size} cannot be split over {team.replicas} '
      f'devices; choose {" or ".join(map(str, near))}'
    )
  return team


def _mirror(gpus):
  """On the first GPUs, or without any on the virtual devices of the CPU."""
  devices = [f'GPU:{index}' for index in range(gpus)]
  devices = devices or [d.name for d in tf.config.list_logical_devices('CPU')]
  return Team(tf.distribute.MirroredStrategy(devices))
