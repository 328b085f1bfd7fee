"""Acting, and the updates that are due, made in a second thread."""

import concurrent.futures
import contextlib
import threading
import time

import numpy as np
import tensorflow as tf

import cli
import file_io
import logger
import replay
import tools

# float16's smallest normal number: gradients that are not finite at a smaller
# loss scale are not so because of it.
LEAST_LOSS_SCALE = 2.0**-14


class NonFiniteError(cli.Failure):
  """A loss or gradient became NaN or infinite; nothing was saved since."""


class Stopwatch:
  """Seconds of a kind of work, without its first call (which traces)."""

  def __init__(self):
    self.count = 0
    self.seconds = 0.0

  @contextlib.contextmanager
  def __call__(self):
    start = time.perf_counter()
    yield
    self.count += 1
    if self.count > 1:
      self.seconds += time.perf_counter() - start

  @property
  def mean(self):
    return self.seconds / max(1, self.count - 1)


class Profile:
  """Records updates for TensorBoard's profiler, from the third on.

  Args:
    logdir: folder that gets `plugins/profile`.
    count: updates to record; 0 records none.
  """

  def __init__(self, logdir, count):
    self._logdir, self._count = logdir, count
    self._updates = 0
    self._running = False

  @contextlib.contextmanager
  def __call__(self):
    begin, end = 2, 2 + self._count
    if self._count and self._updates == begin:
      tf.profiler.experimental.start(str(self._logdir))
      self._running = True
    self._updates += 1
    with tf.profiler.experimental.Trace('update', step_num=self._updates):
      yield
    if self._updates == end:
      self.stop()

  def stop(self):
    """Writes what was recorded."""
    if self._running:
      self._running = False
      tf.profiler.experimental.stop()


