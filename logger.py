"""What a run shows: metrics.jsonl, TensorBoard, progress, pictures."""

import contextlib
import errno
import io
import json
import os
import pathlib
import sys

import numpy as np
import PIL.Image
import tensorflow as tf
import tqdm

import cli
import file_io

# --- Pictures ---------------------------------------------------------------


def encode_gif(frames, fps):
  """Encodes uint8 frames [T, H, W, 3] as an animated GIF that loops.

  Each frame has a palette of its own, by an octree: much faster than Pillow's
  median cut, and no color is off by much, however few its pixels.
  """
  octree = PIL.Image.Quantize.FASTOCTREE
  first, *others = (
    PIL.Image.fromarray(frame).quantize(method=octree) for frame in frames
  )
  buffer = io.BytesIO()
  options = dict(append_images=others, loop=0, duration=round(1000 / fps))
  first.save(buffer, 'GIF', save_all=True, **options)
  return buffer.getvalue()


ROWS = 12  # entries of a vector that are drawn, at most


def plot_curves(name, truth, model, context):
  """Draws numbers, true and predicted, as an image uint8 [H, W, 3].

  A line marks where the `context` agent steps with observations end.

  Args:
    name: of what is drawn.
    truth, model: [B, T], or [B, T, D]: then each of the first D has a row.
    context: agent steps.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if truth.ndim == 2:
    truth, model = truth[..., None], model[..., None]
  count, rows = len(truth), min(truth.shape[-1], ROWS)
  figure = Figure(figsize=(2.4 * count, 2 * rows), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots(rows, count, sharey='row', squeeze=False)
  for row, column in np.ndindex(rows, count):
    axis = axes[row, column]
    axis.plot(truth[column, :, row], label='true')
    axis.plot(model[column, :, row], label='model')
    axis.axvline(context - 0.5, color='gray', linewidth=0.8)  # then imagined
    if not column:
      axis.set_ylabel(f'{name} {row}' if rows > 1 else name)
  axes[0, 0].legend(loc='best', fontsize='small')
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curve_pictures(world, batch):
  """Yields (name, picture) of all that `world.open_loop_curves` predicts."""
  for name, pair in world.open_loop_curves(batch).items():
    truth, model = (x.numpy() for x in pair)
    yield name, plot_curves(name, truth, model, world.context(truth.shape[1]))


def to_uint8(images):
  """Images as bytes, of floats about in [0, 1]."""
  return np.clip(255 * images + 0.5, 0, 255).astype(np.uint8)


def video_summary(name, video, step=None, fps=20):
  """Writes videos [B, T, H, W, C], uint8 or in [0, 1], as one GIF summary.

  The B videos stand side by side. TensorBoard shows GIFs under IMAGES.
  """
  if np.issubdtype(video.dtype, np.floating):
    video = to_uint8(video)
  count, length, height, width, channels = video.shape
  frames = video.transpose((1, 2, 0, 3, 4))
  frames = frames.reshape((length, height, count * width, channels))
  summary = tf.compat.v1.Summary()
  image = tf.compat.v1.Summary.Image(height=height, width=count * width)
  image.colorspace = channels
  image.encoded_image_string = encode_gif(frames, fps)
  metadata = tf.compat.v1.SummaryMetadata(
    summary_description=METRICS.get(name, '')
  )
  summary.value.add(tag=name, image=image, metadata=metadata)
  tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step)


# --- Metrics ----------------------------------------------------------------

# Names on TensorBoard's page, by group, and what it says about them. Lines of
# metrics.jsonl leave out the group, but for train and test.
METRICS = {
  'test/return': 'Sum of rewards of an evaluation episode, without noise',
  'test/length': 'Environment steps of an evaluation episode',
  'test/policy': 'An evaluation episode, one image for each agent step',
  'train/return': 'Sum of rewards of an episode with exploration noise',
  'train/length': 'Environment steps of an episode',
  'run/episodes': 'Episodes in the replay',
  'run/updates': 'Gradient steps of all optimizers, so far',
  'run/fps': 'Environment steps a second since the last entry',
  'run/ups': 'Updates a second since the last entry',
  'run/ratio': 'Updates for each environment step, of the whole run',
  'run/env_restarts': 'Environments replaced, so far: failed, died or hung',
  'run/weights': 'Updates of the weights that act, of another process',
  'run/weights_age': 'Seconds since these came',
  'run/missed': 'Share of ticks of an episode without a new action in time',
  'run/test_missed': 'The same of an evaluation',
  'run/resumed': 'The run was resumed here; later steps were lost',
  'world_model/model_loss': 'Nats for a state: Eq. 10 or 12, negated',
  'world_model/image_loss': 'Nats for an image; 11,291.9 where it is exact',
  'world_model/vector_loss': 'Nats for all vectors, at --vector_std',
  'world_model/state_loss': 'Nats: J_S of Eq. 12 and ln K, negated',
  'world_model/reward_loss': 'Nats for a reward, times --reward_scale',
  'world_model/pcont_loss': 'Nats for a discount, times --pcont_scale',
  'world_model/div': 'Nats: KL divergence of posterior and prior',
  'world_model/prior_ent': 'Nats: entropy of the transition model',
  'world_model/post_ent': 'Nats: entropy of the representation model',
  'agent/openl': 'Truth, model and difference, from 5 images of context',
  'agent/openl_vector': 'Vectors, true and from 5 steps of context',
  'agent/openl_reward': 'Rewards, true and from 5 images of context',
  'behavior/actor_loss': 'Imagined return, discounted and negated: Eq. 7',
  'behavior/action_ent': 'Nats: entropy of the action model, of one sample',
  'behavior/action_ent_each': 'The same for each number or choice of an action',
  'behavior/value_loss': 'Nats for a state: Eq. 8',
  'behavior/imag_reward': 'Mean reward of imagined states',
  'behavior/imag_return': 'Mean return of imagined states: Eq. 6, or 4',
  'behavior/imag_value': 'Mean value of imagined states',
  'behavior/imag_return_best': 'Largest imagined return of a controller',
  'behavior/generation': 'Generations scored in the environment so far',
  'behavior/generation_return': 'Mean return of controllers of a generation',
  'behavior/generation_return_best': 'Largest mean return of a controller',
  'behavior/evolve_std': 'Standard deviation of the weights of controllers',
}
for _prefix, _of in (('', 'an episode'), ('test_', 'an evaluation')):
  METRICS[f'behavior/{_prefix}saturated'] = (
    f'Share of numbers in the actions of {_of} beyond 0.99'
  )
  METRICS[f'behavior/{_prefix}changes'] = (
    f'Share of numbers in the actions of {_of} with another sign than in the '
    'action before, or of actions that are another choice'
  )
  METRICS[f'behavior/{_prefix}real_value'] = (
    f'Mean discounted return of the states of {_of}, beside imag_value'
  )
for _name in ('model', 'actor', 'value'):
  METRICS[f'optimizers/{_name}_grad_norm'] = 'Gradient norm before clipping'
  METRICS[f'optimizers/{_name}_loss_scale'] = 'Factor of the loss in float16'
  METRICS[f'optimizers/{_name}_skipped'] = 'Share of updates that overflowed'
_GROUPED = {
  name.split('/')[1]: name
  for name in METRICS
  if not name.startswith(('train/', 'test/', 'agent/'))
}


class OutputLost(OSError):
  """The standard output takes no more: its disk is full, its reader gone."""


class Logger:
  """Writes `metrics.jsonl` and TensorBoard events, and talks to the user.

  On a terminal there is one progress bar with lines above it; elsewhere there
  are plain lines, flushed. All of it goes to standard output.

  Args:
    logdir: folder of the run.
    total: environment steps of the whole run, for the progress bar.
    step: environment steps so far.
    worker: number of this process among several; only 0 writes files.

  Attributes:
    resumes: whether there were metrics before.
  """

  def __init__(self, logdir, total, step=0, worker=0):
    logdir = pathlib.Path(logdir)
    self._worker = worker
    self._metrics = pathlib.Path(os.path.realpath(logdir / 'metrics.jsonl'))
    self.resumes = self.size() > 0
    self._writer = tf.summary.create_noop_writer()
    if not worker:
      self._cut_half_line()
      self._writer = tf.summary.create_file_writer(
        str(logdir), max_queue=1000, flush_millis=20000
      )
    self._bar = tqdm.tqdm(
      total=total,
      initial=step,
      unit=' steps',
      file=sys.stdout,
      disable=not getattr(sys.stdout, 'isatty', lambda: False)(),
      dynamic_ncols=True,
      smoothing=0.05,
    )

  def _cut_half_line(self):
    """A run killed while writing leaves half a line; the next cuts it off.

    To a whole line it adds the end that an editor has left out.
    """
    if not self._metrics.exists():
      return
    content = self._metrics.read_bytes()
    last = content[content.rfind(b'\n') + 1 :]
    if not last:
      return
    whole = any(file_io.records(last))
    with file_io.atomic_write(self._metrics) as file:
      file.write(content + b'\n' if whole else content.removesuffix(last))

  def size(self):
    """Bytes of metrics.jsonl."""
    return self._metrics.stat().st_size if self._metrics.exists() else 0

  def rewind(self, size):
    """Cuts off what metrics.jsonl has beyond `size` bytes."""
    content = self._metrics.read_bytes()
    with file_io.atomic_write(self._metrics) as file:
      file.write(content[:size])

  def largest(self, name):
    """The largest value of a name in metrics.jsonl, 0 without any."""
    return max([0, *(value for _, value in self._read(name))])

  def steps_of(self, name):
    """Steps of the lines of metrics.jsonl that have a name."""
    return [int(step) for step, _ in self._read(name)]

  def _read(self, name):
    """Yields (step, value) of a name in metrics.jsonl, finite numbers."""
    if not self._metrics.exists():
      return
    for record in file_io.records(self._metrics.read_bytes()):
      with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        pair = float(record['step']), float(record[name])
        if np.isfinite(pair).all():
          yield pair

  def say(self, line):
    line = f'[worker {self._worker}] {line}' if self._worker else line
    try:
      self._bar.write(line, file=sys.stdout)
      sys.stdout.flush()
    except OSError as error:
      if error.errno != errno.EIO:
        raise OutputLost(
          error.errno, error.strerror, 'standard output'
        ) from None
      cli.leave_terminal()  # it was closed: SIGHUP is on its way

  def progress(self, step, updates):
    self._bar.n = min(step, self._bar.total)
    self._bar.set_postfix_str(f'{updates} updates', refresh=False)
    self._bar.refresh()

  def scalars(self, step, values):
    """Writes numbers under `step` (environment steps); names: `METRICS`."""
    if self._worker:
      return
    values = {k: float(v) for k, v in values.items()}
    with self._metrics.open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    with self._writer.as_default(step):
      for key, value in values.items():
        name = key if key in METRICS else _GROUPED.get(key, key)
        tf.summary.scalar(name, value, description=METRICS.get(name))

  def video(self, step, name, video):
    if self._worker:
      return
    with self._writer.as_default(step):
      video_summary(name, video, step)
    self.flush()

  def flush(self):
    self._writer.flush()

  def close(self):
    self._bar.close()
    self._writer.close()
