"""Runs of `--preset cpu` one after the other, and their curves for scores/runs.

    python scores/search.py --logdir /tmp/search --arms base,actor3e-5 --seeds 0
    python scores/search.py --logdir /tmp/search --arms table --tasks dmc20

Arms are `ARMS`: flags beside `--preset cpu`, all for equal modelled time. What
is finished is skipped and what was stopped resumes, so that the same command
goes on. A run that ends is copied to scores/runs/TASK/METHOD-ARM/SEED:
metrics.jsonl and a run.json with command, commit, versions and machine. Started
twice, with other arms, it makes two runs at a time; each uses one thread. How
the arms did that were run so far:

    python scores/search.py --table
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import arguments
import cli
import commandline
import configs
import file_io
import paper_scores
import run_folders
import spaces

ROOT = pathlib.Path(__file__).parents[1]
RUNS = ROOT / 'scores/runs'
LOGDIR = pathlib.Path('logdir/search')
TASKS = 'cartpole_balance', 'walker_walk', 'finger_spin'
BASE = dict(horizon=15)  # the preset's at first; `table` has today's
ARMS = {
  'base': {},
  'one-kl': dict(kl_balance=0, kl_scale=0.3),
  'entropy0.003': dict(actor_entropy=0.003),
  'entropy0.03': dict(actor_entropy=0.03),
  'starts128': dict(imag_starts=128),
  'updates100': dict(train_steps=100),
  'updates400': dict(train_steps=400),
  'actor3e-5': dict(actor_lr=3e-5),
  'horizon10': dict(horizon=10),
  'table': {},
}
# Seconds of 1,000 environment steps with their updates, by --costs and 1.1 s of
# acting. All arms have the time of 40,000 steps of the first, and are evaluated
# four times in it.
SECONDS = dict(starts128=27.1, updates100=9.9, updates400=38.0, horizon10=15.7)
USUAL, STEPS = 18.7, dict(table=100_000)
THREADS = dict(
  TF_NUM_INTRAOP_THREADS='1', TF_NUM_INTEROP_THREADS='2', OMP_NUM_THREADS='1'
)


def length(arm):
  """Environment steps of an arm's runs."""
  steps = 40_000 * USUAL / SECONDS.get(arm, USUAL)
  return STEPS.get(arm, 1000 * round(steps / 1000))


