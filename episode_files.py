"""Episodes as `.npz` files of plain arrays, which other programs can read.

Row t has the observation that came after action[t] (see `replay.Collect`). No
TensorFlow here.
"""

import contextlib
import datetime
import errno
import functools
import os
import pathlib
import re
import stat
import struct
import uuid
import zipfile

import numpy as np

import spaces
from file_io import atomic_write
from spaces import TRANSITION_KEYS

EXACT = '0' * 32
# Errors of the system that come of what a file is; others come of the machine.
OF_THE_FILE = (None, errno.EINVAL, errno.EISDIR, errno.ENOENT)


def save_episodes(directory, episodes, exact=False):
  """Writes episodes as `{timestamp}-{uuid}-{length}.npz`; returns the paths.

  `length` counts rows: the reset and one row for each agent step. Files are
  not compressed, so that windows can be read from their place in the file.
  Those of an exact run, which makes them anew if it has to, have `EXACT` in the
  place of the uuid.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  paths = []
  for episode in episodes:
    stamp = _next_stamp(directory)
    number = EXACT if exact else uuid.uuid4().hex
    name = f'{stamp}-{number}-{len(episode["reward"])}.npz'
    with atomic_write(directory / name) as file:
      np.savez(file, **episode)
    paths.append(directory / name)
  return paths


def _next_stamp(directory):
  """The time, but after all names there, so that they sort by their age."""
  form = '%Y%m%dT%H%M%S%f'
  now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
  with contextlib.suppress(ValueError, OverflowError):
    stamp = newest(directory).partition('-')[0]
    last = datetime.datetime.strptime(stamp, form)
    now = max(now, last + datetime.timedelta(microseconds=1))
  return now.strftime(form)


def list_episodes(directory):
  """Names of a folder's episodes, from the oldest; none without a folder."""
  try:
    names = os.listdir(directory)
  except (FileNotFoundError, NotADirectoryError, PermissionError):
    return []
  return sorted(name for name in names if name.endswith('.npz'))


def newest(directory):
  """The last name of a folder's episodes that begins with a time, or ''."""
  return max(filter(is_stamped, list_episodes(directory)), default='')


def is_stamped(name):
  """Whether the name of an episode begins with a time, as those made here."""
  return re.match(r'[12]\d{7}T\d{6}', name) is not None


def episode_length(path):
  """Rows of an episode file, the reset included, from its name."""
  stem = os.path.basename(path).removesuffix('.npz')
  try:
    return int(stem.rpartition('-')[2])
  except ValueError:
    return 0


def episode_return(episode):
  """Sum of an episode's rewards."""
  return float(episode['reward'].astype(np.float64).sum())


def is_exact(name):
  """Whether an exact run made an episode, by its name."""
  return f'-{EXACT}-' in name


def count_episodes(directory):
  """Number of episodes in a folder, and of agent steps in them."""
  lengths = [episode_length(name) for name in list_episodes(directory)]
  return len(lengths), sum(n - 1 for n in lengths if n)


class OtherShape(ValueError):  # noqa: N818 (of a file, not of the program)
  """An episode is whole, but its rows have another shape."""


