"""config.json: whose run a logdir is, and flags, versions and machine of it.

No TensorFlow.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import arguments
import cli
import file_io
import spaces
from cli import AttrDict, UserError
from configs import RESOLVED, START, all_flags, define_config, method_name

# Flags of the process that is running, which another one need not have.
# fmt: off
OF_A_PROCESS = (
  'logdir', 'role', 'profile', 'parallel', 'strategy', 'gpu_growth',
)
# fmt: on
FORMAT = 1  # of logdirs: older code refuses those of newer
ACT = 'act'  # folder in a logdir of what --role act writes, but for episodes


class UnreadableError(UserError):
  """A config.json that was cut short or is not one."""


def check_logdir(config):
  """Checks that the run in a logdir, or what else is there, is this run.

  Returns:
    What flags change where a run resumes, as a list of texts.

  Raises:
    UserError: it is not this run.
  """
  logdir, path = config.logdir, config.logdir / 'config.json'
  if not path.exists():
    if has_checkpoint(logdir):
      cli.warn(f'{path} is gone; going on with the flags given')
    else:
      _check_others(logdir)
  else:
    try:
      return _check_resume(config, _saved_flags(path))
    except UnreadableError:
      if not (logdir / 'episodes').is_dir():
        raise UserError(
          f'--logdir {logdir} holds something else (a config.json that is of '
          'no run); choose a new folder'
        ) from None
      path.rename(path.with_suffix('.json.broken'))
      cli.warn(
        f'{path} is not readable and is now {path.name}.broken; going on with '
        'the flags given'
      )
  return []


def check_actor(config):
  """As `check_logdir`, for --role act, which changes nothing of the learner's.

  There may be no learner yet.
  """
  path = config.logdir / 'config.json'
  if path.exists():
    _check_resume(config, _saved_flags(path))
  else:
    _check_others(config.logdir)


def load_actor(config):
  """The configuration of --role act beside --role learn, None without one.

  Raises:
    UserError: the agent of `config` is another.
  """
  path = config.logdir / ACT / 'config.json'
  if not path.exists():
    return None
  saved = _saved_flags(path)
  _check_resume(config, saved, path)
  return AttrDict(saved)


def _check_others(logdir):
  """UserError where a folder without config.json is not that of a run."""
  names = {p.name for p in logdir.iterdir()}
  if 'config.json.broken' in names:
    return
  # What a run leaves that was killed at its very start.
  own = rf'episodes|{ACT}|lock(-\d+)?|{file_io.TEMPORARY}'
  others = sorted(n for n in names if not re.fullmatch(own, n))
  lock, holder = logdir / 'lock', rb'(process \d+ on .*\n)?'
  if lock.is_file() and not re.fullmatch(holder, lock.read_bytes()):
    others.append('lock')
  if others:
    raise UserError(
      f'--logdir {logdir} holds something else ({", ".join(others[:3])}) and '
      'no config.json; choose a new folder'
    )


def _read_config(path):
  """What `write_config` wrote; UserError if broken or of newer code."""
  try:
    record = json.loads(path.read_text())
    record = dict(record, config=dict(record['config']))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f'{path.parent} is not the logdir of a run: there is no config.json'
    ) from None
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from None
  except (ValueError, KeyError, TypeError, RecursionError):
    raise UnreadableError(
      f'{path} is not readable as the configuration of a run'
    ) from None
  unknown = set(record['config']) - set(define_config())
  if record.get('format', FORMAT) != FORMAT or unknown:
    what = f'flags {", ".join(sorted(unknown))}' if unknown else 'format'
    raise UserError(
      f'{path} is of another version of this code ({what}); use that version'
    )
  return record


def load_config(logdir):
  """The configuration of a run, as `define_config` gives it.

  Raises:
    UserError: the folder does not hold a run that this code can read.
  """
  path = pathlib.Path(logdir) / 'config.json'
  return AttrDict(_saved_flags(path), logdir=pathlib.Path(logdir))


def _saved_flags(path):
  """All flags of a config.json.

  A flag that it lacks came later, and its default is what was done before.
  """
  saved = _read_config(path)['config']
  saved.setdefault('inputs', 'image')  # before there were others
  if not all(isinstance(saved.get(k), str) for k in START):
    raise UnreadableError(f'{path} does not say its {", ".join(START)}')
  for name in saved.keys() - {'logdir', 'task'}:
    kind = all_flags()[name].kind
    try:
      saved[name] = kind.parse(arguments.text(saved[name]))
    except (ValueError, KeyError, OverflowError):
      raise UserError(
        f'{path} has --{name} {arguments.text(saved[name])}, which is '
        f'not {kind}'
      ) from None
  return {**{k: flag.default for k, flag in all_flags().items()}, **saved}


def flags_of_run(logdir, start, role=''):
  """Flags with which the run in a logdir goes on, unless they are given.

  They stay what they were, though presets may have other values by now.

  Args:
    logdir: a path.
    start: flags of `START` that the run is to have now.
    role: of the process; --role act has flags of its own once it has begun.

  Returns:
    {flag: value}; nothing where there is no such run, or one with other flags
    of `START`, whose defaults are others.
  """
  path, own = logdir / 'config.json', logdir / ACT / 'config.json'
  try:
    saved = _saved_flags(own if role == 'act' and own.exists() else path)
  except UserError:
    return {}
  if not has_data(logdir) or any(saved[k] != v for k, v in start.items()):
    return {}
  return {k: v for k, v in saved.items() if k not in OF_A_PROCESS}


def load_spaces(logdir):
  """What the agent of a run sees and does, as config.json says.

  Returns:
    {name: shape} of its inputs, and its action space; None twice where the
    file does not say, as those of older code.
  """
  record = _read_config(pathlib.Path(logdir) / 'config.json')
  try:
    inputs = {k: tuple(map(int, v)) for k, v in record['observations'].items()}
    if not inputs or spaces.odd_images(inputs):
      return None, None
    return inputs, spaces.action_space(record['actions'])
  except (KeyError, TypeError, ValueError, AttributeError):
    return None, None


def check_spaces(logdir, inputs, actions):
  """UserError unless a run that began sees and does what is there now.

  Args:
    logdir: with a config.json; without one nothing is checked.
    inputs: {name: shape} of what the agent is to see.
    actions: its action space.
  """
  path = pathlib.Path(logdir) / 'config.json'
  old, acts = load_spaces(logdir) if path.exists() else (None, None)
  if old is None:
    return
  then = old, spaces.action_record(acts)
  shapes = {k: tuple(map(int, v)) for k, v in inputs.items()}
  now = shapes, spaces.action_record(actions)
  if then != now:
    raise UserError(
      f'the environment has changed: it shows {_describe_spaces(*now)}, and '
      f'the run in --logdir {logdir} was made with {_describe_spaces(*then)}. '
      'Bring that environment back, or choose a new folder.'
    )


def _describe_spaces(inputs, actions):
  shown = ', '.join(f'{k} {list(v)}' for k, v in inputs.items())
  return f'{shown} and takes actions {json.dumps(actions)}'


def write_config(config, inputs=None, actions=None, folder=None):
  """Writes config.json: flags, versions, and when the run first started.

  Args:
    config: from `commandline.parse_flags`.
    inputs: {name: shape} of what the agent sees, where it is known.
    actions: its action space, likewise.
    folder: which it is for; None for the logdir.
  """
  path = (folder or config.logdir) / 'config.json'
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  record = _read_config(path) if path.exists() else dict(started=now)
  record.update(method=method_name(config), format=FORMAT)
  record['config'] = {k: _plain(v) for k, v in config.items()}
  about = '{cores} cores of {cpu}, {system}'.format(**machine())
  record.update(versions=versions(), code=commit(), machine=about)
  if inputs:
    record['observations'] = {k: list(v) for k, v in inputs.items()}
    record['actions'] = spaces.action_record(actions)
  file_io.write_json(path, record)


def _plain(value):
  return str(value) if isinstance(value, pathlib.Path) else value


def versions():
  """Of the packages that matter, by name."""
  # fmt: off
  packages = (
    'tensorflow', 'keras', 'tensorflow-probability', 'dm-control',
    'mujoco', 'gym', 'numpy',
  )
  # fmt: on
  versions = dict(python=sys.version.split()[0])
  for package in packages:  # not all of them need be there
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return versions


def machine():
  """What this machine is: its processor, cores and system."""
  cpu = platform.processor() or platform.machine()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    names = [x for x in info.read_text().splitlines() if 'model name' in x]
    cpu = names[0].split(':')[1].strip() if names else cpu
  return dict(
    cpu=cpu, cores=len(os.sched_getaffinity(0)), system=platform.platform()
  )


def commit():
  """Of this code, with a + where files differ from it; None if unknown."""
  root = str(pathlib.Path(__file__).parent)
  # It may belong to another user, and hooks of Git name their own repository.
  options = '-c', f'safe.directory={root}', '-C', root
  git = ['git', '--no-optional-locks', *options]
  env = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  ask = functools.partial(
    subprocess.run, capture_output=True, text=True, check=True, env=env
  )
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    if ask([*git, 'rev-parse', '--show-prefix']).stdout.strip():
      return None  # installed below another repository
    return ask([*git, 'describe', '--always', '--dirty=+']).stdout.strip()
  return None


def _check_resume(config, saved, path=None):
  """The flags that differ from the saved ones; UserError if one may not.

  A run that has neither episodes nor checkpoints yet may still change all.
  """
  changes, logdir = [], config.logdir
  fixed = has_data(logdir)
  for name, flag in all_flags().items():
    old, new = saved[name], config[name]
    if name == 'logdir' or old == new:
      continue
    if name in RESOLVED and 'auto' in (old, new):
      continue
    if fixed and flag.fixed and flag.fixed(old) != flag.fixed(new):
      other = saved['preset'] != config['preset']
      preset = f', and --preset {saved["preset"]}' if other else ''
      raise UserError(
        f'--logdir {logdir} holds a run with --{name} {quoted(old)}, not '
        f'{quoted(new)}{preset}. Resume it with the flags that it was started '
        f'with (see {path or logdir / "config.json"}) or choose a new folder.'
      )
    changes.append(f'--{name} {quoted(new)} (was {quoted(old)})')
  return changes


def has_data(logdir):
  """Whether a logdir has episodes or checkpoints, of whatever run."""
  return any(logdir.glob('episodes/*.npz')) or has_learned(logdir)


def has_learned(logdir):
  """Whether there is any file of a checkpoint."""
  return any(logdir.glob('checkpoints/ckpt-*'))


def quoted(value):
  return "''" if value == '' else arguments.text(value)


def checkpoint_numbers(folder):
  """Those of whole checkpoints: updates, or the next that was free. Sorted."""
  numbers = []
  for path in folder.glob('ckpt-*.index'):
    match = re.fullmatch(r'ckpt-(\d+)\.index', path.name)
    with contextlib.suppress(FileNotFoundError):  # a run beside us goes on
      if match and path.stat().st_size:
        numbers.append(int(match[1]))
  return sorted(numbers)


def has_checkpoint(logdir):
  """Whether there is a checkpoint to go on from, whole or not."""
  return any(logdir.glob('checkpoints/ckpt-*.index'))
