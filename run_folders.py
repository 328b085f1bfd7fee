"""Runs of this code and of others on disk: found, read, put into groups.

A run is a logdir of `dreamer.py`, by its config.json, or a folder in the layout
task/method/seed/metrics.jsonl that the 2020 release's plots read. Reads only.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys

import numpy as np

import arguments
import cli
import configs
import file_io
import runfile
from cli import UserError

# Flags in which runs of a method may differ.
# fmt: off
MAY_DIFFER = (
  *runfile.OF_A_PROCESS, 'seed', 'steps', 'save_every', 'worker_timeout',
  'start_timeout', 'env_errors', 'jit',
)
# fmt: on
AXES = 'step', 'test/return'  # keys of metrics.jsonl that the paper has
# Folders of a logdir, in which no other run is looked for.
OF_A_RUN = ('checkpoints', 'episodes', 'plugins', runfile.ACT)
LARGEST = 1e50  # of numbers in a metrics.jsonl: their fourth powers are finite


def warn(message):
  """Warns beside a table on the standard output."""
  print(f'Warning: {cli.printable(message)}', file=sys.stderr)


@dataclasses.dataclass
class RunRecord:
  """One run: `scores[i]` was logged at `steps[i]`, in order of steps."""

  task: str
  method: str
  seed: str
  folder: pathlib.Path
  steps: np.ndarray
  scores: np.ndarray
  config: dict


def find_runs(folders, xaxis=AXES[0], yaxis=AXES[1], read=None):
  """All runs below some folders, sorted; one for each task, method and seed.

  Runs of one task, method and seed that have other flags are arms of an
  experiment: the flags join the names of all runs of that method.

  Args:
    folders: list of paths.
    xaxis, yaxis: keys of metrics.jsonl.
    read: reads a metrics.jsonl as `read_metrics`, the default, does.

  Raises:
    UserError: a folder is missing, or there is no run in any.
  """
  runs = {}  # by folder, as one may be found twice
  for folder in folders:
    check_folder('--indir', folder)
    for path in _run_folders(folder):
      runs[path] = _read_run(path, xaxis, yaxis, read or read_metrics)
  found = {}
  for run in _name_arms(list(filter(None, runs.values()))):
    key = run.task, run.method, run.seed
    other = found.get(key)
    if other:
      shorter, run = sorted((other, run), key=_last_step)
      warn(f'{shorter.folder} is left out: same seed as {run.folder}')
    found[key] = run
  if not found:
    raise UserError(
      f'there is no run in {", ".join(map(str, folders))}: neither a logdir of '
      'dreamer.py (with config.json) nor task/method/seed/metrics.jsonl'
    )
  return [found[key] for key in sorted(found)]


def _name_arms(runs):
  """The runs, with flags in the names of methods where only these differ."""
  methods, same = collections.defaultdict(list), collections.defaultdict(list)
  for run in runs:
    methods[run.method].append(run)
    same[run.task, run.method, run.seed].append(run)
  differ = collections.defaultdict(set)
  for (_, method, _), group in same.items():
    differ[method].update(_differing(group))
  for method, flags in differ.items():
    for run in methods[method] if flags else ():
      words = [f'{k}={_value(run.config, k)}' for k in sorted(flags)]
      run.method = ' '.join([method, *words])
  return runs


def _differing(runs):
  """Flags in which runs differ, but for `MAY_DIFFER`."""
  found, records = [], [run.config for run in runs if run.config]
  for name in set().union(*records) - set(MAY_DIFFER):
    values = {_value(config, name) for config in records}
    if name in configs.RESOLVED:
      values -= {'auto'}  # what it stands for follows from the task
    logged = name.startswith(('log_', 'eval_every', 'eval_episodes'))
    if len(values) > 1 and not logged:
      found.append(name)
  return sorted(found)


def _value(config, name):
  """A flag of a run in words; older code did what its default is now."""
  flag = configs.all_flags().get(name)
  if not flag:  # of other code
    return None
  value = config.get(name, flag.default)
  with contextlib.suppress(ValueError, KeyError, OverflowError, UserError):
    value = flag.kind.parse(arguments.text(value))
  return runfile.quoted(value)


def check_folder(flag, folder):
  """UserError where what a flag names is no folder."""
  if not os.path.isdir(folder):  # unlike the path's own, it never raises
    raise UserError(f'{flag} {folder} is not a folder that can be read')


def _last_step(run):
  return run.steps[-1] if len(run.steps) else -1


def _run_folders(top):
  """Each folder below `top` that has a run, once, however links lead to it."""
  seen = set()
  for folder, folders, files in os.walk(
    top.resolve(), onerror=_left_out, followlinks=True
  ):
    real = os.path.realpath(folder)
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    folders.sort()
    if 'config.json' in files or 'metrics.jsonl' in files:
      folders[:] = [name for name in folders if name not in OF_A_RUN]
      yield pathlib.Path(folder)


def _left_out(error):
  warn(f'{error.filename} is left out: {error.strerror}')


def _read_run(folder, xaxis, yaxis, read):
  """The run in a folder, None where that does not say which task it is."""
  named = _read_config(folder / 'config.json') or _read_names(folder)
  if not named:
    warn(
      f'{folder} is left out: it has no config.json of dreamer.py, and is '
      'not called task/method/seed'
    )
    return None
  steps, scores = read(folder / 'metrics.jsonl', xaxis, yaxis)
  task, method, seed, config = named
  task = paper_name(task)
  return RunRecord(task, method, seed, folder, steps, scores, config)


def paper_name(task):
  """The one name of a task that has two."""
  return 'dmc_cup_catch' if task == 'dmc_ball_in_cup_catch' else task


def _read_config(path):
  """(task, method, seed, flags), None without a readable file.

  Runs with another preset than the release's get its name after the method. An
  arm of sweep.py, in task/arm/seed, has the name of its folder.
  """
  try:
    record = json.loads(path.read_text())
    config = dict(record['config'])
    method = record.get('method', 'dreamer')
    suffix = f'-{config.get("preset", "release")}'.replace('-release', '')
    task, method = config['task'] + '', method + ''  # TypeError unless names
    names = [task, path.parent.parent.name, str(config['seed'])]
    if [*path.parts[-4:-1]] == names and names[1].startswith(f'{method}-'):
      method = names[1].removesuffix(suffix)
    method += suffix
    if config.get('env_args'):  # another task
      task += f' {json.dumps(config["env_args"])}'
    return task, method, str(config['seed']), config
  except FileNotFoundError:
    return None
  except OSError as error:
    _left_out(error)
    return None
  except (ValueError, KeyError, TypeError, RecursionError):
    warn(f'{path} is not readable as the configuration of a run')
    return None


def _read_names(folder):
  names = folder.parts[-3:]
  if len(names) < 3 or not re.match(r'(dmc|atari|dmlab|gym|toy)_', names[0]):
    return None
  return (*names, {})


def read_metrics(path, xaxis=AXES[0], yaxis=AXES[1]):
  """Numbers of one key of a metrics.jsonl, as (x, y) sorted by x."""
  return read_series(path, xaxis, [yaxis])[yaxis]


def metrics_files(path):
  """A metrics.jsonl, and that of `--role act` beside it."""
  return path, path.parent / runfile.ACT / path.name


def read_series(path, xaxis, names):
  """Numbers of several keys of a metrics.jsonl: {name: (x, y) sorted by x}.

  With it is read what a process wrote that acts alone (`--role act`). Lines
  that are not JSON (such as a half-written last one) and numbers that are not
  finite, or beyond `LARGEST`, are left out with a warning.
  """
  series = {name: [] for name in names}
  broken, infinite, lines = 0, 0, []
  for file in metrics_files(path):
    try:
      lines += file.read_bytes().splitlines()
    except FileNotFoundError:
      pass
    except OSError as error:
      _left_out(error)
  for line in lines:
    try:
      record = json.loads(line)
      pairs = {
        name: (float(record[xaxis]), float(record[name]))
        for name in names
        if name in record and xaxis in record
      }
    except (ValueError, TypeError, OverflowError, RecursionError):
      broken += 1
      continue
    for name, pair in pairs.items():
      if all(abs(x) <= LARGEST for x in pair):  # nan is not
        series[name].append(pair)
      else:
        infinite += 1
  if broken:
    warn(f'{path}: {broken} broken lines are left out')
  if infinite:
    warn(
      f'{path}: {infinite} numbers that are not finite, or beyond '
      f'{LARGEST:g}, are left out'
    )
  return {name: _columns(pairs) for name, pairs in series.items()}


def keys_of(folder):
  """All keys in the metrics.jsonl of a run."""
  keys = set()
  for file in metrics_files(folder / 'metrics.jsonl'):
    with contextlib.suppress(OSError):
      for record in file_io.records(file.read_bytes()):
        keys |= record.keys()
  return keys


def _columns(pairs):
  pairs = np.array(sorted(pairs, key=lambda pair: pair[0])).reshape(-1, 2)
  return pairs[:, 0], pairs[:, 1]


def select(runs, tasks, methods):
  """Runs whose task and method match one of the regular expressions each."""
  for name, patterns in (('tasks', tasks), ('methods', methods)):
    key = name[:-1]
    names = sorted({getattr(run, key) for run in runs})
    match = {n for n in names if any(re.search(p, n) for p in patterns)}
    if not match:
      raise UserError(
        f'--{name} {" ".join(patterns)} fits none of the runs; there are '
        + ', '.join(names)
      )
    runs = [run for run in runs if getattr(run, key) in match]
  return runs


def group_runs(runs):
  """{(task, method): runs}; warns of flags in which they differ."""
  groups = collections.defaultdict(list)
  for run in runs:
    groups[run.task, run.method].append(run)
  for (task, method), group in groups.items():
    differ = _differing(group)
    if differ:
      warn(f'runs of {task}, {method} differ in {", ".join(differ)}')
  return dict(groups)