def command(logdir, task, arm, seed, inputs):
  flags = dict(task=task, seed=seed, preset='cpu', inputs=inputs)
  flags.update({} if arm in STEPS else BASE, **ARMS[arm])
  flags.update(steps=length(arm), eval_episodes=3)
  flags.update(eval_every=10_000 if arm in STEPS else length(arm) // 4)
  words = [f'--{k}={v}' for k, v in flags.items()]
  return ['dreamer.py', f'--logdir={logdir}', *words]


def train(logdir, words):
  """One run in a process of its own; whether it finished."""
  file_io.make_folders(logdir.parent)
  with logdir.with_suffix('.out').open('a') as out:
    code = subprocess.run(
      ['nice', sys.executable, *words],
      cwd=ROOT,
      stdout=out,
      stderr=subprocess.STDOUT,
      env={**os.environ, **THREADS},
    ).returncode
  return code == 0


def keep(logdir, folder, words):
  """Copies the curve of a finished run to a folder, with what made it."""
  record = json.loads((logdir / 'config.json').read_text())
  config = record['config']
  metrics = (logdir / 'metrics.jsonl').read_bytes()
  rows = [json.loads(line) for line in metrics.splitlines()]
  steps = max(row['step'] for row in rows)
  if steps < config['steps']:  # it was stopped: the next call goes on
    return
  folder.mkdir(parents=True, exist_ok=True)
  words = [word for word in words if not word.startswith('--logdir')]
  run = dict(
    task=config['task'],
    seed=config['seed'],
    command=f'python {" ".join(words)} --logdir ./logdir/run',
    code=record['code'],
    steps=steps,
    updates=int(max(row.get('updates', 0) for row in rows)),
    units='environment steps; return of one episode',
    machine=f'one thread of {record["machine"]}',
    versions=record['versions'],
  )
  with file_io.atomic_write(folder / 'metrics.jsonl') as file:
    file.write(metrics)
  file_io.write_json(folder / 'run.json', run)


def area(folder):
  """Mean return of a run's evaluations, as they are at equal distances.

  Returns:
    That mean, and the mean of the evaluations at the last step that has some.
  """
  path = folder / 'metrics.jsonl'
  steps, returns = run_folders.read_metrics(path, yaxis='test/return')
  return returns.mean(), returns[steps == steps[-1]].mean()


def areas(inputs):
  """Of all runs kept: {arm: {task: {seed: what `area` returns}}}."""
  method = f'dreamer-{inputs}-cpu' if inputs != 'image' else 'dreamer-cpu'
  found = {}
  for arm in ARMS:
    for path in sorted(RUNS.glob(f'*/{method}-{arm}/*/run.json')):
      tasks = found.setdefault(arm, {})
      seeds = tasks.setdefault(path.parts[-4], {})
      seeds[path.parts[-2]] = area(path.parent)
  return found


def beside_base(found, arm):
  """Logarithms of an arm's areas over the base's of equal task and seed.

  Returns:
    {group of tasks: array}, of the search tasks, of the others, and of all.
  """
  base, groups = found['base'], {}
  for task, seeds in found[arm].items():
    searched = task.removeprefix('dmc_') in TASKS
    group = 'search tasks' if searched else 'held out'
    for seed, of_arm in seeds.items():
      if seed in base.get(task, {}):
        log = np.log(of_arm[0] / base[task][seed][0])
        groups.setdefault(group, []).append(log)
  if len(groups) > 1:
    groups['all'] = sum(groups.values(), [])
  return {group: np.array(logs) for group, logs in groups.items()}


def print_table(inputs):
  """Areas by task and seed, and each arm's ratio to the base.

  The ratio is the geometric mean over pairs of runs, with its standard error, a
  factor, and a 90% bootstrap interval over pairs. By the plan an arm is dropped
  where even the ratio times that factor is below 1.
  """
  found = areas(inputs)
  if 'base' not in found:
    raise cli.UserError(f'--inputs {inputs}: {RUNS} holds no run of the base')
  print('| task, arm | seeds | mean of evaluations | mean | at last |')
  print('|---|---|---|---|---|')
  for task in found['base']:
    for arm, tasks in found.items():
      if task in tasks:
        means, last = zip(*tasks[task].values(), strict=True)
        cells = [', '.join(tasks[task]), *map(_numbers, (means, last))]
        cells.insert(2, _numbers([np.mean(means)]))
        print(f'| `{task}`, {arm} | {" | ".join(cells)} |')
  print('\n| arm, tasks | pairs | ratio | standard error | interval |')
  print('|---|---|---|---|---|')
  for arm in [arm for arm in found if arm != 'base']:
    for group, logs in beside_base(found, arm).items():
      if len(logs) > 1:
        print(f'| {arm}, {group} | {len(logs)} | {_ratio(logs)} |')


def _numbers(values):
  return ', '.join(f'{x:.0f}' for x in values)


def _ratio(logs):
  """Cells of a ratio, its standard error and its interval."""
  error = logs.std(ddof=1) / len(logs) ** 0.5
  drawn = np.random.default_rng(0).choice(logs, [10_000, len(logs)]).mean(1)
  low, high = np.exp(np.quantile(drawn, [0.05, 0.95]))
  ratio = np.exp(logs.mean())
  return f'{ratio:.2f} | {np.exp(error):.2f} | {low:.2f} to {high:.2f}'


def time_costs(task, inputs, repeats=15):
  """Prints seconds of an update and of 1,000 environment steps, by arm.

  Updates are made in turns; the environment's seconds are not among them.
  """
  import benchmark

  calls, counts = {}, {}
  for arm in ARMS:
    config = commandline.parse_flags(command('x', task, arm, 0, inputs)[1:])
    agent = benchmark.training_agent(config)
    size = config.batch_size, config.batch_length
    batch = {
      k: np.zeros([*size, *shape], spaces.dtype(k))
      for k, shape in agent.world.inputs.items()
    }
    batch.update(
      action=np.zeros([*size, agent.actions], np.float32),
      reward=np.zeros(size, np.float32),
      discount=np.ones(size, np.float32),
    )
    calls[arm] = lambda a=agent, b=batch: a.train(b)['model_loss'].numpy()
    counts[arm] = 1000 * config.train_steps / config.train_every
  times = {arm: [] for arm in ARMS}
  for _ in range(repeats):
    for arm, call in calls.items():
      times[arm].append(benchmark.median(call, 1)[0])
  for arm, seconds in times.items():
    middle = float(np.median(seconds))
    print(f'{arm:14} {middle:.4f} s {counts[arm] * middle:6.1f} s')


def run(argv):
  parser = arguments.Parser(__doc__)
  parser.flag('--logdir', arguments.Path(), LOGDIR, 'of the runs')
  parser.flag('--arms', arguments.Names(arguments.Choice(*ARMS)), 'base')
  tasks = ','.join(f'dmc_{x}' for x in TASKS)
  parser.flag('--tasks', arguments.Names(), tasks, f'or dmc20 ({tasks})')
  parser.flag('--seeds', arguments.Names(arguments.Whole()), '0')
  parser.flag('--inputs', arguments.Names(), 'state')
  bare = dict(nargs='?', const='True')
  parser.flag('--costs', arguments.Truth(), False, 'of an update', **bare)
  parser.flag('--table', arguments.Truth(), False, 'and no runs', **bare)
  args = parser.parse(argv)
  if args.table:
    print_table(args.inputs)
    return
  file_io.make_folders(args.logdir)
  tasks = args.tasks.split(',')
  if args.costs:
    time_costs(tasks[0], args.inputs)
    tasks = []
  if tasks == ['dmc20']:
    tasks = list(paper_scores.load()['final'])
  for seed in args.seeds.split(','):
    for arm in args.arms.split(','):
      for task in tasks:
        logdir = args.logdir / task / arm / seed
        words = command(logdir, task, arm, seed, args.inputs)
        config = commandline.parse_flags(words[1:])
        method = f'{configs.method_name(config)}-cpu-{arm}'
        folder = RUNS / task / method / seed
        if (folder / 'run.json').exists():
          continue
        print(*words, flush=True)
        if train(logdir, words):
          keep(logdir, folder, words)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('search.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
