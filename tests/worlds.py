"""Environments for tests, and what calls them."""

import ctypes
import functools
import os
import signal
import time

import numpy as np

import suites
import wrappers
from spaces import gym


class Call:
  """Environment whose `reset` returns what a function returns in the worker."""

  observation_space = action_space = None

  def __init__(self, function, *args):
    self._function = functools.partial(function, *args)

  def reset(self):
    return self._function()

  def close(self):
    pass


class Counting:
  """Shows how many steps were taken altogether; episodes of `length` steps."""

  observation_space = gym.spaces.Dict(
    {
      'image': gym.spaces.Box(0, 255, (2, 2, 3), np.uint8),
      'count': gym.spaces.Box(0, 2**31 - 1, (), np.int64),
      'float': gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
    }
  )
  action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

  def __init__(self, length=7, info=None):
    self.count = 0
    self.actions = []
    self._length = length
    self._info = info or {}
    self._step = 0

  def reset(self):
    self._step = 0
    return self._observe()

  def step(self, action):
    self.actions.append(np.array(action))
    self.count += 1
    self._step += 1
    done = self._step >= self._length
    return self._observe(), 0.5 * self.count, done, dict(self._info)

  def close(self):
    pass

  def _observe(self):
    return {
      'image': np.full((2, 2, 3), self.count % 256, np.uint8),
      'count': np.array(self.count, np.int64),
      'float': np.full(3, self.count / 4, np.float64),
    }


class Faulty:
  """Fails, hangs or dies, as the action says."""

  observation_space = gym.spaces.Dict({})
  action_space = gym.spaces.Discrete(3)

  def reset(self):
    return {}

  def step(self, action):
    if action == 'fail':
      raise KeyError('wheel')
    if action == 'die':
      os.write(2, b'many words\n' * 2000 + b'last words\n')
      os._exit(3)
    if action == 'sleep':
      time.sleep(60)
    return {}, 0.0, False, {'pid': os.getpid()}

  def close(self):
    pass


class Fragile(Counting):
  """Dies or hangs at its second step, as its worker's turn in `fates` says."""

  def __init__(self, path, fates):
    super().__init__(length=3)
    self._episodes = 0
    with path.open('a+') as file:
      file.write('worker\n')
      file.seek(0)
      turn = len(file.readlines()) - 1
    self._fate = fates[turn] if turn < len(fates) else 'live'
    if self._fate == 'die at once':
      os.kill(os.getpid(), signal.SIGKILL)

  def reset(self, number=None):
    self._episodes += 1
    if number is not None:
      self.count = 100 * number
    return super().reset()

  def step(self, action):
    if self._fate == 'die later' and self._episodes == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    if self._step == 1 and self._fate == 'die':
      os.kill(os.getpid(), signal.SIGKILL)
    if self._step == 1 and self._fate == 'hang deep':  # in C, with the GIL
      signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
      ctypes.PyDLL(None).pause()
    if self._step == 1 and self._fate == 'hang':
      forever()
    return super().step(action)


def forever():
  while True:
    time.sleep(1)


class Closing(Counting):
  """Writes into a file that it was closed, some seconds later."""

  def __init__(self, path, seconds=0):
    super().__init__()
    self._path, self._seconds = path, seconds

  def close(self):
    time.sleep(self._seconds)
    with open(self._path, 'a') as file:
      file.write('closed once\n')


def fail(kind, message):
  raise kind(message)


def environ(*names):
  return {name: os.environ.get(name) for name in names}


def noisy():
  os.write(1, b'noise on stdout\n')
  os.write(2, b'noise on stderr\n')
  return Counting()


def in_worker(function, *args, strategy='process'):
  """Returns what a function returns in a fresh worker process."""
  env = wrappers.Async(functools.partial(Call, function, *args), strategy)
  try:
    return env.reset()
  finally:
    env.close()


def rollout(env, actions, number=None):
  """Returns [(obs, reward, done, info)] of the reset and of each action."""
  first = env.reset() if number is None else env.reset(number)
  rows = [(first, 0.0, False, {})]
  rows += [env.step(action) for action in actions]
  return rows


def same(first, second):
  """Whether two rollouts agree in every bit of observation and reward."""
  return all(
    x[1:3] == y[1:3] and all((x[0][k] == y[0][k]).all() for k in x[0])
    for x, y in zip(first, second, strict=True)
  )


def pendulum():
  return Call(pendulum_report, suites.make_task('dmc_pendulum_swingup'))


def pendulum_report(env):
  return env.reset()['image'].std(), os.environ['MUJOCO_GL']


def render_pendulum(strategy='process'):
  env = wrappers.Async(pendulum, strategy)
  try:
    return env.reset()
  finally:
    env.close()


NO_EGL = ('__EGL_VENDOR_LIBRARY_DIRS', '/nonexistent')
