"""Tasks without a simulator, for tests and first runs (`toy_...`).

Environments as wrappers.py describes them. No TensorFlow.
"""

import math
import time

import numpy as np

import spaces
from spaces import gym


class Toy:
  """A task without a simulator: a drawing, and the numbers that it shows.

  Observations are `image`, uint8 [64, 64, 3], and `state`. A subclass draws
  with `_draw` and has `TASK`, its name, and `state`.

  Args:
    seed: int or None.
    inputs, record: see `spaces.View`.
  """

  def __init__(self, seed=None, inputs='image', record=''):
    self._random = np.random.RandomState(seed)
    self._step = 0
    state = self.state
    box = gym.spaces.Box(-np.inf, np.inf, state.shape, state.dtype)
    offers = dict(
      image=spaces.Offer(spaces.image_space(), 'a drawing, 64x64'),
      state=spaces.Offer(box, f'state {list(state.shape)}'),
    )
    view = spaces.View(self.TASK, offers, inputs, record)
    self._names, self.about = view.names, view.about
    self.observation_space = view.space

  def reseed(self, seed):
    self._random.seed(seed)

  def close(self):
    pass

  def _observe(self):
    show = dict(image=self._draw, state=lambda: self.state)
    return {name: show[name]() for name in self._names}


class ToyReach(Toy):
  """Steer a green dot onto a red target; an image task without a simulator.

  The two actions in [-1, 1] are the velocity to the right and downwards. The
  target is the middle and the dot begins anywhere but near it, so no constant
  action does well. The reward in [0, 1] grows as the dot nears the target. An
  episode takes 50 steps and then ends by time, with discount 1.
  """

  TASK = 'toy_reach'
  LENGTH = 50
  # Places lie in [-1, 1]^2; the way to the target takes about ten steps.
  SPEED = 0.12
  TARGET = np.zeros(2)

  def __init__(self, seed=None, inputs='image', record=''):
    self._dot = np.zeros(2)
    super().__init__(seed, inputs, record)
    self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

  @property
  def state(self):
    """Places of dot and target, float64 [4]: x, y, x, y in [-1, 1]."""
    return np.concatenate([self._dot, self.TARGET])

  def reset(self):
    self._step = 0
    # Not too near, or there would be nothing to do.
    while True:
      self._dot = self._random.uniform(-1, 1, 2)
      if self._distance() > 0.6:
        return self._observe()

  def step(self, action):
    self._move(spaces.check_action(action, self.action_space))
    self._step += 1
    # The square keeps a slope nearly everywhere, and 0 only in the corners.
    reward = (1 - self._distance() / np.sqrt(2)) ** 2
    done = self._step >= self.LENGTH
    return self._observe(), float(reward), done, {'discount': np.float32(1)}

  def _move(self, action):
    velocity = self.SPEED * np.clip(action.astype(np.float64), -1, 1)
    self._dot = np.clip(self._dot + velocity, -1, 1)

  def _distance(self):
    return np.linalg.norm(self._dot - self.TARGET)

  def _draw(self):
    image = np.zeros((64, 64, 3), np.uint8)
    _draw_disc(image, 31.5 + 24 * self.TARGET, 9, (255, 60, 60))
    _draw_disc(image, 31.5 + 24 * self._dot, 7, (60, 255, 60))
    return image


class ToyRobot(ToyReach):
  """`ToyReach` at 20 ticks of wall time a second: a stand-in for a robot.

  It does not wait for its agent, and each action takes effect one tick late:
  while the agent finds one, the robot carries out the one before.

      tick      0         1         2         3
      seen     o_0       o_1       o_2       o_3
      agent     | a_0 ->  | a_1 ->  | a_2 ->  |
      robot     | rests   | a_0     | a_1     |

  `step` takes an action, waits for the end of the tick and returns what is
  seen there. An action that comes later has missed its tick: the robot goes on
  with the one that it has, and takes the new one at the next. `info['missed']`
  counts the ticks that passed so since the last step, by the robot's own clock.
  Their rewards are lost. Between episodes the clock stands still.
  """

  TASK = 'toy_robot'
  PERIOD = 0.05  # seconds

  def reset(self):
    self._held = np.zeros(2)
    self._next = time.monotonic() + self.PERIOD  # end of this tick
    return super().reset()

  def step(self, action):
    action = np.array(spaces.check_action(action, self.action_space))
    late = time.monotonic() - self._next
    missed = max(0, math.ceil(late / self.PERIOD))
    for _ in range(missed):
      self._move(self._held)
    self._next += missed * self.PERIOD
    time.sleep(max(0.0, self._next - time.monotonic()))
    self._next += self.PERIOD
    obs, reward, done, info = super().step(self._held)
    self._held = action
    return obs, reward, done, dict(info, missed=missed)


class ToyCatch(Toy):
  """Move a paddle under a falling ball; an image task without a simulator.

  The three actions are left, stay and right. The ball lands after 16 steps:
  reward 1 on the paddle or -1 beside it, and discount 0, as the episode truly
  ends. All other rewards are 0.
  """

  TASK = 'toy_catch'
  LENGTH = 16
  SPEED = 4  # Pixels per step.

  def __init__(self, seed=None, inputs='image', record=''):
    self._ball = self._paddle = 32
    super().__init__(seed, inputs, record)
    self.action_space = gym.spaces.Discrete(3)

  @property
  def state(self):
    """Columns of ball and paddle in pixels, and the step: int64 [3]."""
    return np.array([self._ball, self._paddle, self._step])

  def reset(self):
    self._step = 0
    self._ball = self._random.randint(4, 60)
    self._paddle = self._random.randint(8, 56)
    return self._observe()

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'Action {action!r} is not 0, 1 or 2.')
    self._paddle += self.SPEED * (int(action) - 1)
    self._paddle = int(np.clip(self._paddle, 8, 56))
    self._step += 1
    done = self._step >= self.LENGTH
    caught = abs(self._ball - self._paddle) <= 8
    reward = (1.0 if caught else -1.0) if done else 0.0
    info = {'discount': np.float32(0 if done else 1)}
    return self._observe(), reward, done, info

  def _draw(self):
    image = np.zeros((64, 64, 3), np.uint8)
    left = self._paddle - 8
    image[58:62, left : left + 16] = (60, 255, 60)
    row = 4 + 52 * self._step / self.LENGTH
    _draw_disc(image, (self._ball, row), 4, (255, 60, 60))
    return image


TOYS = dict(reach=ToyReach, catch=ToyCatch, robot=ToyRobot)


def _draw_disc(image, center, radius, color):
  """Paints a disc; `center` is (column, row) in pixels."""
  rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
  inside = (columns - center[0]) ** 2 + (rows - center[1]) ** 2 <= radius**2
  image[inside] = color
