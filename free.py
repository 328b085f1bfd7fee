"""Acting and learning at paces of their own (`--learner free`).

The form of DayDreamer (Wu et al., 2022), for robots, which do not wait:

    environments --episodes--> replay --batches--> updates, without end
         ^                                              |
         +--- actor, on a copy of the weights <---------+

With `--role both` the copy is made anew between any two updates. With `--role
act` and `learn`, two processes on one logdir, it is that of the newest
checkpoint. Each file of the logdir has one writer then (docs/usage.md), so that
the folder may be shared by two hosts.
"""

import concurrent.futures
import contextlib
import math
import sys
import threading
import time

import numpy as np
import tensorflow as tf

import checkpoints
import cli
import runfile
import spaces
import tools
from learner import Learner
from progress import Progress

# --- Acting ------------------------------------------------------------------


class ActingCopy:
  """Acts on a copy of an agent's weights.

  Args:
    agent: `dreamer.Dreamer` that acts; made like `source`.
    source: `dreamer.Dreamer` whose weights it takes.
  """

  def __init__(self, agent, source):
    self._agent = agent
    self._lock = threading.Lock()  # held while acting, and while weights change
    self._copy = _copier(source.knowledge(), agent.knowledge())

  def __call__(self, obs, reset, state=None, training=True):
    """See `Dreamer.__call__`."""
    with self._lock:
      return self._agent(obs, reset, state, training)

  def at(self, step):
    """Tells the environment step, which exploration follows from."""
    with self._lock:
      self._agent.step.assign(step)

  def take(self):
    """Takes the weights that the source has now."""
    with self._lock:
      self._copy()

  def prepare(self, envs, seed):
    """Compiles all that acting needs, so that no action waits for it.

    Args:
      envs: number of environments in training.
      seed: of the noise of acting.
    """
    self.take()
    for count, training in ((envs, True), (1, False)):
      obs, state = self._zeros(count), None
      for reset in (True, False):
        _, state = self(obs, np.full(count, reset), state, training)
    self._agent.reseed(seed)

  def _zeros(self, count):
    return {
      name: np.zeros([count, *shape], spaces.dtype(name))
      for name, shape in self._agent.world.inputs.items()
    }


def _copier(source, target):
  """A function that copies variables, all of them in one call.

  Args:
    source, target: {name: variable, or list of variables}.
  """
  pairs = list(
    zip(tf.nest.flatten(source), tf.nest.flatten(target), strict=True)
  )

  @tf.function(autograph=False)
  def copy():
    for value, variable in pairs:
      variable.assign(value)

  return copy


SWITCH = 5e-4  # seconds after which a thread lets another run


class BackgroundLoop:
  """Calls a function again and again in a thread, beside acting.

  Threads take turns more often meanwhile, so that no action waits for long.

  Args:
    function: without arguments.
  """

  def __init__(self, function):
    self._function = function
    self._ended = threading.Event()
    self._switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'beside')
    self._future = self._thread.submit(self._repeat)

  def _repeat(self):
    while not self._ended.is_set():
      self._function()

  def check(self):
    """Raises what the function raised."""
    if self._future.done():
      self._future.result()

  def end(self):
    """Waits for the call under way; raises what the function raised."""
    self._ended.set()
    self._thread.shutdown()
    sys.setswitchinterval(self._switch)
    with contextlib.suppress(cli.Stopped):  # the acting thread says so, too
      self._future.result()


# --- Learning ----------------------------------------------------------------


