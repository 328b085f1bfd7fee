"""Evaluates a run: returns, videos of what it does and of what it predicts.

    python evaluate.py --logdir ./logdir/walker --episodes 10 --outdir ./videos

Needs nothing but the logdir, of which it reads config.json and the newest
checkpoint and changes nothing: training may go on there meanwhile. The policy
acts without noise, by the mode of the action model (or its plan).

With --export it writes a SavedModel instead of an evaluation, which acts with
TensorFlow alone (docs/library.md).

With --outdir it writes behavior.gif and .mp4, the first episodes side by side,
and prediction.gif, .mp4 and .png (Figure 5): the truth, what the model imagines
from 5 images of context and the actions alone, and the difference. A model of
vectors gets curves in prediction_vector.png and prediction_reward.png, one that
predicts rewards alone in prediction.png. Their sequences are of the episodes of
this evaluation, which no model was trained on.
"""

import functools
import io
import sys

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import imageio.v3 as imageio
import numpy as np

import arguments
import cli
import configs
import dreamer
import environments
import file_io
import library
import logger
import media
import run_setup
import runfile
import saved_model
import spaces
import tools
from cli import UserError
from episode_files import episode_return
from world_model import CONTEXT

LENGTH = 50  # rows of a prediction, the context included
SEQUENCES = 6  # predictions, one of an episode
SHOWN = 4  # episodes in the video of the behavior
FPS = 20


class Recorder:
  """Takes finished episodes: their returns, and images for the videos.

  Args:
    total: number of episodes to come.
    repeat: environment steps of an agent step.
    seed: of where in an episode its prediction begins.
  """

  def __init__(self, total, repeat, seed):
    self.returns = []
    self.lengths = []  # environment steps
    self.videos = []  # uint8 [T, 64, N * 64, 3] each, of N images
    self.windows = []  # {key: [T, ...]} each
    self.told = []  # {name: number} each, of --log_info
    self._total, self._repeat = total, repeat
    self._rng = np.random.default_rng(seed)

  def __call__(self, episode):
    rows = len(episode['reward'])
    self.returns.append(episode_return(episode))
    self.lengths.append((rows - 1) * self._repeat)
    print(
      f'Episode {len(self.returns)} of {self._total}: return '
      f'{self.returns[-1]:.1f} in {self.lengths[-1]} steps.',
      flush=True,
    )
    if len(self.videos) < SHOWN:
      images = [episode[k] for k in sorted(episode) if spaces.is_image(k)]
      images = [x[: environments.VIDEO] for x in images]
      self.videos += [np.concatenate(images, 2)] if images else []
    if len(self.windows) < SEQUENCES:
      start = int(self._rng.integers(max(1, rows - LENGTH + 1)))
      self.windows.append(
        {k: v[start : start + LENGTH].copy() for k, v in episode.items()}
      )

  def numbers(self):
    """What episodes told, {name: a number of each that did}."""
    names = sorted({name for told in self.told for name in told})
    return {k: [told[k] for told in self.told if k in told] for k in names}

  def batch(self, inputs):
    """Sequences for `WorldModel.open_loop`, [B, T, ...], of equal length."""
    length = min(len(window['reward']) for window in self.windows)
    keys = (*inputs, *spaces.TRANSITION_KEYS)
    return {k: np.stack([w[k][:length] for w in self.windows]) for k in keys}


def evaluate(config, episodes, outdir=None, json=None):
  """Runs whole episodes.

  Args:
    config: from `runfile.load_config`; its seed is that of the evaluation.
    episodes: how many.
    outdir: folder for videos, or None.
    json: file for the figures, or None.
  """
  recorder = Recorder(episodes, config.action_repeat, config.seed)
  env = _make_env(config, recorder, bool(outdir))
  env = environments.watch(env, config, recorder.told.append, cli.warn)
  try:
    agent = library.load_dreamer(config, dreamer.Dreamer, env)
    print(
      f'{config.logdir}: {config.task}, {configs.method_name(config)}, '
      f'step {int(agent.step)}, {int(agent.updates.numpy())} updates.',
      flush=True,
    )
    policy = functools.partial(agent, training=False)
    env.number(0)  # so that a new worker goes on where a lost one was
    tools.simulate(policy, [env], episodes=episodes)
  finally:
    env.close()
  returns = recorder.returns
  print(
    f'Return of {episodes} episodes: mean {np.mean(returns):.1f}, standard '
    f'deviation {np.std(returns):.1f}.'
  )
  for name, values in recorder.numbers().items():
    print(f'{name}: mean {np.mean(values):.4g} of {len(values)} episodes.')
  if json:  # first, as a picture may be refused
    file_io.write_json(json, figures(config, agent, recorder))
  if outdir:
    write_videos(agent, recorder, outdir)


def figures(config, agent, recorder):
  """What --json writes."""
  returns = recorder.returns
  return dict(
    logdir=str(config.logdir),
    task=config.task,
    method=configs.method_name(config),
    step=int(agent.step),
    updates=int(agent.updates.numpy()),
    seed=config.seed,
    mean=float(np.mean(returns)),
    std=float(np.std(returns)),
    returns=returns,
    lengths=recorder.lengths,
    info=recorder.numbers(),
  )


