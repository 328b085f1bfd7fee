"""What comes before a run: precision, devices, and its logdir."""

import contextlib
import os
import pathlib
import tempfile
import time

import keras
import tensorflow as tf

import checkpoints
import distribute
import file_io
import runfile
from cli import UserError


def setup_precision(precision):
  """Sets the Keras dtype policy; returns its name.

  GPUs would multiply float32 in TF32, whose mantissa has 10 bits, by default;
  J_S of Eq. 12 is a small difference of large products. So they do not.
  """
  if precision == 'auto':
    if tf.config.list_physical_devices('GPU'):
      precision = '16'
    else:
      precision = 'bfloat16' if _gains_bfloat16() else '32'
  policies = {'16': 'mixed_float16', 'bfloat16': 'mixed_bfloat16'}
  policy = policies.get(precision, 'float32')
  keras.config.set_floatx('float32')  # as keras.json may say otherwise
  keras.config.set_image_data_format('channels_last')
  keras.config.set_dtype_policy(policy)
  tf.config.experimental.enable_tensor_float_32_execution(False)
  return policy


def _gains_bfloat16():
  """Whether this CPU multiplies bfloat16 in hardware, and faster than float32.

  An AMD EPYC takes half the time for a product, an Intel Xeon without AMX
  twice the time. So it is measured, in 0.1 to 0.2 s.
  """
  if not _has_bfloat16():
    return False
  matrices = [tf.ones([512, 512], name) for name in ('float32', 'bfloat16')]
  seconds = [[_product_seconds(m) for m in matrices] for _ in range(6)]
  float32, bfloat16 = map(min, zip(*seconds, strict=True))
  return bfloat16 < 0.8 * float32


def _product_seconds(matrix):
  start = time.perf_counter()
  tf.matmul(matrix, matrix)
  return time.perf_counter() - start


def _has_bfloat16():
  """Whether this CPU multiplies bfloat16 in hardware, by its flags."""
  try:
    flags = pathlib.Path('/proc/cpuinfo').read_text().split()
  except OSError:
    return False
  return 'avx512_bf16' in flags or 'amx_bf16' in flags


def setup_gpus(config):
  """Lets the memory of GPUs grow, unless TensorFlow has computed before."""
  if config.gpu_growth:
    with contextlib.suppress(RuntimeError):
      for gpu in tf.config.list_physical_devices('GPU'):
        tf.config.experimental.set_memory_growth(gpu, True)


def setup_devices(config):
  """What TensorFlow must know before it computes anything; returns the team."""
  if config.deterministic:
    tf.config.experimental.enable_op_determinism()
  setup_gpus(config)
  team = distribute.make_team(config.strategy, config.batch_size)
  team.check_flags(config)
  if team.workers > 1:
    _check_team(config)
  return team


def _check_team(config):
  """UserError where several processes cannot make a run together."""
  evolves = config.behavior == 'evolution' and config.evolve == 'environment'
  for alone, what in (
    (config.offline, '--offline runs'),
    (config.learner == 'free', '--learner free makes its updates'),
    (evolves, '--evolve environment runs'),
  ):
    if alone:
      raise UserError(f'{what} in one process: --strategy mirrored, say')


def setup_logdir(config, team=None):
  """Makes the logdir or checks that this run may resume there.

  Of several processes the chief does this, and the others only make the folder
  of their episodes, which may be the same.

  Returns:
    Its locks, a `contextlib.ExitStack`.

  Raises:
    UserError: it cannot be written, another run is using it, it holds
      something else, or a run whose weights or replay have another shape.
  """
  logdir, team = config.logdir, team or distribute.Team()
  try:
    logdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=logdir), os.scandir(logdir):
      pass
  except OSError as error:
    reason = file_io.why_no_folder(logdir) or error.strerror
    raise UserError(f'cannot write to --logdir {logdir}: {reason}') from None
  for name in ('checkpoints', 'episodes'):
    _check_readable(logdir / name)
  folders = dict(
    both=[logdir, logdir / 'episodes'],
    act=[logdir / runfile.ACT, logdir / 'episodes'],
    learn=[logdir],
  )[config.role]
  with contextlib.ExitStack() as locks:
    if not team.chief:
      locks.callback(checkpoints.Lock(logdir, f'lock{team.suffix}').release)
    elif config.role == 'act':
      runfile.check_actor(config)
      folders[0].mkdir(exist_ok=True)
      locks.enter_context(checkpoints.locked(logdir, config.role))
    else:
      changes = runfile.check_logdir(config)
      locks.enter_context(checkpoints.locked(logdir, config.role))
      known = (logdir / 'config.json').exists()
      if not runfile.has_learned(logdir) and (
        known or not runfile.has_data(logdir)
      ):
        runfile.write_config(config)  # else when it has resumed
      if changes:
        print(f'Resuming with other flags: {", ".join(changes)}.', flush=True)
    (logdir / 'episodes').mkdir(exist_ok=True)
    for folder in folders if team.chief else ():
      file_io.remove_temporary_files(folder)
    return locks.pop_all()


def check_folder(logdir, team):
  """UserError where a process would add to another run than the chief's."""
  own = team.folders > 1 and not team.chief
  own = own and (logdir / 'config.json').exists()
  if team.any(own):
    folder = logdir if own else 'of another process'
    raise UserError(
      f'--logdir {folder} holds a run of its own; give the folder that process '
      '0 has, or one without a run'
    )


def _check_readable(folder):
  """UserError where a folder would seem empty, as it cannot be read."""
  try:
    os.scandir(folder).close()
  except OSError as error:
    reason = file_io.why_no_folder(folder) or error.strerror
    if os.path.islink(folder) or not isinstance(error, FileNotFoundError):
      raise UserError(f'cannot read {folder}: {reason}') from None
