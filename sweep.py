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
import datetime
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import cli
import compare
import wrappers
from cli import UserError, nearest

ROOT = pathlib.Path(__file__).resolve().parent
METHODS = {
  'dreamer': (),
  'dreamer-actor': ('--behavior', 'actor'),
  'dreamer-contrastive': ('--representation', 'contrastive'),
  'dreamer-reward': ('--representation', 'reward'),
  'planet': ('--behavior', 'planning'),
}
SETS = ('dmc20', 'atari9', 'figure4', 'figure8', 'figure12')
ATARI = (
  *('fishing_derby', 'ice_hockey', 'kung_fu_master', 'assault', 'boxing'),
  *('hero', 'freeway', 'frostbite', 'montezuma_revenge', 'pong', 'tennis'),
)
FIGURE4 = ('acrobot_swingup', 'hopper_hop', 'walker_walk', 'walker_run')
HORIZONS = (10, 20, 30, 45)
REPEATS = (1, 2, 4)
OWN = ('--logdir', '--task', '--seed')  # flags that are set here
FINISHED = 'sweep.json'  # in a logdir: the step at which its run finished
CPUS = 2  # of a run: the trainer's, and its environments'
GRACE = 300  # seconds that runs have for saving when they are stopped
POLL = 1  # seconds
LINES = 300  # seconds between lines of a run where there is no terminal
ENDED = ('done', 'failed', 'refused', 'stopped')

# Starts dreamer.py so that it ends with the process that asked for it, however
# that ends: PR_SET_PDEATHSIG (1) lasts beyond exec. Ray blocks signals.
BOOT = """
import ctypes, os, signal, sys
if sys.platform == 'linux':
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
  sys.exit('the process that started this run is gone')
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

# What dreamer.py makes of flags; apart, as it imports TensorFlow.
CHECK = """
import json, sys, dreamer, configs
answers = []
for flags in json.load(sys.stdin):
  try:
    config = configs.parse_flags(flags)
    answers.append(dict(config, method=configs.method_name(config)))
  except dreamer.ERRORS as error:
    answers.append(dict(error=str(error)))
json.dump(answers, sys.stdout, default=str)
"""


# --- What to run ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
  """A method with flags, and the name of its folder."""

  name: str
  method: str
  flags: tuple


@dataclasses.dataclass(eq=False)
class Run:
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


def plain(method):
  return Arm(method, method, METHODS[method])


def expand(name, methods=None):
  """All (task, Arm) of the name of a set or a task.

  Args:
    name: one of `SETS`, or a task.
    methods: names of those to keep; None: all of a figure, else Dreamer.
  """
  dmc20 = list(compare.load_paper()['final'])
  arms = [plain(method) for method in methods or ['dreamer']]
  tasks = {
    'dmc20': dmc20,
    'atari9': [f'atari_{game}' for game in ATARI],
    'figure4': [f'dmc_{task}' for task in FIGURE4],
  }.get(name, dmc20 if name in SETS else [name])
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
  """The lines of a figure of the paper; see EXPERIMENTS.md."""
  if name == 'figure8':
    return list(
      map(plain, ('dreamer', 'dreamer-contrastive', 'dreamer-reward'))
    )
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
    UserError: there is no such set, task or method.
  """
  methods = methods and methods.split(',')
  for method in methods or []:
    if method not in METHODS:
      raise UserError(
        f'--methods: there is no {method!r}, only {", ".join(METHODS)}'
        + nearest(method, METHODS)
      )
  pairs = {}
  for name in tasks.split(','):
    if name not in SETS:
      check_task(name)
    pairs.update(dict.fromkeys(expand(name, methods)))
  return list(pairs)


