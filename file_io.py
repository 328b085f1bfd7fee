"""Files that are there whole or not at all, JSON, and errors of files."""

import contextlib
import errno
import json
import os
import pathlib
import re
import stat

from cli import Failure, UserError

RUN_FILES = 'config.json', 'metrics.jsonl', 'run.json'


def make_folders(*paths):
  """Makes the folders of what will be written, before the work is done.

  Raises:
    UserError: one cannot be made or written to.
  """
  for path in filter(None, paths):
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      reason = why_no_folder(path) or error.strerror
      raise UserError(f'cannot write to {path}: {reason}') from None
    if not os.access(path, os.W_OK):
      raise UserError(f'cannot write to {path}')


def why_no_folder(path):
  """What is in the place of a folder that cannot be made, or ''."""
  for place in (path, *path.parents):
    if os.path.islink(place) and not os.path.exists(place):
      return f'{place} is a link to {os.readlink(place)}, which leads nowhere'
  return '' if os.path.isdir(path) or not os.path.exists(path) else 'no folder'


def make_outputs(file, *folders):
  """As `make_folders`, for folders and a file, each a path or None.

  Files that a run has written are not written over.
  """
  written = file and not _is_stdout(file) and not _is_no_file(file)
  make_folders(*folders, file.parent if written else None)
  if file and file.is_dir():
    raise UserError(f'{file} is a folder; choose another name for the file')
  if file and file.name in RUN_FILES and file.exists():
    others = {*RUN_FILES, 'checkpoints', 'episodes'} - {file.name}
    if any((file.parent / name).exists() for name in others):
      raise UserError(f'{file} is a file of a run; choose another name')


TEMPORARY = r'\..+\.\d+\.tmp'  # names of the files that `atomic_write` fills


@contextlib.contextmanager
def atomic_write(path):
  """Yields a binary file that appears under `path` whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name[:50]}.{os.getpid()}.tmp')
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
    if error.filename in (None, str(temporary)):
      error.filename = str(path)
      with contextlib.suppress(AttributeError):
        del error.filename2
    raise
  finally:
    temporary.unlink(missing_ok=True)


def to_json(record):
  """Bytes of a file of JSON."""
  return (json.dumps(record, indent=2) + '\n').encode()


def write_json(path, record):
  """Writes a file of JSON, whole or not at all; links to files stay.

  To what is no file, such as a pipe at /dev/stdout, it is written as it is.
  """
  path, data = pathlib.Path(path), to_json(record)
  if _is_stdout(path):  # after what was printed, though it may be a file
    print(data.decode(), end='', flush=True)
    return
  if _is_no_file(path):
    path.write_bytes(data)
    return
  with atomic_write(os.path.realpath(path)) as file:
    file.write(data)


def _is_stdout(path):
  with contextlib.suppress(OSError):
    return os.path.samestat(path.stat(), os.fstat(1))
  return False


def _is_no_file(path):
  with contextlib.suppress(OSError):
    return not stat.S_ISREG(path.stat().st_mode)
  return False


def read_json(path):
  """The dictionary in a file of JSON, empty where it cannot be read."""
  with contextlib.suppress(OSError, ValueError, RecursionError):
    record = json.loads(path.read_text())
    if isinstance(record, dict):
      return record
  return {}


def records(data):
  """Yields the JSON objects among lines, bytes; other lines are left out."""
  for line in data.splitlines():
    record = None
    with contextlib.suppress(ValueError, RecursionError):
      record = json.loads(line)
    if isinstance(record, dict):
      yield record


@contextlib.contextmanager
def file_errors():
  """Turns errors of files into a UserError, but not of a closed output."""
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    kind = Failure if error.errno == errno.ENOSPC else UserError
    raise kind(f'cannot read or write: {error}') from None


def remove_temporary_files(directory):
  """Removes temporary files that `atomic_write` left when it was killed."""
  for path in pathlib.Path(directory).glob('.*.tmp'):
    if re.fullmatch(TEMPORARY, path.name):
      path.unlink()