class FreeLearner(Learner):
  """Makes updates without end, at most `--max_ratio` for each step.

  Args:
    agent: `dreamer.Dreamer` that learns.
    run: a `run_kinds.Run`.
    copy: another one, made alike, that acts; None with --role learn.
  """

  PAUSE = 0.01  # seconds, where no update may be made
  _beside = None

  def __init__(self, agent, run, copy=None):
    super().__init__(agent, run)
    self._actor = copy and ActingCopy(copy, agent)

  def begin(self):
    """Makes what an action would wait for, then updates beside acting."""
    if self.step < self._c.steps:
      self.pretrain()
    self._actor.prepare(self._c.envs, self._c.seed + self.step)
    if self.step < self._c.steps:
      self._beside = BackgroundLoop(self.learn_on)

  def pretrain(self):
    """The first update, which compiles, and those of --pretrain."""
    self._should_pretrain()
    for _ in range(max(1, self._c.pretrain - self.updates)):
      self._make_update()

  def learn_on(self):
    """One update, or a pause where --max_ratio allows none."""
    self._run.stop.check()
    if self._allowed():
      self._make_update()
    else:
      with self._lock:
        self.after_update()
      if self._actor:
        self._actor.at(self.step)
      self._log_if_due()
      time.sleep(self.PAUSE)
    if not self._actor:
      self.step = self._run.steps()

  def _allowed(self):
    c = self._c
    limit = max(c.pretrain, c.max_ratio * self.step)
    return not c.max_ratio or self.updates < limit

  def _make_update(self):
    if self._halted:
      return
    self._should_train.skip(self.step)  # none is due, should --learner change
    self._pending.assign_add(1)
    self._make_updates(1)
    if self._actor:
      self._actor.take()
    self._log_if_due()

  def count_due(self, step):
    return 0  # none is due, all are free

  def _learn_if_due(self):
    self._check_stop()
    self.catch_up()

  def catch_up(self):
    """Raises what ended the updates; does not wait for them."""
    if self._beside:
      self._beside.check()

  def halt(self):
    beside, self._beside = self._beside, None
    super().halt()
    if beside:  # after all else: it raises what ended the updates
      beside.end()

  def _rates(self, last, mark):
    seconds = mark['now'] - last['now']
    return dict(
      super()._rates(last, mark),
      ups=(mark['updates'] - last['updates']) / seconds,
      ratio=mark['updates'] / max(1, mark['step']),
    )


class Follower:
  """Acts with what a learner in another process saves (`--role act`).

  In the place of a `Learner`, whose methods it has.

  Args:
    agent: `dreamer.Dreamer` that checkpoints are restored to, beside acting.
    run: a `run_kinds.Run`.
    copy: another one, made alike, that acts.

  Attributes:
    step: environment steps so far.
    after_update: never called.
  """

  LOOK = 1.0  # seconds between looks for a newer checkpoint
  seconds_per_update = None
  _beside = None

  def __init__(self, agent, run, copy):
    self._agent, self._run, self._c = agent, run, run.config
    self._actor = ActingCopy(copy, agent)
    folder = self._c.logdir / 'checkpoints'
    self._saved = checkpoints.Checkpoints(folder, **agent.knowledge())
    self._tried = self._number = -1  # of the newest seen, and of the one taken
    self._came = time.monotonic()
    self._should_log = tools.Every(self._c.log_every)
    self._last_log = None
    self.step = run.steps()

  @property
  def updates(self):
    """Of the weights that act."""
    return int(self._agent.updates.numpy())

  def trackable(self):
    return {}  # the learner saves it

  def begin(self):
    """Waits for the first weights, then follows them beside acting."""
    if self.step < self._c.steps:
      self._wait()
    else:
      self._load()
    self._actor.prepare(self._c.envs, self._c.seed + self.step)
    if self.step < self._c.steps:
      self._beside = BackgroundLoop(self._follow)

  def _wait(self):
    self._run.wait_until(
      self._ready,
      'Waiting for the first weights: the same command with --role learn '
      'makes them.',
    )
    self._run.say(f'Acting with the weights of {self.updates} updates.')

  def _ready(self):
    """Whether there are weights that --pretrain has ended for."""
    if self._saved.newest() < 0:
      return False
    runfile.check_actor(self._c)  # or a UserError, as the agents differ
    self._load()
    pretrain = runfile.load_config(self._c.logdir).pretrain
    return self.updates >= max(1, pretrain)

  def _load(self):
    """Restores the newest checkpoint; False unless there is another now."""
    newest = self._saved.newest()
    if newest in (self._tried, -1):
      return False
    self._tried = newest
    path = self._saved.restore()
    number = int(path.rpartition('-')[2]) if path else self._number
    another, self._number = number != self._number, number
    if another:
      self._came = time.monotonic()
    return another

  def _follow(self):
    try:
      if self._load():
        self._actor.take()
    except cli.UserError as error:  # no reason for a robot to stand still
      cli.warn(f'acting on with the weights of {self.updates} updates: {error}')
    if self._should_log(self.step):
      self._write_summaries()
    time.sleep(self.LOOK)

  def _write_summaries(self):
    now, metrics = time.monotonic(), {}
    if self._last_log:
      then, step = self._last_log
      metrics['fps'] = (self.step - step) / (now - then)
    self._last_log = now, self.step
    metrics.update(weights=self.updates, weights_age=now - self._came)
    self._run.logger.scalars(self.step, metrics)
    self._run.logger.flush()

  def __call__(self, obs, reset, state=None):
    """Acts; see `Dreamer.__call__`."""
    self._run.stop.check()
    self.catch_up()
    self._actor.at(self.step)
    action, state = self._actor(obs, reset, state)
    self.step += len(reset) * self._c.action_repeat
    self._run.logger.progress(self.step, self.updates)
    return action, state

  def evaluate(self, obs, reset, state=None):
    """Acts without exploring or counting."""
    self._run.stop.check()
    return self._actor(obs, reset, state, training=False)

  def catch_up(self):
    if self._beside:
      self._beside.check()

  def finish(self):
    """There are no updates to log."""

  def halt(self):
    beside, self._beside = self._beside, None
    if beside:
      beside.end()