class Learner:
  """Acts in training, and makes the updates that are due beside it.

  Acting goes on while updates are made, until more are due (section 3:
  "interleaved or in parallel"), so that their number for each step is the
  same. The first ones are waited for, and with `--deterministic True` all.

  Args:
    agent: `dreamer.Dreamer`.
    run: a `run_kinds.Run`.

  Attributes:
    after_update: called between updates.
  """

  def __init__(self, agent, run):
    self._agent = self._actor = agent
    self._run = run
    self._c, self._team = run.config, run.team
    self._pending = tf.Variable(0, dtype=tf.int64, trainable=False)
    self._should_train = tools.Every(self._c.train_every)
    self._should_pretrain = tools.Once()
    self._should_log = tools.Every(self._c.log_every)
    self._sums = {}  # {name of a metric: (sum, updates)}
    self._timer = Stopwatch()
    self._profile = Profile(self._c.logdir, self._c.profile)
    self._last_log = None
    self._batches = None
    self._latest = None  # batch drawn, on the host
    self._next_picture = 0  # step
    self._lock = threading.RLock()  # held while counters and metrics change
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'learner')
    self._learning = None  # future of the updates under way
    self._halted = False
    self.after_update = lambda: None

  @property
  def step(self):
    """Environment steps so far."""
    return int(self._agent.step)

  @step.setter
  def step(self, value):
    self._agent.step.assign(value)

  @property
  def updates(self):
    """Updates so far."""
    return int(self._agent.updates.numpy())

  @property
  def seconds_per_update(self):
    """Mean seconds of an update, None before the third."""
    return self._timer.mean if self._timer.count >= 3 else None

  def trackable(self):
    """What a checkpoint holds, by name: the agent, and what is due."""
    return dict(
      pending=self._pending,
      should_train=self._should_train,
      should_pretrain=self._should_pretrain,
      should_log=self._should_log,
      **self._agent.trackable(),
    )

  def repeat_entries(self):
    """Log entries are due again where steps are made again, after a resume."""
    self._should_log.repeat_from(self.step)

  def begin(self):
    """Called before the first episode is collected."""

  # Acting

  def __call__(self, obs, reset, state=None):
    """Learns if that is due, then acts; see `Dreamer.__call__`."""
    self._learn_if_due()
    action, state = self._actor(obs, reset, state)
    envs = len(reset) * self._team.workers  # all processes have as many
    self._agent.step.assign_add(envs * self._c.action_repeat)
    return action, state

  def evaluate(self, obs, reset, state=None):
    """Acts without exploring, counting or learning."""
    self._check_stop()
    return self._actor(obs, reset, state, training=False)

  def _check_stop(self):
    """Raises if the run is to end; several processes do so in updates only."""
    if self._team.workers == 1:
      self._run.stop.check()

  # Learning

  def _learn_if_due(self):
    """Begins the updates that are due by the number of steps."""
    self._check_stop()
    step = self.step
    if self._team.workers > 1:  # each surely acts at this step, or a later one
      envs = self._c.envs * self._team.workers
      step = min(step, self._c.steps - envs * self._c.action_repeat)
    due = self.count_due(step)
    if due or not self._learning or self._learning.done():
      self.catch_up()
      count = int(self._pending)
      if self._c.deterministic or not self._timer.count:
        self._make_updates(count)
      elif count:
        self._learning = self._thread.submit(self._make_updates, count)
    self._log_if_due()

  def count_due(self, step):
    """Adds updates that have become due by a step; returns their number."""
    due = 0
    with self._lock:  # a checkpoint holds both the schedule and what is due
      while self._should_train(step):
        first = self._should_pretrain()
        due += self._c.pretrain if first else self._c.train_steps
      self._pending.assign_add(due)
    return due

  def learn(self, count):
    """Makes updates without acting; steps follow (`OfflineRun`)."""
    for _ in range(count):
      self._pending.assign_add(1)
      self._make_updates(1)
      self.step = self._run.steps()
      self._log_if_due()

  def _make_updates(self, count):
    for _ in range(count):
      if self._team.any(self._run.stop.requested):
        raise cli.Stopped
      if self._halted:
        return
      self._update()
      with self._lock:
        self._pending.assign_sub(1)
        self.after_update()

  def catch_up(self):
    """Waits for the updates under way; raises what they raised."""
    learning, self._learning = self._learning, None
    if learning:
      learning.result()

  def halt(self):
    """Ends learning, after the update under way; raises what ended it."""
    self._halted = True
    self._thread.shutdown()
    self._profile.stop()
    with contextlib.suppress(cli.Stopped):  # as whoever halts knows
      self.catch_up()

  def _update(self):
    """Draws a batch and makes one update; checks that it is finite."""
    self._batches = self._batches or self._draw()
    first = self._timer.count == 0
    self._agent.set_learning_rates()
    source, batch = next(self._batches)
    with self._timer(), self._profile(), self._team.errors():
      with self._tracing(first):
        metrics = self._agent.update(batch)
      metrics = {k: float(v) for k, v in metrics.items()}
    self._agent.updates.assign_add(1)
    self._check_finite(metrics, source)
    with self._lock:
      for name, value in metrics.items():
        if np.isfinite(value):
          total, count = self._sums.get(name, (0.0, 0))
          self._sums[name] = total + value, count + 1
    self._run.logger.progress(self.step, self.updates)
    if first:
      self._run.say('First update done.')

  def _draw(self):
    """Yields (source, batch on its devices), from the next batch on."""
    batches = replay.load_dataset(
      self._run.datadir,
      self._c,
      self.updates,
      self._agent.actions,
      source=True,
      part=(self._team.index, self._team.workers),
      inputs=self._agent.world.inputs,
      folders=self._team.folders,
    )
    placed = self._place(batches)
    return placed if self._c.deterministic else replay.prefetch(placed)

  def _place(self, batches):
    for batch in batches:
      source, self._latest = batch.pop(replay.SOURCE), batch
      yield source, self._team.place(batch)

  def _tracing(self, first):
    """Lets a signal end the first update, which can take a minute."""
    alone = first and self._team.workers == 1
    return self._run.stop.immediate() if alone else contextlib.nullcontext()

  def _check_finite(self, metrics, source):
    """NonFiniteError, but for what the loss scale of float16 explains."""
    expected = {
      k.replace('_loss_scale', '_grad_norm')
      for k, scale in metrics.items()
      if k.endswith('_loss_scale') and scale > LEAST_LOSS_SCALE
    }
    for name, value in metrics.items():
      if not np.isfinite(value) and name not in expected:
        path = self._write_suspects(metrics, source)
        raise NonFiniteError(
          f'{name} became {value} in update {self.updates}; its batch is '
          f'listed in {path}. The last checkpoint is intact.'
        )

  def _write_suspects(self, metrics, source):
    """Writes which windows were in a batch, beside the replay."""
    part = '' if self._team.chief else f'-worker{self._team.index}'
    path = self._c.logdir / f'nonfinite-{self.updates}{part}.json'
    windows = np.asarray(source).tolist()
    metrics = {k: str(v) for k, v in metrics.items()}
    record = dict(update=self.updates, metrics=metrics, windows=windows)
    file_io.write_json(path, record)
    return path

  # Logging

  def unlogged(self):
    """{name: (sum, updates)} of metrics since the last entry."""
    with self._lock:
      return dict(self._sums)

  def restore_unlogged(self, sums):
    """Sets what `unlogged` returned before the run was interrupted."""
    with self._lock:
      self._sums = dict(sums)

  def finish(self):
    """Logs what came since the last log entry."""
    if self._sums:
      self._write_summaries(images=False)

  def _log_if_due(self):
    if self._should_log(self.step):
      self._write_summaries()

  def _write_summaries(self, images=True):
    now, step = time.monotonic(), self.step
    with self._lock:
      metrics = {k: total / n for k, (total, n) in self._sums.items()}
      self._sums = {}
    metrics = metrics if self._c.log_scalars else {}
    mark = dict(now=now, step=step, updates=self.updates)
    if self._last_log:
      metrics.update(self._rates(self._last_log, mark))
    self._last_log = mark
    self._run.logger.scalars(step, dict(metrics, updates=mark['updates']))
    images = images and self._c.log_images and self._team.chief
    if images and self._latest and step >= self._next_picture:
      self._next_picture = step + self._c.log_images_every
      self._write_prediction(step)
    self._run.logger.flush()

  def _rates(self, last, mark):
    """How fast the run is, between two entries."""
    return dict(fps=(mark['step'] - last['step']) / (mark['now'] - last['now']))

  def _write_prediction(self, step):
    """Logs predictions of six windows: a video, and curves of numbers.

    The windows are of the batch drawn last. The curves are for models that tell
    vectors, or no images.
    """
    world = self._agent.world
    batch = {k: v[:6] for k, v in self._latest.items()}
    if world.representation.decoders:
      video = world.open_loop(batch).numpy()
      self._run.logger.video(step, 'agent/openl', video)
      if not world.vector:
        return
    for name, picture in logger.curve_pictures(world, batch):
      self._run.logger.video(step, f'agent/openl_{name}', picture[None, None])
