"""How fast this machine runs Dreamer: where the time of a run goes.

    python benchmark.py --preset release --what startup,train,policy
    python benchmark.py --preset cpu --json cpu.json
    python benchmark.py --preset cpu --what train -- --batch_size 32

Flags after -- are those of dreamer.py. Each part runs in a process of its own,
so that its peak memory is its own. Figures are medians over repeated runs after
a warm-up, with the least and the largest beside them. An update, of plain
Dreamer, is also given as a multiple of its arithmetic floor, the time that its
multiplications would take at the rate of a large matrix product here, so that
figures compare across machines.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import numpy as np
import tensorflow as tf

import agent_spec
import arguments
import cli
import commandline
import configs
import distribute
import dreamer
import environments
import episode_files
import file_io
import replay
import run_kinds
import run_setup
import runfile
import tools
import training
import update_parts
from learner import Learner
from logger import Logger

ROOT = pathlib.Path(__file__).parent
PARTS = ('startup', 'train', 'policy', 'replay', 'env', 'memory')
# fmt: off
FLAGS = (
  'task', 'preset', 'precision', 'jit', 'representation', 'behavior', 'inputs',
)
# Of dreamer.py, which runs that are timed here cannot have: one process that
# acts and learns on schedule, for as long as it takes.
NEVER = (
  'logdir', 'steps', 'prefill', 'offline', 'learner', 'role', 'strategy',
)
# fmt: on
EPISODES = 5  # of random actions, which all parts learn from


def median(function, repeats):
  """Seconds of a call: (median, least, largest), after one that warms up."""
  function()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return float(np.median(times)), min(times), max(times)


# --- Parts ------------------------------------------------------------------


def gemm(config, repeats):
  """GFLOP/s of a 2048 x 2048 matrix product, by dtype."""
  rates, spread = {}, {}
  for name in ('float32', 'bfloat16'):
    matrix = tf.cast(tf.random.normal([2048, 2048]), name)
    multiply = tf.function(lambda x: tf.matmul(x, x)[0, 0])
    times = median(lambda m=matrix, f=multiply: f(m).numpy(), max(9, repeats))
    rates[name], high, low = (2 * 2048**3 / t / 1e9 for t in times)
    spread[name] = [low, high]
  return dict(gemm_gflops=rates), dict(gemm_gflops=spread)


def startup(words, config, repeats):
  """Seconds from the start of `dreamer.py` to the end of its first update."""
  times = []
  for _ in range(max(1, repeats // 3)):
    with tempfile.TemporaryDirectory() as folder:
      logdir = pathlib.Path(folder)
      (logdir / 'episodes').symlink_to(config.logdir / 'episodes')
      times.append(_first_update(words, logdir))
  figure = dict(startup_s=float(np.median(times)))
  return figure, dict(startup_s=[min(times), max(times)])


def _first_update(words, logdir):
  command = [sys.executable, str(ROOT / 'dreamer.py'), *words, '--prefill=0']
  env = {k: v for k, v in os.environ.items() if k != 'TF_CONFIG'}
  start = time.perf_counter()
  process = subprocess.Popen(
    [*command, f'--logdir={logdir}'], stdout=subprocess.PIPE, text=True, env=env
  )
  try:
    for line in process.stdout:
      if line.startswith('First update'):
        return time.perf_counter() - start
    if process.wait() == 2:  # it has said why
      sys.exit(2)
  finally:
    process.kill()
    process.wait()
  raise SystemExit('dreamer.py ended before its first update')


def train(config, repeats):
  """Seconds of an update, and of its parts, each compiled on its own."""
  agent = training_agent(config)
  folder, inputs = config.logdir / 'episodes', agent.world.inputs
  batch = next(replay.load_dataset(folder, config, inputs=inputs))
  batch = distribute.Team().place(batch)  # as a run does beside an update
  times = median(lambda: agent.train(batch)['model_loss'].numpy(), repeats)
  split, spread = {}, {}
  for name, work in update_parts.pieces(agent, batch, config).items():
    middle, low, high = median(lambda f=work: update_parts.wait(f()), repeats)
    split[name], spread[name] = middle, [low, high]
  figures = dict(update_s=times[0], update_split_s=split)
  c = config
  others = c.imag_starts, c.decode_images, c.slow_value, c.pcont
  if configs.method_name(config) == 'dreamer' and not any(others):
    figures['update_gflop'] = update_parts.flops(agent, config) / 1e9
  return figures, dict(update_s=times[1:], update_split_s=spread)


def training_agent(config):
  """A fresh `dreamer.Dreamer` for the task of a config."""
  run_setup.setup_precision(config.precision)
  env = environments.make_env(config)
  spec = agent_spec.of_environment(config, env)
  env.close()
  return dreamer.Dreamer(config, spec.actions, inputs=spec.inputs)


def policy(config, repeats):
  """Milliseconds of one call, for 1 and 8 environments."""
  agent = training_agent(config)
  figures, spread = {}, {}
  for envs in (1, 8):
    shapes = agent.world.inputs
    obs = {k: np.zeros([envs, *s], np.uint8) for k, s in shapes.items()}
    reset = np.zeros(envs, bool)
    state = agent(obs, reset, training=False)[1]
    call = functools.partial(agent, obs, reset, state, training=False)
    middle, low, high = median(call, 20 * repeats)
    figures[str(envs)] = 1e3 * middle
    spread[str(envs)] = [1e3 * low, 1e3 * high]
  return dict(policy_ms=figures), dict(policy_ms=spread)


def windows(config, repeats):
  """Windows a second: warm, and from disk with the page cache dropped."""
  folder = config.logdir / 'episodes'
  names = episode_files.list_episodes(folder)
  longest = max(map(episode_files.episode_length, names))
  length, count = min(config.batch_length, longest), 500

  def read():
    drawn = replay.load_episodes(folder, config.batch_size, length)
    for _ in range(count):
      next(drawn)

  def drop():
    for path in folder.glob('*.npz'):
      with path.open('rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

  times = dict(warm=median(read, repeats))
  if hasattr(os, 'posix_fadvise'):
    cold = []
    for _ in range(repeats):
      drop()
      start = time.perf_counter()
      read()
      cold.append(time.perf_counter() - start)
    times['cold'] = float(np.median(cold)), min(cold), max(cold)
  rates = {k: count / v[0] for k, v in times.items()}
  spread = {k: [count / v[2], count / v[1]] for k, v in times.items()}
  return dict(replay_windows_per_s=rates), dict(replay_windows_per_s=spread)


def env(config, repeats):
  """Environment steps a second: of 1, 2 and 4 workers, and of a whole run."""
  rates, spread, repeats = {}, {}, max(2, repeats // 2)
  for count in (1, 2, 4):
    with _environments(config, count) as (envs, lengths):
      act = training.random_agent(envs[0].action_space, 0)
      steps = count * config.time_limit // config.action_repeat
      collect = functools.partial(tools.simulate, act, envs, steps=steps)
      rates[str(count)], *spread[str(count)] = _rates(collect, lengths, repeats)
  rate, *around = _run(config, repeats)
  figures = dict(env_steps_per_s=rates, run_env_steps_per_s=rate)
  return figures, dict(env_steps_per_s=spread, run_env_steps_per_s=around)


@contextlib.contextmanager
def _environments(config, count):
  """Yields environments in their workers, and the steps of their episodes."""
  lengths = []

  def add(episode):
    lengths.append((len(episode['reward']) - 1) * config.action_repeat)

  envs = [
    environments.make_env(config, index, callbacks=[add])
    for index in range(count)
  ]
  try:
    yield envs, lengths
  finally:
    for each in envs:
      each.close()


def _rates(collect, lengths, repeats):
  """Environment steps a second, once warm: (median, least, largest).

  Args:
    collect: function without arguments that makes episodes.
    lengths: their steps, a list that grows meanwhile.
    repeats: how often it is called.
  """
  rates = []
  for _ in range(1 + repeats):
    lengths.clear()
    start = time.perf_counter()
    collect()
    rates.append(sum(lengths) / (time.perf_counter() - start))
  del rates[0]
  return float(np.median(rates)), min(rates), max(rates)


def _run(config, repeats):
  """Environment steps a second of a run, updates and all, once warm.

  Updates come as often as in a run, but in smaller blocks and none ahead of
  acting, so that short episodes tell.
  """
  block = math.gcd(config.train_every, config.train_steps)
  config = cli.AttrDict(
    config,
    pretrain=0,
    train_every=config.train_every // block,
    train_steps=config.train_steps // block,
    time_limit=min(config.time_limit, 200),
  )
  agent = training_agent(config)
  team, stop = distribute.Team(), cli.StopSignal()
  logger = Logger(config.logdir, config.steps)
  learner = Learner(agent, run_kinds.Run(config, team, stop, logger))

  state = None

  def collect():  # episodes, and the updates due by then
    nonlocal state
    until = learner.step + config.train_every
    while learner.step < until:
      state = tools.simulate(learner, envs, episodes=config.envs, state=state)
      learner.catch_up()

  with _environments(config, config.envs) as (envs, lengths):
    try:
      while config.train_steps and not learner.updates:
        collect()  # until all is compiled
      return _rates(collect, lengths, repeats)
    finally:
      learner.halt()
      logger.close()


# --- Command ----------------------------------------------------------------


def work(part, words, config, repeats):
  """Runs one part in this process: what `main` gathers from all of them."""
  tf.get_logger().setLevel('ERROR')  # many functions are traced on purpose
  functions = dict(gemm=gemm, train=train, policy=policy)
  functions.update(replay=windows, env=env)
  functions['startup'] = functools.partial(startup, words)
  figures, spread = functions[part](config, repeats)
  # Of this process, or of the largest that it started.
  users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  peak = max(resource.getrusage(user).ru_maxrss for user in users)
  unit = 2**20 if sys.platform == 'darwin' else 2**10  # of a MiB
  return dict(figures=figures, spread=spread, peak=peak / unit)


def collect(config):
  """Episodes of random actions, for all parts to learn from."""

  def store(episode):
    episode_files.save_episodes(config.logdir / 'episodes', [episode])

  env = environments.make_env(config, callbacks=[store])
  try:
    act = training.random_agent(env.action_space, 0)
    tools.simulate(act, [env], episodes=EPISODES)
  finally:
    env.close()


def shares(report, config):
  """Where the time of a run goes, one thing after the other.

  Args:
    report: of the parts train, policy and env.
    config: of these.

  Returns:
    Seconds of 1,000 environment steps, by name: environment (simulation and
    rendering), acting, updates.
  """
  updates = 1000 * config.train_steps / config.train_every
  return dict(
    environment=1000 / report['env_steps_per_s']['1'],
    acting=report['policy_ms']['1'] / config.action_repeat,
    updates=updates * report['update_s'],
  )


def verdict(seconds):
  """The largest of the shares, and the others, as a line."""
  whole = sum(seconds.values())
  order = sorted(seconds, key=seconds.get, reverse=True)
  parts = [f'{name} {seconds[name] / whole:.0%}' for name in order]
  return f'Most of a run goes into: {", ".join(parts)}.'


def table(report):
  """The report as lines for a terminal: name, figure, least to largest."""
  spread = report['spread']
  lines = [f'{report["machine"]["cpu"]}, {report["machine"]["cores"]} cores']
  for key in sorted(set(report) - {'machine', 'versions', 'spread'}):
    values, ranges = report[key], spread.get(key, {})
    if not isinstance(values, dict):
      values, ranges = {'': values}, {'': ranges} if ranges else {}
    for name, value in values.items():
      low, high = ranges.get(name, (None, None))
      around = '' if low is None else f'{low:10.4g} to {high:.4g}'
      lines.append(f'{key:22}{name:18}{value:10.4g}{around}')
  if 'seconds_per_1000' in report:
    lines.append(verdict(report['seconds_per_1000']))
  return '\n'.join(lines)


def parse_flags(argv):
  """The flags; `words` and `extra` of them are for dreamer.py."""
  own, others = arguments.split(argv)
  parser = arguments.Parser(
    __doc__,
    'other flags of dreamer.py come last, after --',
    usage='%(prog)s [--what PARTS] [--preset PRESET] [...] [-- FLAGS]',
  )
  parts = arguments.Names(arguments.Choice(*PARTS))
  parser.flag('--what', parts, ','.join(PARTS), 'parts to time (all)')
  parser.flag('--json', arguments.Path(), help='file for the figures')
  for name in FLAGS:
    flag = configs.all_flags()[name]
    text = f'{flag.meaning} ({flag.default})'
    parser.flag(f'--{name}', flag.kind, flag.default, text)
  parser.flag('--repeats', arguments.Whole(1, 1000), 5, 'of what is timed (5)')
  hidden = dict(nargs=2, help=argparse.SUPPRESS)
  parser.flag('--work', arguments.Text(), **hidden)
  args, given = parser.parse(own), parser.parse_given(own)
  for name in (word.split('=')[0] for word in others):
    if name in [f'--{flag}' for flag in FLAGS]:
      raise cli.UserError(f'{name} comes before --')
    if name in [f'--{flag}' for flag in NEVER]:
      raise cli.UserError(f'{name} is of runs that benchmark.py does not time')
  # What is given goes before presets, and defaults do not.
  args.words = [f'--{k}={v}' for k, v in given.items() if k in FLAGS]
  args.what, args.extra = args.what.split(','), others
  return args


def run(argv):
  args = parse_flags(argv)
  words = [*args.words, *args.extra]
  file_io.make_outputs(args.json)
  with file_io.file_errors(), tempfile.TemporaryDirectory() as folder:
    logdir = args.work[1] if args.work else folder
    config = commandline.parse_flags([*words, f'--logdir={logdir}'])
    if args.work:
      print(json.dumps(work(args.work[0], words, config, args.repeats)))
      return
    collect(config)
    report = gather(args, logdir)
    if {'train', 'policy', 'env'} <= set(args.what):
      report['seconds_per_1000'] = shares(report, config)
  print(table(report))
  if args.json:
    with file_io.file_errors():
      file_io.write_json(args.json, report)


def gather(args, logdir):
  """Runs each part in a process of its own, and joins what they measured."""
  report = dict(
    machine=runfile.machine(), versions=runfile.versions(), spread={}
  )
  peaks = {}
  timed = [part for part in args.what if part != 'memory']
  for part in ('gemm', *(timed or ('train',))):
    command = [sys.executable, __file__, *args.words]
    command += [f'--repeats={args.repeats}', '--work', part, str(logdir)]
    command += ['--', *args.extra]
    code, output = _call(command)
    if code == 2:  # it has said why
      sys.exit(2)
    if code:
      raise SystemExit(f'benchmark.py: the part {part} failed')
    result = json.loads(output.splitlines()[-1])
    report.update(result['figures'])
    report['spread'].update(result['spread'])
    peaks[part] = result['peak']
  if 'update_gflop' in report:
    rate = report['gemm_gflops']['float32']
    report['update_floors'] = report['update_s'] * rate / report['update_gflop']
  if 'memory' in args.what:
    report['peak_mb'] = peaks
  return report


def _call(command):
  """Exit code and output of a program, which ends with this one."""
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  try:
    output, _ = process.communicate()
  except BaseException:  # such as Ctrl-C
    for number in (signal.SIGTERM, signal.SIGKILL):
      with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, number)  # and what it has started
        process.wait(10)
    raise
  return process.returncode, output


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('benchmark.py', run, argv)


if __name__ == '__main__':
  cli.end_by_sigterm()
  sys.exit(main())