def check_task(name):
  try:
    wrappers.check_task(name)
  except wrappers.TaskError as error:
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
    if name in ('-h', '--help'):
      raise UserError('python dreamer.py --help lists its flags')
    for _, arm in pairs:
      if name in arm.flags:
        raise UserError(f'{name} after -- is set by {arm.name} itself')
  asked = [
    [*('--logdir', 'unused', '--task', task), *arm.flags, *extra]
    for task, arm in pairs
  ]
  result = subprocess.run(
    [sys.executable, '-c', CHECK],
    input=json.dumps(asked),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
  )
  if result.returncode:
    last = (result.stderr.splitlines() or ['no message'])[-1]
    raise UserError(f'dreamer.py cannot be imported: {last}')
  configs = dict(zip(pairs, json.loads(result.stdout), strict=True))
  for (_, arm), config in configs.items():
    if 'error' in config:
      raise UserError(f'dreamer.py: {config["error"]}')
    if config['method'] != arm.method:
      raise UserError(
        f'the flags after -- make {config["method"]} of {arm.name}; choose '
        f'methods by --methods {config["method"]}'
      )
  return configs


def make_runs(configs, args):
  """All runs, first those of seed 0; those that are finished are `done`."""
  runs = []
  for seed in range(args.seeds):
    for (task, arm), config in configs.items():
      logdir = args.logdir.resolve() / task / arm.name / str(seed)
      flags = [*('--logdir', str(logdir), '--task', task)]
      flags += ['--seed', str(seed), *arm.flags, *args.extra]
      run = Run(task, arm, seed, logdir, config, flags)
      warn_of_changes(run)
      step = read_json(logdir / FINISHED).get('step', -1)
      if step >= config['steps'] and (logdir / 'config.json').exists():
        run.state, run.note = 'done', 'was finished'
        run.progress['step'] = step
      runs.append(run)
  return runs


def warn_of_changes(run):
  """Says which flags a run was started with that are others now."""
  before = read_json(run.logdir / 'config.json').get('config', {})
  for name, value in run.config.items():
    if name in compare.FREE or name not in before or value == 'auto':
      continue
    if before[name] != value:
      print(
        f'sweep.py: warning: {run.logdir} has --{name} {before[name]}, not '
        f'{value}',
        file=sys.stderr,
      )


def read_json(path):
  """A dictionary, empty without a readable file."""
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}


