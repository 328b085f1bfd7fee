"""Runs dreamer.py on tasks x methods x seeds, on what a Ray cluster has.

    python sweep.py --tasks dmc20 --seeds 5 --logdir ./logdir/sweep
    python sweep.py --tasks figure8 --logdir ./logdir/figure8 -- --preset cpu

Without --address, Ray is this machine. Flags after -- go to each dreamer.py.
A run is in LOGDIR/task/method/seed, what it prints in LOGDIR/task/method/
seed.out, and `python compare.py --indir LOGDIR` compares all of them.

The same command goes on: runs that are finished are skipped, others resume
from their checkpoints. A run that fails or is killed, or whose node is lost, is
tried again, --retries times; one that says that its input is bad (exit code 2)
is not. Ctrl-C or SIGTERM lets all runs save and stop, a second one kills them.

Exit codes: 0 all runs are done, 1 some failed or were refused, 2 bad input,
130 stopped.

Sets of tasks for --tasks, which may be mixed with names of tasks, by commas:

  dmc20     the paper's 20 tasks of the control suite
  atari9    the Atari games on the paper's website, which shows eleven (and
            dmlab_collect, which needs DeepMind Lab: name it where you have it)
  figure4   three methods with horizons 10, 20, 30, 45; 4 tasks
  figure8   three representations; 20 tasks
  figure12  action repeats 1, 2, 4; 20 tasks (the paper has 2 seeds)

A figure brings its own methods, of which --methods then keeps some. The paper's
text does not name the tasks of Figures 4 and 12, nor the horizons: those of
Figure 4 are two with long horizons and two reactive ones, by Figure 7's words.

On a cluster, code and Python packages are at the same paths on all nodes, and
--logdir is on storage that all nodes see.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import sys
import time

import arguments
import cli
import commandline
import configs
import file_io
import paper_scores
import ray_runs
import run_folders
import suites
from cli import UserError, nearest

METHODS = configs.methods()
SETS = ('dmc20', 'atari9', 'figure4', 'figure8', 'figure12')
# fmt: off
ATARI = (
  'fishing_derby', 'ice_hockey', 'kung_fu_master', 'assault', 'boxing',
  'hero', 'freeway', 'frostbite', 'montezuma_revenge', 'pong', 'tennis',
)
# fmt: on
FIGURE4 = ('acrobot_swingup', 'hopper_hop', 'walker_walk', 'walker_run')
HORIZONS = (10, 20, 30, 45)
REPEATS = (1, 2, 4)
# What a method's name tells beside its arm: `dreamer-state`, `planet-free`.
SETTING = dict(inputs='image', learner='scheduled', offline='')
OWN = ('--logdir', '--task', '--seed', '--role')  # flags that are set here
LINES = 300  # seconds between lines of a run where there is no terminal

# --- What to run ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
  """A method with flags, and the name of its folder."""

  name: str
  method: str
  flags: tuple


@dataclasses.dataclass(eq=False)
class SweepRun:
  """One run, and how it is doing."""

  task: str
  arm: Arm
  seed: int
  logdir: pathlib.Path
  config: dict  # all flags, as dreamer.py has them
  flags: list
  state: str = 'waiting'
  note: str = ''
  tries: int = 0  # again, after the first
  after: float = 0.0  # time before which it is not tried again
  actor: object = None
  answer: object = None  # of the actor, to come
  progress: dict = dataclasses.field(default_factory=dict)

  @property
  def name(self):
    return f'{self.task} {self.arm.name} {self.seed}'

  @property
  def last_step(self):
    return configs.last_step(self.config)


def plain(method):
  return Arm(method, method, METHODS[method])


def expand(name, methods=None):
  """All (task, Arm) of the name of a set or a task.

  Args:
    name: one of `SETS`, or a task.
    methods: names of those to keep; None: all of a figure, else Dreamer.
  """
  dmc20 = list(paper_scores.load()['final'])
  arms = [plain(method) for method in methods or ['dreamer']]
  tasks = {
    'dmc20': dmc20,
    'atari9': [f'atari_{game}' for game in ATARI],
    'figure4': [f'dmc_{task}' for task in FIGURE4],
  }.get(name, dmc20 if name in SETS else [run_folders.paper_name(name)])
  if name.startswith('figure') and name in SETS:
    everything = figure_arms(name)
    arms = [arm for arm in everything if arm.method in (methods or METHODS)]
    if not arms:
      raise UserError(
        f'--methods {",".join(methods)}: {name} has none of them, but '
        + ', '.join(dict.fromkeys(arm.method for arm in everything))
      )
  return [(task, arm) for task in tasks for arm in arms]


def figure_arms(name):
  """The lines of a figure of the paper; see docs/experiments.md."""
  if name == 'figure8':
    names = 'dreamer', 'dreamer-contrastive', 'dreamer-reward'
    return [plain(name) for name in names]
  if name == 'figure12':
    return [
      Arm(f'dreamer-repeat{r}', 'dreamer', ('--action_repeat', str(r)))
      for r in REPEATS
    ]
  arms = []
  for method in ('dreamer', 'dreamer-actor', 'planet'):
    flag = '--plan_horizon' if method == 'planet' else '--horizon'
    for h in HORIZONS:
      flags = (*METHODS[method], flag, str(h))
      arms.append(Arm(f'{method}-horizon{h}', method, flags))
  return arms


def choose(tasks, methods=None):
  """(task, Arm) pairs of --tasks and --methods, each once.

  Raises:
    UserError: there is no such set or task.
  """
  methods = methods and methods.split(',')
  pairs = {}
  for name in tasks.split(','):
    if name not in SETS:
      check_task(name)
    pairs.update(dict.fromkeys(expand(name, methods)))
  return list(pairs)


def check_task(name):
  try:
    suites.check_task(name)
    suites.check_function(name, None)
  except UserError as error:
    hint = nearest(name, SETS)
    message = f'there is no set or task {name!r}{hint}' if hint else error
    raise UserError(f'--tasks: {message}') from None


def check_flags(pairs, extra):
  """What dreamer.py makes of each pair's flags: {pair: its whole config}.

  Raises:
    UserError: dreamer.py refuses some, or they are not to be given here.
  """
  names = [word.split('=')[0] for word in extra if word.startswith('-')]
  for name in names:
    if name in OWN:
      raise UserError(f'{name} after -- is set by sweep.py itself')
    for _, arm in pairs:
      if name in arm.flags:
        raise UserError(f'{name} after -- is set by {arm.name} itself')
  found = {}
  for task, arm in pairs:
    words = ['--logdir', 'unused', '--task', task, *arm.flags, *extra]
    try:
      config = commandline.parse_flags(words, resumes=False)
    except UserError as error:
      raise UserError(f'dreamer.py: {error}') from None
    method = configs.method_name(configs.AttrDict(config, **SETTING))
    if method != arm.method:
      choice = f'; choose it by --methods {method}' if method in METHODS else ''
      raise UserError(f'the flags after -- make {method} of {arm.name}{choice}')
    name = configs.method_name(config) + arm.name[len(method) :]
    found[task, dataclasses.replace(arm, name=name)] = config
  return found


def make_runs(wanted, args):
  """All runs, first those of seed 0; those that are finished are `done`."""
  # Unlike `resolve` it raises nothing where links lead in a circle.
  folder, runs = pathlib.Path(os.path.realpath(args.logdir)), []
  for seed in range(args.seeds):
    for (task, arm), config in wanted.items():
      logdir = folder / task / arm.name / str(seed)
      flags = ['--logdir', str(logdir), '--task', task]
      flags += ['--seed', str(seed), *arm.flags, *args.extra]
      with contextlib.suppress(UserError):  # which the run will say itself
        config = commandline.parse_flags(flags)  # of a run that goes on
      run = SweepRun(task, arm, seed, logdir, config, flags)
      warn_of_changes(run)
      step = file_io.read_json(logdir / ray_runs.FINISHED).get('step')
      done = isinstance(step, int) and step >= run.last_step
      if done and (logdir / 'config.json').exists():
        run.state, run.note = 'done', 'was finished'
        run.progress['step'] = step
      runs.append(run)
  return runs


def warn_of_changes(run):
  """Says which flags a run was started with that are others now."""
  before = file_io.read_json(run.logdir / 'config.json').get('config')
  before = before if isinstance(before, dict) else {}
  for name, value in run.config.items():
    if name in run_folders.MAY_DIFFER or name not in before or value == 'auto':
      continue
    if before[name] != value:
      was = f'{run.logdir} has --{name} {before[name]}'
      run_folders.warn(f'{was}, not {value}')


def read_progress(path):
  """The newest number of each key in the last 64 KiB of a metrics.jsonl."""
  newest = {}
  try:
    with path.open('rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
      data = file.read()
  except OSError:
    return newest
  for record in file_io.records(data):  # the first line may be cut off
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
    newest.update(numbers)
  return newest


# --- Showing ----------------------------------------------------------------


class Board:
  """A table on a terminal; elsewhere lines of what changed, and of all runs
  under way from time to time."""

  TITLES = ('task', 'method', 'seed', 'steps', 'fps', 'return', 'state', 'note')

  def __init__(self, runs):
    self._runs = runs
    self._said = {}
    self._seen = {}  # states
    self._live = None
    dumb = os.environ.get('TERM') in ('dumb', 'unknown')
    if sys.stdout.isatty() and not dumb:
      from rich import live

      self._live = live.Live(auto_refresh=False)

  def __enter__(self):
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *error):
    if self._live:
      self._live.stop()

  def show(self):
    for run in self._runs:
      changed = self._seen.get(run) != run.state
      if run.state != 'waiting' and (changed or run.state == 'running'):
        run.progress.update(read_progress(run.logdir / 'metrics.jsonl'))
      self._seen[run] = run.state
    if self._live:
      height = max(3, self._live.console.height - 6)
      self._live.update(self._table(height), refresh=True)
    else:
      self._lines()

  def _table(self, height):
    """The runs under way first where there is not room for all."""
    from rich import table, text

    runs = sorted(
      self._runs, key=lambda run: (run.task, run.arm.name, run.seed)
    )
    if len(runs) > height:
      order = ('running', 'failed', 'refused', 'stopped', 'waiting', 'done')
      runs = sorted(runs, key=lambda run: order.index(run.state))[:height]
    result = table.Table(caption=summary(self._runs))
    for title in self.TITLES:
      number = title in ('seed', 'steps', 'fps', 'return')
      result.add_column(title, justify='right' if number else 'left')
    for run in runs:
      result.add_row(*map(text.Text, self._row(run)))  # [..] are no markup
    return result

  def _row(self, run):
    step, fps = run.progress.get('step'), run.progress.get('fps')
    last = run.progress.get('test/return')
    row = [run.task, run.arm.name, str(run.seed)]
    row.append('-' if step is None else f'{step:.0f}/{run.last_step}')
    row.append('-' if fps is None else f'{fps:.3g}')
    row.append('-' if last is None else f'{last:.1f}')
    state = run.state
    if state == 'waiting' and run.tries:
      state = f'retry {run.tries}'
    return [*row, state, run.note.removeprefix(f'{state}: ')]

  def _lines(self):
    now = time.monotonic()
    for run in self._runs:
      state, when = self._said.get(run, ((), now))
      changed = state != (run.state, run.note)
      if changed or (run.state == 'running' and now > when + LINES):
        self._said[run] = (run.state, run.note), now
        task, method, seed, step, fps, last, state, note = self._row(run)
        line = f'{task} {method} {seed}: {state}'
        if step != '-':
          line += f', {step} steps, {fps} fps, return {last}'
        ray_runs.say(f'{line} ({note})' if note else line)


def summary(runs):
  counts = collections.Counter(run.state for run in runs)
  counts = ', '.join(f'{n} {state}' for state, n in counts.items())
  return f'{len(runs)} runs: {counts}'


# --- The command ------------------------------------------------------------


def parse_flags(argv):
  """The flags of sweep.py, with those after -- as `extra`."""
  own, extra = arguments.split(argv)
  parser = arguments.Parser(
    __doc__,
    'flags of dreamer.py come last, after --',
    usage='%(prog)s --tasks TASKS --logdir LOGDIR [...] [-- FLAGS]',
  )
  flag, text = parser.flag, arguments.Text()
  names = arguments.Names()
  flag('--tasks', names, help='sets and names, by commas', required=True)
  methods = f"of {', '.join(METHODS)}; by commas (dreamer, or the figure's)"
  flag('--methods', arguments.Names(arguments.Choice(*METHODS)), help=methods)
  flag('--seeds', arguments.Whole(1, 10_000), 5, 'how many: 0, 1, ... (5)')
  flag('--logdir', arguments.Path(), help='on shared storage', required=True)
  address = 'of a Ray cluster: auto, or host:port (a local one)'
  flag('--address', text, help=address)
  gpus = 'which it sees alone; 0.5: two runs share one (1 where there are GPUs)'
  flag('--gpus-per-run', arguments.Number(0, 1000), help=gpus)
  cpus = f'and its threads ({ray_runs.CPUS})'
  flag('--cpus-per-run', arguments.Number(0, 1000, above=True), help=cpus)
  flag('--retries', arguments.Whole(), 3, 'of a run that fails (3)')
  args = parser.parse(own)
  args.extra = extra
  return args


def run(argv):
  """Returns the exit code."""
  args = parse_flags(argv)
  pairs = choose(args.tasks, args.methods)
  ray = ray_runs.import_ray()
  runs = make_runs(check_flags(pairs, args.extra), args)
  if all(run.state == 'done' for run in runs):
    return report(runs, False)
  file_io.make_folders(args.logdir)
  ray_runs.connect(ray, args.address)
  try:
    cpus, gpus = ray_runs.share(ray, args)
    ray_runs.say(f'{summary(runs)}. Each has {cpus:g} CPUs, {gpus:g} GPUs.')
    sweep = ray_runs.Sweep(ray, runs, args.retries, cpus, gpus)
    sweep.install()
    with Board(runs) as board:
      stopped = sweep.run(board)
  finally:
    ray.shutdown()
  return report(runs, stopped)


def report(runs, stopped):
  """Says how it ended; returns the exit code."""
  ray_runs.say(f'{summary(runs)}.')
  failed = [run for run in runs if run.state in ('failed', 'refused')]
  for r in failed:
    ray_runs.say(f'{r.name} {r.state}: {r.note} (see {r.logdir}.out)')
  if stopped and any(run.state == 'stopped' for run in runs):
    ray_runs.say('Stopped. The same command goes on.')
    return 130
  return 1 if failed else 0


def main(argv=None):
  """Returns the exit code; see the top of this file."""
  return cli.main('sweep.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