# --- Progress ----------------------------------------------------------------


class FreeProgress(Progress):
  """Progress of a run whose updates go on beside all else."""

  def after_portion(self):
    self._learner.catch_up()
    self._save_soon()

  def _save_soon(self):
    self._saved = -math.inf  # so a checkpoint is due after the update under way


class LearnerProgress(FreeProgress):
  """Progress of --role learn, whose checkpoints are the actor's weights.

  So they come as often as saving takes a twentieth of the time at most.
  """

  SHARE = 0.05
  LEAST = 2.0  # seconds
  _cost = 0.0  # seconds of the last
  _kept = None  # updates that it holds

  def save(self):
    start = time.monotonic()
    super().save()
    self._cost, self._kept = time.monotonic() - start, self._learner.updates

  def save_if_due(self):
    c = self._c
    pause = max(self.LEAST, self._cost / self.SHARE)
    pause = min(pause, 60 * c.save_every)
    due = time.monotonic() > self._saved + pause
    if due and self._learner.updates != self._kept:
      self.save()


class ActorProgress(Progress):
  """Progress of --role act: evaluations. It has no checkpoints of its own.

  Its steps are those of whole episodes, as the learner counts them: both end
  at the same.
  """

  def after_portion(self):
    self._learner.catch_up()
    self._learner.step = self._run.steps()

  def save(self):
    pass  # metrics.jsonl has the evaluations

  def resume(self):
    run = self._run
    evaluated = run.logger.steps_of('test/return')
    here = evaluated.count(run.steps())
    if here < self._c.eval_episodes:  # the rest of these is due
      evaluated = [step for step in evaluated if step != run.steps()]
    self._evaluations = len(evaluated)
    if evaluated:
      self._should_eval.skip(max(evaluated))
    if run.logger.resumes:
      run.say(f'Resumed at step {self._learner.step}.')
      run.logger.scalars(self._learner.step, dict(resumed=1))


PROGRESS = dict(both=FreeProgress, act=ActorProgress, learn=LearnerProgress)