def read_progress(path):
  """The newest number of each key in the last 64 KiB of a metrics.jsonl."""
  newest = {}
  try:
    with path.open('rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
      lines = file.read().splitlines()
  except OSError:
    return newest
  for line in lines:
    with contextlib.suppress(ValueError, TypeError):  # cut off at an end
      newest.update(json.loads(line))
  return newest


# --- Running, on some node --------------------------------------------------


class Runner:
  """A Ray actor: keeps one run of dreamer.py, a process of its own."""

  def start(self, logdir, flags, cpus, gpus):
    """Returns when the process is there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('RAY_')}
    threads = str(max(1, int(cpus)))
    env.update(OMP_NUM_THREADS=threads, TF_NUM_INTRAOP_THREADS=threads)
    env.update(RAY_USAGE_STATS_ENABLED='0')
    if not gpus:
      env['CUDA_VISIBLE_DEVICES'] = ''
    self._logdir = logdir
    logdir.parent.mkdir(parents=True, exist_ok=True)
    self._out = logdir.with_name(f'{logdir.name}.out').open('a+b')
    self._begin = self._out.seek(0, os.SEEK_END)
    command = [sys.executable, str(ROOT / 'dreamer.py'), *flags]
    now = datetime.datetime.now().isoformat(' ', 'seconds')
    line = f'--- {now}, {socket.gethostname()}: {" ".join(command)}\n'
    self._out.write(line.encode())
    self._out.flush()
    self._process = subprocess.Popen(
      [command[0], '-c', BOOT, str(os.getpid()), *command[1:]],
      stdin=subprocess.DEVNULL,
      stdout=self._out,
      stderr=subprocess.STDOUT,
      cwd=ROOT,
      env=env,
      start_new_session=True,  # Ctrl-C is for sweep.py, which asks runs to stop
    )

  def poll(self):
    """None while it runs, then (exit code, finished at step, last words)."""
    code = self._process.poll()
    if code is None:
      return None
    end = self._out.seek(0, os.SEEK_END)
    self._out.seek(max(self._begin, end - 2**16))
    text = self._out.read().decode(errors='replace')
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if line.startswith('dreamer.py: error:')]
    words = (errors or lines or ['it said nothing'])[-1]
    steps = re.findall(r'^Finished at step (\d+)', text, re.MULTILINE)
    if code or not steps:
      return code, None, words
    record = json.dumps(dict(step=int(steps[-1])))
    (self._logdir / FINISHED).write_text(record + '\n')
    return code, int(steps[-1]), words

  def signal(self, number):
    """SIGTERM: to save and stop. SIGKILL: its workers, too."""
    with contextlib.suppress(ProcessLookupError):
      if number == signal.SIGKILL:
        os.killpg(self._process.pid, number)
      else:
        self._process.send_signal(number)


# --- Running all ------------------------------------------------------------


def import_ray():
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  os.environ.setdefault('RAY_worker_niceness', '0')  # runs inherit it
  os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
  try:
    import ray
    import rich  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"sweep.py needs Ray ({error}): pip install '.[sweep]'"
    ) from None
  return ray


def connect(ray, address):
  """Joins the cluster at an address, or starts one here."""
  quiet = dict(log_to_driver=False, logging_level='ERROR')
  if not address:
    quiet.update(address='local', include_dashboard=False)
    quiet.update(object_store_memory=2**27, _node_ip_address='127.0.0.1')
  else:
    quiet.update(address=address)
  try:
    host, _, port = (address or '').rpartition(':')
    if host and port.isdigit():  # Ray would try for minutes
      socket.create_connection((host, int(port)), timeout=10).close()
    ray.init(**quiet)
  except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
    error = getattr(error, 'strerror', None) or str(error).strip()
    first = error.partition('\n')[0]
    raise UserError(
      f'--address {address}: {first} (is it up? A cluster with tokens needs '
      'RAY_AUTH_MODE=token)'
      if address
      else f'Ray: {first}'
    ) from None


def resources(ray):
  """(CPUs, GPUs) of each node."""
  nodes = [node['Resources'] for node in ray.nodes() if node['Alive']]
  return [(node.get('CPU', 0), node.get('GPU', 0)) for node in nodes]


def places(ray, cpus, gpus):
  """How many runs there is room for at once."""
  count = 0
  for have_cpus, have_gpus in resources(ray):
    room = have_cpus // cpus
    count += int(min(room, have_gpus // gpus) if gpus else room)
  return count


def share(ray, args):
  """(CPUs, GPUs) of a run; UserError where no node has them."""
  have, gpus = resources(ray), args.gpus_per_run
  if gpus is None:
    gpus = int(any(g >= 1 for _, g in have))
  most = max((c for c, g in have if g >= gpus), default=0)
  cpus = args.cpus_per_run or min(CPUS, max(1, most))
  if not places(ray, cpus, gpus):
    each = '; '.join(f'{c:g} CPUs, {g:g} GPUs' for c, g in have)
    raise UserError(
      f'a run is to have {cpus:g} CPUs and {gpus:g} GPUs (--cpus-per-run, '
      f'--gpus-per-run), and no node has that: there are {len(have)}, with '
      f'{each}'
    )
  return cpus, gpus


class Sweep:
  """Hands runs to Ray and looks after them.

  Args:
    ray: the module, connected to a cluster.
    runs: in the order in which they are to start.
    retries: how often one is tried again.
    cpus: of a run.
    gpus: of a run.
  """

  def __init__(self, ray, runs, retries, cpus, gpus):
    self._ray, self._runs, self._retries = ray, runs, retries
    self._share = cpus, gpus
    self._make = ray.remote(num_cpus=cpus, num_gpus=gpus)(Runner).remote
    self._wanted = 0  # signals that came
    self._asked = 0  # signals that were passed on
    self._deadline = None

  def install(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._handle)

  def _handle(self, number, frame):
    self._wanted += 1

  def run(self, board):
    """Returns when all have ended; whether it was stopped before."""
    while True:
      self._obey()
      self._submit()
      self._listen()
      board.show()
      if all(run.state in ENDED for run in self._runs):
        return self._wanted > 0
      time.sleep(POLL)

  def _submit(self):
    """No more than there is room for: Ray does not keep their order."""
    room = places(self._ray, *self._share)
    room -= sum(run.actor is not None for run in self._runs)
    due = [run for run in self._runs if run.state == 'waiting']
    due = [run for run in due if not run.actor and run.after < time.time()]
    for run in due[: max(0, room)]:
      run.actor = self._make()
      run.answer = run.actor.start.remote(run.logdir, run.flags, *self._share)

  def _listen(self):
    """Takes the answers that are there."""
    waiting = {run.answer: run for run in self._runs if run.actor}
    if not waiting:
      return
    ready, _ = self._ray.wait(
      list(waiting), num_returns=len(waiting), timeout=0.1
    )
    for answer in ready:
      self._take(waiting[answer], answer)

  def _take(self, run, answer):
    errors = self._ray.exceptions
    try:
      result = self._ray.get(answer)
    except errors.ActorUnavailableError:
      result = None  # for now; when it is given up, the next error comes
    except errors.RayTaskError as error:
      self._again(run, str(error.cause))
      return
    except errors.RayError:
      self._again(run, 'its node or Ray worker was lost')
      return
    if result is None:
      run.state = 'running'
      run.answer = run.actor.poll.remote()
    else:
      self._end(run, *result)

  def _end(self, run, code, step, words):
    used = code == 2 and 'is in use' in words  # after a retry: as yet
    if code == 0 and step is not None:
      run.progress['step'] = step
      self._release(run, 'done')
    elif code == 2 and not (used and run.tries):
      self._release(run, 'refused', words.removeprefix('dreamer.py: error: '))
    elif code < 0:
      self._again(run, f'killed by {signal.Signals(-code).name}')
    elif code == 0:
      self._again(run, 'stopped by another than sweep.py')
    else:
      self._again(run, words)

  def _again(self, run, why):
    if self._wanted:
      self._release(run, 'stopped')
    elif run.tries >= self._retries:
      self._release(run, 'failed', why)
    else:
      run.tries += 1
      run.after = time.time() + min(60, 2**run.tries)
      self._release(run, 'waiting', f'retry {run.tries}: {why}')

  def _release(self, run, state, note=''):
    """Gives back what Ray reserved."""
    if run.actor:
      self._ray.kill(run.actor)
    run.actor = run.answer = None
    run.state, run.note = state, note

  def _obey(self):
    """Passes on a first signal as SIGTERM, later ones as SIGKILL."""
    if self._deadline and time.time() > self._deadline:
      self._wanted = max(self._wanted, 2)
    if self._asked >= self._wanted:
      return
    number = signal.SIGTERM if self._wanted == 1 else signal.SIGKILL
    self._asked = self._wanted
    self._deadline = self._deadline or time.time() + GRACE
    for run in self._runs:
      if run.state == 'running':
        run.actor.signal.remote(number)
      elif run.state not in ENDED:
        self._release(run, 'stopped')
    if number == signal.SIGTERM:
      say('Stopping: runs save and end. A second Ctrl-C kills them.')


# --- Showing ----------------------------------------------------------------


def say(line):
  print(line, flush=True)


class Board:
  """A table on a terminal; elsewhere lines of what changed, and of all runs
  under way from time to time."""

  TITLES = ('task', 'method', 'seed', 'steps', 'fps', 'return', 'state', 'note')

  def __init__(self, runs):
    self._runs = runs
    self._said = {}
    self._live = None
    if sys.stdout.isatty():
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
      if run.state != 'waiting':
        run.progress.update(read_progress(run.logdir / 'metrics.jsonl'))
    if self._live:
      height = max(3, self._live.console.height - 6)
      self._live.update(self._table(height), refresh=True)
    else:
      self._lines()

  def _table(self, height):
    """The runs under way first where there is not room for all."""
    from rich import table

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
      result.add_row(*self._row(run))
    return result

  def _row(self, run):
    step, fps = run.progress.get('step'), run.progress.get('fps')
    last = run.progress.get('test/return')
    row = [run.task, run.arm.name, str(run.seed)]
    row.append('-' if step is None else f'{step:.0f}/{run.config["steps"]}')
    row.append('-' if fps is None else f'{fps:.3g}')
    row.append('-' if last is None else f'{last:.1f}')
    state = run.state
    if state == 'waiting' and run.tries:
      state = f'retry {run.tries}'
    return [*row, state, run.note.removeprefix(f'{state}: ')]

  def _lines(self):
    now = time.time()
    for run in self._runs:
      state, when = self._said.get(run, ((), now))
      changed = state != (run.state, run.note)
      if changed or (run.state == 'running' and now > when + LINES):
        self._said[run] = (run.state, run.note), now
        task, method, seed, step, fps, last, state, note = self._row(run)
        line = f'{task} {method} {seed}: {state}'
        if step != '-':
          line += f', {step} steps, {fps} fps, return {last}'
        say(f'{line} ({note})' if note else line)


def summary(runs):
  counts = collections.Counter(run.state for run in runs)
  counts = ', '.join(f'{n} {state}' for state, n in counts.items())
  return f'{len(runs)} runs: {counts}'


# --- The command ------------------------------------------------------------


def parse_flags(argv):
  """The flags of sweep.py, with those after -- as `extra`."""
  split = argv.index('--') if '--' in argv else len(argv)
  parser = cli.Parser(
    __doc__,
    'flags of dreamer.py come last, after --',
    usage='%(prog)s --tasks TASKS --logdir LOGDIR [...] [-- FLAGS]',
  )
  flag, text = parser.flag, cli.Text()
  flag('--tasks', text, help='sets and names, by commas', required=True)
  methods = f'of {", ".join(METHODS)}; by commas (dreamer, or all)'
  flag('--methods', text, help=methods)
  flag('--seeds', cli.Whole(1, 10_000), 5, 'how many: 0, 1, ... (5)')
  flag('--logdir', cli.Path(), help='on shared storage', required=True)
  address = 'of a Ray cluster: auto, or host:port (a local one)'
  flag('--address', text, help=address)
  gpus = 'which it sees alone; 0.5: two runs share one (1 where there are GPUs)'
  flag('--gpus-per-run', cli.Number(0, 1000), help=gpus)
  cpus = f'and its threads ({CPUS})'
  flag('--cpus-per-run', cli.Number(0, 1000, above=True), help=cpus)
  flag('--retries', cli.Whole(), 3, 'of a run that fails (3)')
  args = parser.parse(argv[:split])
  args.extra = argv[split + 1 :]
  return args


def run(args):
  """Returns the exit code."""
  pairs = choose(args.tasks, args.methods)
  ray = import_ray()
  runs = make_runs(check_flags(pairs, args.extra), args)
  if all(run.state == 'done' for run in runs):
    return report(runs, False)
  try:
    args.logdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'cannot write to --logdir {args.logdir}: {error.strerror}'
    ) from None
  connect(ray, args.address)
  try:
    cpus, gpus = share(ray, args)
    say(f'{summary(runs)}. Each has {cpus:g} CPUs, {gpus:g} GPUs.')
    sweep = Sweep(ray, runs, args.retries, cpus, gpus)
    sweep.install()
    with Board(runs) as board:
      stopped = sweep.run(board)
  finally:
    ray.shutdown()
  return report(runs, stopped)


def report(runs, stopped):
  """Says how it ended; returns the exit code."""
  say(f'{summary(runs)}.')
  failed = [run for run in runs if run.state in ('failed', 'refused')]
  for r in failed:
    say(f'{r.name} {r.state}: {r.note} (see {r.logdir}.out)')
  if stopped and any(run.state == 'stopped' for run in runs):
    say('Stopped. The same command goes on.')
    return 130
  return 1 if failed else 0


def main(argv=None):
  """Returns the exit code; see the top of this file."""
  try:
    return run(parse_flags(sys.argv[1:] if argv is None else argv))
  except UserError as error:
    print(f'sweep.py: error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130


if __name__ == '__main__':
  sys.exit(main())
