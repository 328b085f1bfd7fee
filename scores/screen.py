"""Which values let the world model foretell rewards, for equal time.

    python scores/screen.py --episodes LOGDIR LOGDIR --arms base,kl1 --seeds 2

Each arm of `ARMS` is `--preset cpu` as it was before this search, with other
flags. Its world model learns from the images of each folder's episodes, but for
every fifth, which are held out. On these it sees 5 images and imagines the rest
from the actions alone. The error of the reward 1, 5 and 15 agent steps after
the images is given as a share of the variance of all held-out rewards: 0 is
exact, 1 the best constant.

All arms have the time of --updates updates of the first window of `COSTS`.
"""

import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import keras
import numpy as np
import tensorflow as tf

import arguments
import cli
import commandline
import dreamer
import episode_files
import file_io
import layers
import replay
import run_setup
import runfile
from world_model import CONTEXT

# Of `--preset cpu` before the search.
FIRST = dict(
  batch_length=16,
  kl_scale=0.03,
  free_nats=0,
  kl_balance=0,
  reward_scale=1,
  decode_images=0,
)
HALVES = dict(kl_scale=1, free_nats=1, kl_balance=0.83)
ARMS = {
  'base': {},  # 16 windows of 16, KL scale 0.03, no free nats
  'kl0.1': dict(kl_scale=0.1, free_nats=1),
  'kl0.3': dict(kl_scale=0.3, free_nats=1),
  'kl1': dict(kl_scale=1, free_nats=1),
  'halves0.1': dict(kl_scale=0.1, free_nats=1, kl_balance=0.83),
  'halves0.3': dict(kl_scale=0.3, free_nats=1, kl_balance=0.83),
  'halves1': HALVES,
  '8x32': dict(batch_size=8, batch_length=32),
  '16x32': dict(batch_length=32),
  'long': dict(HALVES, batch_length=32),
  'long-decode128': dict(HALVES, batch_length=32, decode_images=128),
  'long-decode64': dict(HALVES, batch_length=32, decode_images=64),
  'rate3e-4': dict(model_lr=3e-4),
  'rate2e-3': dict(model_lr=2e-3),
}
# Seconds of the world model's part of an update, in those of 16x16 (--costs),
# by sequences, their length, and how many images are decoded.
COSTS = {
  (16, 16, 0): 1.0,
  (8, 32, 0): 1.03,
  (16, 32, 0): 1.9,
  (16, 32, 128): 1.1,
  (16, 32, 64): 1.03,
}
AHEAD, STRIDE = (1, 5, 15), 10


def make_config(folder, flags, seed):
  """That of an arm with these flags."""
  task = runfile.load_config(folder).task
  words = [f'--logdir={folder}', f'--task={task}', '--preset=cpu']
  words += [f'--{k}={v}' for k, v in {**FIRST, **flags}.items()]
  return commandline.parse_flags([*words, f'--seed={seed}', '--precision=32'])


def split(folder, learned):
  """Copies all but every fifth episode; returns the paths of the others."""
  paths = sorted((folder / 'episodes').glob('*.npz'))
  if len(paths) < 5:
    raise cli.UserError(
      f'--episodes {folder} holds {len(paths)} episodes; each fifth is held out'
    )
  rows = CONTEXT + max(AHEAD)
  if min(map(episode_files.episode_length, paths[4::5])) < rows:
    raise cli.UserError(
      f'--episodes {folder} has held-out episodes of fewer than {rows} rows'
    )
  for path in set(paths) - set(paths[4::5]):
    shutil.copy(path, learned)
  return paths[4::5]


def make_agent(folder, config):
  """A fresh agent for the actions of a run that has stored images."""
  _, actions = runfile.load_spaces(folder)
  shapes, _ = replay.describe(folder / 'episodes')
  if 'image' not in shapes or actions is None:
    raise cli.UserError(
      f'--episodes {folder} must have images (--record image), and say in its '
      'config.json what actions are'
    )
  return dreamer.Dreamer(config, actions)


def make_update(agent):
  """One update of the world model alone, as a function of a batch."""
  world, opt = agent.world, agent.optimizers['model']

  @tf.function(autograph=False)
  def update(batch):
    data = world.preprocess(batch)
    seeds = agent.seeds(data['action'].shape[1], 0)
    with layers.Tapes(opt.variables) as tapes:
      losses, metrics, _ = world.losses(data, seeds)
    opt.apply(opt.gradient(tapes, losses['model']))
    agent.updates.assign_add(1)
    return metrics

  return update


