"""Checkpoints of weights and counters, and the lock of a logdir."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
import time

import tensorflow as tf

import runfile
from cli import UserError, nearest, warn
from file_io import atomic_write, remove_temporary_files


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
  OTHER_CODE = (
    'was not made by this version of the code',
    'use the version that made it, or a new logdir',
  )

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
        # It says: operation, path of a temporary file; reason.
        reason = self._reason(error, folder).rpartition('; ')[2]
        full = 'space' in reason or 'quota' in reason
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, reason[:200], str(self._directory)) from None
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

  def newest(self):
    """Number of the newest checkpoint, -1 if there is none."""
    return max(self._numbers(), default=-1)

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
        reason = self._reason(error, folder)[:200]
        problem, hint = self.OTHER_CODE
      except (tf.errors.OpError, IndexError) as error:
        reason = self._reason(error, folder)[:200]
        if number not in self._numbers() or self._is_wrong(number, path):
          return reason
        problem = 'cannot be restored, though its bytes are right'
        hint = 'make it readable, and start again; nothing was changed'
        if isinstance(error, tf.errors.InvalidArgumentError):  # another dtype
          problem, hint = self.OTHER_CODE
      tf.get_logger().setLevel('ERROR')  # it would list every value
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
      except FileNotFoundError:  # a run beside us has just removed it
        return True
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
    """The first line of an error, with the real path, without operations."""
    line = (str(error) or type(error).__name__).partition('\n')[0]
    line = re.sub(r'^\{\{.*?\}\}\s*|\s*\[Op:\w+\]$', '', line)
    return line.replace(folder, str(self._directory))

  def _numbers(self):
    return runfile.checkpoint_numbers(self._directory)

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
    remove_temporary_files(self._directory)
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


def load_agent(config, make_agent, actspace, inputs):
  """The agent of a logdir as its newest checkpoint has it, without optimizers.

  Args:
    config: from `runfile.load_config`.
    make_agent: class of the agent: `dreamer.Dreamer`.
    actspace: its action space.
    inputs: {name: shape} of what it sees.

  Raises:
    UserError: there is no checkpoint, or it is of other code.
  """
  agent = make_agent(config, actspace, inputs=inputs)
  folder = config.logdir / 'checkpoints'
  saved = Checkpoints(folder, **agent.knowledge())
  tried = None  # a run beside us may replace all that we found
  while tried != saved.newest():
    tried = saved.newest()
    if saved.restore():
      return agent
  if saved.newest_trace():
    raise UserError(f'no checkpoint in {folder} is whole')
  raise UserError(
    f'--logdir {config.logdir} has no checkpoint yet; a run saves its '
    'first one within --save_every minutes of updates'
  )


def copy_weights(source, target, only=''):
  """Copies the weights whose names and shapes agree.

  A network of which only biases would agree keeps its own weights.

  Args:
    source, target: {name in checkpoints: Keras layer}.
    only: names of networks with commas between them, `encoder` and `decoder`
      for all of these; '' for all.

  Returns:
    What was copied, and what not: lists of texts.

  Raises:
    UserError: `only` names a network that `target` lacks.
  """
  groups = {name: _group(name) for name in target}
  chosen = only.split(',') if only else list(groups.values())
  for word in chosen:
    if word not in groups.values():
      names = list(dict.fromkeys(groups.values()))
      raise UserError(
        f'--init_only {word}: there is no such network{nearest(word, names)}; '
        f'this run has {", ".join(names)}'
      )
  taken, fresh = [], []
  for name, layer in target.items():
    wanted = name in source and groups[name] in chosen
    known = {w.path: w for w in source[name].weights} if wanted else {}
    fit = [
      w
      for w in layer.weights
      if w.path in known and known[w.path].shape == w.shape
    ]
    if any(map(_is_matrix, layer.weights)) and not any(map(_is_matrix, fit)):
      fit = []  # the last bias fits networks of any size
    for weight in fit:
      weight.assign(known[weight.path])
    count, total = len(fit), len(layer.weights)
    part = f' ({count} of {total} arrays)' if 0 < count < total else ''
    (taken if fit else fresh).append(f'{name}{part}')
  return taken, fresh


def _is_matrix(weight):
  return len(weight.shape) > 1


def _group(name):
  """What users call a network: encode_2 is one of `encoder`."""
  match = re.match('encode|decode', name)
  return f'{match[0]}r' if match else name


class Lock:
  """Keeps a second process from writing to the same folder.

  The file names the holder; the lock itself is one of the operating
  system, which ends with its process, however that ends.

  Args:
    directory: the folder.
    name: of the file.
    note: what else the file says of the holder.

  Raises:
    UserError: another process holds it.
  """

  def __init__(self, directory, name='lock', note=''):
    path = pathlib.Path(directory) / name
    self._file = path.open('a+', errors='replace')
    self._file.seek(0)
    holder = self._file.read().strip()
    try:
      self._take()
    except BlockingIOError:
      seconds = max(0, time.time() - path.stat().st_mtime)  # clocks go back
      age = datetime.timedelta(seconds=int(seconds))
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
    host = socket.gethostname()
    self._file.write(f'process {os.getpid()} on {host}{note}\n')
    self._file.flush()

  def _take(self):
    for left in reversed(range(6)):
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
      except BlockingIOError:
        if not left:
          raise
      time.sleep(0.02)  # one that only looks (`_holder`) has it for a moment

  def release(self):
    """Ends it; the file stays, empty."""
    self._file.truncate(0)
    self._file.close()


LEARNS = ', with --role learn'  # what the lock of a logdir says then


@contextlib.contextmanager
def locked(logdir, role):
  """Holds the locks of what a role writes; see docs/usage.md, "Two processes".

  Args:
    logdir: the folder.
    role: `--role`.

  Raises:
    UserError: another process holds one of them.
  """
  act = logdir / runfile.ACT
  with contextlib.ExitStack() as stack:
    if role != 'act':
      note = LEARNS if role == 'learn' else ''
      stack.callback(Lock(logdir, 'lock', note).release)
    if role == 'act' or (role == 'both' and act.is_dir()):
      stack.callback(Lock(act).release)
    other = role == 'act' and _holder(logdir / 'lock')
    if other and not other.endswith(LEARNS):
      raise UserError(
        f'--logdir {logdir} is in use by {other}, which acts, too: stop that '
        'and start it with --role learn, or choose another folder'
      )
    yield


def _holder(path):
  """What a lock's file says, if a process holds it; '' if none does."""
  try:
    with path.open('r+', errors='replace') as file:
      text = file.read().strip()
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      return ''
  except BlockingIOError:
    return text or 'another process'
  except OSError:  # there is none, or there are no locks here
    return ''
