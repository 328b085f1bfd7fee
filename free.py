"""Acting and learning at paces of their own (`--learner free`).

The form of DayDreamer (Wu et al., 2022), for robots, which do not wait:

    environments --episodes--> replay --batches--> updates, without end
         ^                                              |
         +--- actor, on a copy of the weights <---------+

With `--role both` the copy is made anew between any two updates.
"""

import contextlib
import sys
import threading
import time

import numpy as np
import tensorflow as tf

import cli
import spaces
from learner import Learner


class Actor:
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
      name: np.zeros(
        [count, *shape], np.uint8 if spaces.is_image(name) else np.float32
      )
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


class FreeLearner(Learner):
  """Makes updates without end, at most `--max_ratio` for each step.

  Args:
    agent: `dreamer.Dreamer` that learns.
    run: `Run`.
    copy: another one, made alike, that acts.
  """

  PAUSE = 0.01  # seconds, where no update may be made
  SWITCH = 5e-4  # seconds after which a thread lets another run

  def __init__(self, agent, run, copy):
    super().__init__(agent, run)
    self._actor = Actor(copy, agent)

  def begin(self):
    """Makes what an action would wait for, and then updates without end."""
    self.pretrain()
    self._actor.prepare(self._c.envs, self._c.seed + self.step)
    self._switch = sys.getswitchinterval()
    sys.setswitchinterval(self.SWITCH)
    self._learning = self._thread.submit(self._go_on)

  def pretrain(self):
    """The first update, which compiles, and those of --pretrain."""
    self._should_pretrain()
    for _ in range(max(1, self._c.pretrain - self.updates)):
      self._make_update()

  def _learn_if_due(self):
    self._check_stop()
    self.catch_up()

  def _go_on(self):
    while not self._halted:
      self.learn_on()

  def learn_on(self):
    """One update, or a pause where --max_ratio allows none."""
    self._run.stop.check()
    if self._allowed():
      self._make_update()
    else:
      time.sleep(self.PAUSE)

  def _allowed(self):
    c = self._c
    limit = max(c.pretrain, c.max_ratio * self.step)
    return not c.max_ratio or self.updates < limit

  def _make_update(self):
    self._should_train.skip(self.step)  # none is due, should --learner change
    self._pending.assign_add(1)
    self._make_updates(1)
    self._actor.take()
    if self._should_log(self.step):
      self._write_summaries()

  def catch_up(self):
    """Raises what ended the updates; does not wait for them."""
    if self._learning and self._learning.done():
      self.halt()

  def halt(self):
    super().halt()
    learning, self._learning = self._learning, None
    if learning:
      sys.setswitchinterval(self._switch)
      with contextlib.suppress(cli.Stopped):
        learning.result()

  def _rates(self, last, mark):
    seconds = mark['now'] - last['now']
    return dict(
      super()._rates(last, mark),
      ups=(mark['updates'] - last['updates']) / seconds,
      ratio=mark['updates'] / max(1, mark['step']),
    )
