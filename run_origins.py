"""Where a run comes from: command, code, machine and flags of its folder.

From run.json, which scores/runs has, or the config.json of a logdir.
"""

import contextlib
import dataclasses
import io
import itertools
import shlex

import numpy as np

import arguments
import commandline
import configs
import file_io
import runfile
from cli import UserError
from run_folders import MAY_DIFFER


@dataclasses.dataclass
class Origin:
  """Where a run comes from, as its folder says; texts, '' if it does not.

  Attributes:
    flags: {name: value}; {} if unknown.
    versions: {package: version}.
  """

  command: str
  started: str
  code: str
  machine: str
  note: str
  versions: dict
  flags: dict


def origin(run):
  """Reads run.json (as scores/runs has them), or else config.json."""
  paths = run.folder / 'run.json', run.folder / 'config.json'
  record = file_io.read_json(paths[0]) or file_io.read_json(paths[1])
  text = {
    key: str(record.get(key) or '')
    for key in ('command', 'started', 'code', 'machine', 'note')
  }
  versions = record.get('versions')
  versions = versions if isinstance(versions, dict) else {}
  flags = run.config or _flags(text['command'])
  text['command'] = text['command'] or _command(run, flags)
  return Origin(versions=versions, flags=flags, **text)


def _flags(command):
  """All flags of a command of dreamer.py, {} for another."""
  quiet = contextlib.redirect_stdout(io.StringIO())  # with --help
  with contextlib.suppress(ValueError, UserError, SystemExit), quiet:
    words = shlex.split(command)
    words = words[words.index('dreamer.py') + 1 :]
    return dict(commandline.parse_flags(words, resumes=False))
  return {}


def _defaults(run, *start):
  """Defaults by task, preset and inputs, and what `auto` is for the run."""
  config = configs.define_config(*start)
  with contextlib.suppress(UserError):
    _, actions = runfile.load_spaces(run.folder)
    if actions is not None:
      configs.resolve_actions(config, actions)
  return config


def _command(run, flags):
  """The command that has these flags; '' where they are unknown."""
  flags = {'inputs': 'image', **flags}  # before there were others
  with contextlib.suppress(KeyError, TypeError, AttributeError):
    base = _defaults(run, *(flags[name] for name in configs.START))
    base.update(preset='release', inputs='image')
    given = {
      name: value
      for name, value in flags.items()
      if name not in ('logdir', 'task') and value != base.get(name)
    }
    logdir, task = flags.get('logdir', ''), flags['task']
    if task.startswith('custom_'):  # made by a function
      words = [f'task={task!r}', *(f'{k}={v!r}' for k, v in given.items())]
      return f'dreamer.train(make_env, {logdir!r}, {", ".join(words)})'
    words = ['python', 'dreamer.py', '--logdir', logdir, '--task', task]
    for name, value in given.items():
      value = arguments.text(value)
      dash = value.startswith('-')
      words += [f'--{name}={value}'] if dash else [f'--{name}', value]
    return shlex.join(map(str, words))
  return ''


def differences(runs, origins):
  """How runs of a method differ from the defaults of their task.

  Returns:
    Rows of flag, default, and values of the runs; None where no run says.
  """
  known = [x.flags for x in origins if isinstance(x.flags.get('task'), str)]
  if not known:
    return None
  rows, ignored = [], {*MAY_DIFFER, 'task'}
  defaults = _defaults(runs[0], known[0]['task'])
  for name in dict.fromkeys(itertools.chain(*known)):
    default = arguments.text(defaults.get(name, 'unknown to this version'))
    values = dict.fromkeys(arguments.text(f[name]) for f in known if name in f)
    if name not in ignored and list(values) != [default]:
      rows.append((f'--{name}', default, ', '.join(values)))
  return rows


def random_return(reader, runs, origins):
  """Mean return of the random actions that training begins with, or None.

  None for Atari, whose training episodes end with a life.
  """
  returns = []
  for run, about in zip(runs, origins, strict=True):
    prefill = about.flags.get('prefill')
    whole = not str(about.flags.get('task')).startswith('atari_')
    known = isinstance(prefill, (int, float)) and 0 <= prefill <= 1e15
    if known and whole:
      train, learned = (reader.of(run, k) for k in ('train/return', 'updates'))
      first = learned.steps[learned.scores > 0].min(initial=prefill)
      returns += train.scores[train.steps <= first].tolist()
  return float(np.mean(returns)) if returns else None