class EpisodeFile:
  """One episode on disk, read a window at a time.

  The members of an uncompressed `.npz` file lie in it as they are in memory.
  Where they start is looked up once; a window is then one read for each key
  and the page cache keeps what is hot. (Reads rather than memory maps: a map
  holds a file descriptor for each episode and a truncated file would kill the
  process.) Compressed files, as the 2020 release wrote them, are read whole,
  and so are those whose arrays do not lie row by row.
  Nothing in a file is trusted: its structure is checked before the first read,
  and its checksums once, at the first read.

  Args:
    path: of the file.
    shapes: {key: shape of a row} that the arrays must have.
    onehot: whether actions must be one-hot vectors, or several side by side.
  """

  LARGEST = 2**30  # bytes, compressed; a whole game of Atari has 0.33e9

  def __init__(self, path, shapes=None, onehot=False):
    self.path = pathlib.Path(path)
    self.length = episode_length(path)
    self._shapes = shapes or {}
    self._onehot = onehot
    self._members = None

  def read(self, start, stop):
    """Rows [start, stop): dictionary of arrays. ValueError if broken.

    Before the first row there was no action, so it has zeros for one.
    """
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
      for key in (*TRANSITION_KEYS, *self._shapes):
        if not spaces.is_image(key) and not _finite(rows[key]):
          raise ValueError(f'{key} is not finite, as float32')
      if start == 0 and rows['action'][:1].any():
        rows['action'] = rows['action'].copy()
        rows['action'][0] = 0
      taken = rows['action'][1 if start == 0 else 0 :]
      _check_actions(taken, self._onehot)
      if not ((rows['discount'] >= 0) & (rows['discount'] <= 1)).all():
        raise ValueError('it has discounts beyond [0, 1]')
      return rows

  def actions(self):
    """Actions of all rows but the first, as they are, without the rest."""
    with self._errors():
      self._locate()
      with np.load(self.path, allow_pickle=False) as file:
        return file['action'][1:]

  def check(self):
    """ValueError if its structure is broken; reads no images."""
    with self._errors():
      self._locate()

  @contextlib.contextmanager
  def _errors(self):
    try:
      yield
    except (ValueError, MemoryError):
      raise
    except Exception as error:  # anything may be wrong with such a file
      if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
        raise
      raise ValueError(f'{type(error).__name__}: {error}') from error

  def _locate(self):
    """Maps each key to (offset, dtype, row shape); empty if read whole."""
    members, arrays, stored = {}, {}, True
    if not stat.S_ISREG(self.path.stat().st_mode):
      raise ValueError('it is not a file')  # a pipe would be waited for
    with zipfile.ZipFile(self.path) as archive:
      infos = archive.infolist()
      packed = (i for i in infos if i.compress_type != zipfile.ZIP_STORED)
      if sum(i.file_size for i in packed) > self.LARGEST:
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
        if dtype.kind not in 'biuf':
          raise ValueError(f'{info.filename} is not a plain array')
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if info.file_size != header + size:
          raise ValueError(f'{info.filename} has not the size of its array')
        key = info.filename.removesuffix('.npy')
        if '\\' in key or '..' in key or key.startswith('/'):
          raise ValueError(f'{info.filename} is no name of an array')
        arrays[key] = shape, dtype
        stored = stored and info.compress_type == zipfile.ZIP_STORED
        stored = stored and not (fortran and len(shape) > 1)
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
    wanted = {**self._shapes, 'reward': (), 'discount': ()}
    missing = {'action', *wanted} - set(arrays)
    if missing:
      kind = ValueError if missing & {*TRANSITION_KEYS} else OtherShape
      raise kind(f'it lacks {", ".join(sorted(missing))}')
    for key, (shape, _) in arrays.items():
      if not shape or shape[0] != self.length:
        raise ValueError(f'{key} has shape {shape}, not {self.length} rows')
    for key in filter(spaces.is_image, arrays):
      if arrays[key][1] != np.uint8:
        raise ValueError(f'{key} is {arrays[key][1]}, not uint8')
    for key, expected in wanted.items():
      if arrays[key][0][1:] != expected:
        shape = arrays[key][0]
        raise OtherShape(f'{key} has shape {shape}, each row not {expected}')

  @staticmethod
  def _read(file, start, stop, offset, dtype, shape):
    row = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    file.seek(offset + start * row)
    data = file.read((stop - start) * row)
    if len(data) != (stop - start) * row:
      raise ValueError('it is cut short')
    return np.frombuffer(data, dtype).reshape((stop - start, *shape))


def _check_actions(actions, onehot):
  """ValueError unless an agent can choose them."""
  if onehot and not is_onehot(actions):
    raise ValueError('it has actions that are no one-hot vectors')
  if np.abs(actions.astype(np.float32)).max(initial=0) > 1.001:
    raise ValueError(
      'it has actions beyond [-1, 1]: scale them to that range, or make '
      'choices one-hot vectors'
    )


def is_onehot(actions):
  """Whether actions [T, A] may be one-hot vectors, or several side by side."""
  counts = actions.sum(-1)
  alike = len(np.unique(counts)) <= 1 and counts.all()
  return bool(alike and np.isin(actions, (0, 1)).all())


def _finite(array):
  """Whether all numbers are, as the float32 that they become."""
  with np.errstate(over='ignore'):
    return np.isfinite(array.astype(np.float32, copy=False)).all()


@functools.lru_cache(maxsize=16)
def _load_compressed(path):
  with np.load(path, allow_pickle=False) as episode:
    return {k: episode[k] for k in episode.files}