def foretell(world, paths):
  """Squared errors of rewards, by `AHEAD`, over the variance of rewards."""
  length = CONTEXT + max(AHEAD)
  errors, rewards = [], []
  for path in paths:
    with np.load(path) as episode:
      rows = {k: episode[k] for k in ('image', 'action', 'reward')}
    starts = range(0, len(rows['reward']) - length + 1, STRIDE)
    data = {
      k: np.stack([v[start : start + length] for start in starts])
      for k, v in rows.items()
    }
    true, model = world.open_loop_curves(data)['reward']
    errors.append((true - model) ** 2)
    rewards.append(rows['reward'].astype(np.float64))
  error = np.concatenate(errors).mean(0)
  variance = np.concatenate(rewards).var()
  return {k: float(error[CONTEXT + k - 1] / variance) for k in AHEAD}


def learn(folder, flags, seed, updates):
  """Errors of a world model that made so many updates, and its last losses."""
  config = make_config(folder, flags, seed)
  keras.backend.clear_session()
  keras.utils.set_random_seed(seed)
  run_setup.setup_precision(config.precision)
  agent = make_agent(folder, config)
  update = make_update(agent)
  size = config.batch_size, config.batch_length, config.decode_images
  with tempfile.TemporaryDirectory() as learned:
    paths = split(folder, learned)
    batches = replay.load_dataset(pathlib.Path(learned), config)
    for _ in range(max(1, int(updates / COSTS[size]))):
      metrics = update(next(batches))
  errors = foretell(agent.world, paths)
  return dict(errors, div=float(metrics['div']), updates=int(agent.updates))


def time_costs(folder, repeats=15):
  """Prints the seconds of an update for each window, in turns."""
  import benchmark

  calls = {}
  names = 'batch_size', 'batch_length', 'decode_images'
  for size in COSTS:
    flags = dict(zip(names, size, strict=True))
    config = make_config(folder, flags, 0)
    agent = make_agent(folder, config)
    config.offline = str(folder)  # its episodes stay as they are
    batch = next(replay.load_dataset(folder / 'episodes', config))
    calls[size] = make_update(agent), batch
  times = {size: [] for size in calls}
  for _ in range(repeats):
    for size, (update, batch) in calls.items():
      call = lambda u=update, b=batch: u(b)['div'].numpy()  # noqa: E731
      times[size].append(benchmark.median(call, 1)[0])
  for size, seconds in times.items():
    print(*size, f'{np.median(seconds):.4f} s')


def read_done(path):
  """What a file of earlier calls holds; nothing without one."""
  try:
    done = json.loads(path.read_text()) if path else {}
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise cli.UserError(
      f'--json {path} cannot be gone on with: {error}'
    ) from None
  if not isinstance(done, dict):
    raise cli.UserError(f'--json {path} is not of an earlier call')
  return done


def run(argv):
  parser = arguments.Parser(__doc__)
  text = 'logdirs whose episodes are learned from'
  parser.flag(
    '--episodes', arguments.Path(), help=text, nargs='+', required=True
  )
  arms = arguments.Names(arguments.Choice(*ARMS))
  parser.flag('--arms', arms, ','.join(ARMS))
  parser.flag('--seeds', arguments.Whole(1), 2, 'how many (2)')
  parser.flag('--updates', arguments.Whole(1), 1000, 'of the first arm (1000)')
  parser.flag('--json', arguments.Path(), help='goes on with a file')
  bare = dict(nargs='?', const='True')
  parser.flag('--costs', arguments.Truth(), False, 'of an update', **bare)
  args = parser.parse(argv)
  if args.costs:
    time_costs(args.episodes[0])
    return
  names = [folder.name for folder in args.episodes]
  if len(set(names)) < len(names):
    raise cli.UserError('--episodes: folders need names that differ')
  file_io.make_outputs(args.json)
  done = read_done(args.json)
  for seed in range(args.seeds):
    for folder in args.episodes:
      for arm in args.arms.split(','):
        name = f'{folder.name} {arm} {seed}'
        if name in done:
          continue
        done[name] = learn(folder, ARMS[arm], seed, args.updates)
        numbers = [f'{v:.3f}' for v in done[name].values()]
        print(name, *numbers, flush=True)
        if args.json:
          file_io.write_json(args.json, done)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('screen.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