def _make_env(config, recorder, films):
  """The environment, with an image for the video if it has one."""
  make = functools.partial(
    environments.make_env, prefix='test', callbacks=[recorder], lost=_report
  )
  if not films or spaces.names_image(config.inputs):
    return make(config)
  # OpenGL and TensorFlow do not go together in one process.
  shared = config.parallel in ('none', 'thread')
  parallel = 'process' if shared else config.parallel
  env = make(cli.AttrDict(config, record='image', parallel=parallel))
  env = environments.if_it_runs(env, lambda error: print(f'No video: {error}'))
  return env or make(config)


def _report(error):
  cli.warn(f'{error}; the episode begins anew')


# --- Videos -----------------------------------------------------------------


def write_videos(agent, recorder, outdir):
  """Writes all pictures of an evaluation to a folder."""
  outdir.mkdir(parents=True, exist_ok=True)
  if recorder.videos:
    write_video(outdir / 'behavior', side_by_side(recorder.videos))
  world = agent.world
  batch = recorder.batch(world.inputs)
  if world.representation.decoders:
    video = logger.to_uint8(world.open_loop(batch).numpy())
    write_video(outdir / 'prediction', side_by_side(list(video)))
    write_strips(outdir / 'prediction.png', video)
    if not world.vector:
      return
  for name, picture in logger.curve_pictures(world, batch):
    path = outdir / f'prediction{f"_{name}" if world.vector else ""}.png'
    _write(path, imageio.imwrite('<bytes>', picture, extension='.png'))


def _write(path, data):
  with file_io.atomic_write(path) as file:
    file.write(data)
  print(f'Wrote {path}.')


def side_by_side(videos):
  """Videos [T, H, W, 3] as one [longest T, H, sum of W, 3].

  Those that end sooner stay at their last image.
  """
  length = max(map(len, videos))
  index = np.arange(length)
  return np.concatenate([v[np.minimum(index, len(v) - 1)] for v in videos], 2)


def write_video(path, frames):
  """Writes uint8 [T, H, W, 3] as .gif, and as .mp4 where there is ffmpeg."""
  gif, mp4 = path.with_suffix('.gif'), path.with_suffix('.mp4')
  _write(gif, logger.encode_gif(frames, FPS))
  if not media.has_ffmpeg():
    print(f'No {mp4}: pip install imageio-ffmpeg, and an ffmpeg with H.264.')
    return
  try:
    _write(mp4, media.encode_mp4(frames, fps=FPS))
  except ValueError as error:
    print(f'No {mp4}: {error}.')


def write_strips(path, video):
  """Draws predictions as strips of every fifth image, as Figure 5 does.

  Args:
    path: of the picture.
    video: uint8 [B, T, 3 * 64, W, 3], truth, model and difference below each
      other.
  """
  from matplotlib.figure import Figure

  count, length, height, width, _ = video.shape
  times = np.arange(0, length, CONTEXT)
  figure = Figure(figsize=(len(times), 3.2 * count), layout='constrained')
  for sequence, panel in zip(
    video, figure.subplots(count, squeeze=False)[:, 0], strict=True
  ):
    panel.imshow(np.concatenate(list(sequence[times]), 1))
    panel.set_xticks((np.arange(len(times)) + 0.5) * width - 0.5, times)
    rows = (np.arange(3) + 0.5) * height / 3 - 0.5
    panel.set_yticks(rows, ['true', 'model', 'difference'], rotation=90)
    panel.tick_params(length=0)
    for label in panel.get_yticklabels():
      label.set_va('center')
  figure.supxlabel(f'agent steps; images before {CONTEXT} are context')
  data = io.BytesIO()
  figure.savefig(data, dpi=100)
  _write(path, data.getvalue())


# --- The command ------------------------------------------------------------


def parse_flags(argv):
  parser = arguments.Parser(__doc__)
  parser.flag('--logdir', arguments.Path(), help='of the run', required=True)
  parser.flag('--episodes', arguments.Whole(1), 10, 'whole episodes (10)')
  parser.flag(
    '--seed', arguments.Whole(0, 2**32 - 1), 0, 'of the environment (0)'
  )
  parser.flag('--outdir', arguments.Path(), help='folder for videos')
  parser.flag('--json', arguments.Path(), help='file for the figures')
  parser.flag('--export', arguments.Path(), help='folder for a SavedModel')
  return parser.parse(argv)


def run(argv):
  args = parse_flags(argv)
  if args.export and (args.outdir or args.json):
    raise UserError(
      '--export writes a SavedModel and evaluates nothing: leave out --outdir '
      'and --json'
    )
  config = runfile.load_config(args.logdir)  # or an error, before all else
  file_io.make_outputs(args.json, args.outdir, args.export)
  config.update(seed=args.seed, eval_noise=0.0)
  run_setup.setup_gpus(config)
  # An exported agent may run where there is no bfloat16.
  run_setup.setup_precision('32' if args.export else config.precision)
  with file_io.file_errors():
    if args.export:
      agent = library.load_dreamer(config, dreamer.Dreamer)
      saved_model.export(agent, args.export)
      print(f'Wrote {args.export}.')
      return
    evaluate(config, args.episodes, args.outdir, args.json)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('evaluate.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
