"""Environments of Gymnasium as people write them, for tests."""

import json
import os
import pathlib
import signal
import socket
import sys
import time

import gymnasium
import numpy as np

import suites

S = gymnasium.spaces
PIXELS = S.Box(0, 255, (64, 64, 3), np.uint8)


class Base(gymnasium.Env):
  """Shows its time in every pixel, and refuses what is no action of it."""

  metadata = {'render_modes': ['rgb_array']}
  observation_space = PIXELS
  action_space = S.Box(-1, 1, (2,), np.float32)
  length = 20

  def __init__(self, render_mode=None):
    self.render_mode, self.time, self.actions = render_mode, 0, []

  def obs(self):
    space = self.observation_space
    return np.full(space.shape, self.time, space.dtype)

  def reset(self, seed=None, options=None):
    super().reset(seed=seed)
    self.time = 0
    return self.obs(), {}

  def step(self, action):
    if not self.action_space.contains(action):
      raise AssertionError(f'{action!r} is outside of {self.action_space}')
    self.actions.append(action)
    self.time += 1
    return self.obs(), self.reward(), False, self.time >= self.length, {}

  def reward(self):
    return 1.0

  def render(self):
    return np.full((64, 64, 3), 200, np.uint8)


def register(kind, name=None, library=gymnasium):
  """Registers an environment; returns the task that it is."""
  name = f'{name or kind.__name__}-v0'
  if name not in library.envs.registration.registry:
    library.register(name, entry_point=kind)
  return f'gym_{name}'


def make(kind, library=gymnasium, repeat=1, **kwargs):
  return suites.make_task(
    register(kind, library=library), repeat, 100, **kwargs
  )


def innermost(env):
  while hasattr(env, '_env'):
    env = env._env
  return env


def variant(base=Base, **attributes):
  """A class with other attributes, of a name of its own."""
  variant.count += 1
  return type(f'Variant{variant.count}', (base,), attributes)


variant.count = 0


class Gone(Base):
  """Fails after 5 episodes, and then cannot be made again."""

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path, self.count = pathlib.Path(path), 0
    if self.path.exists():
      self.action_space = S.Text(4)

  def step(self, action):
    self.count += 1
    if self.count > 5 * self.length:
      self.path.touch()
      raise RuntimeError('the device is gone')
    return super().step(action)


class OnePort(Base):
  """Takes a port of its host, as a robot does."""

  length = 10

  def __init__(self, port, render_mode=None):
    super().__init__(render_mode)
    self.server = socket.create_server(('127.0.0.1', port))


class Growing(Base):
  """Shows one number more each time it is made, and fails after 3 episodes."""

  length = 5
  count = 0

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    with open(path, 'a') as file:
      file.write('.')
      size = file.tell()
    self.observation_space = S.Box(-99, 99, (size,), np.float32)

  def step(self, action):
    self.count += 1
    if self.count > 3 * self.length:
      raise RuntimeError('the device is gone')
    return super().step(action)


def _bounds(path):
  return json.loads(open(f'{path}.bounds').read())


class Flaky(Base):
  """Raises an error at every step whose number is in a file."""

  length = 5
  count = 0

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path = path

  def step(self, action):
    with open(self.path, 'a+') as file:
      file.seek(0)
      count = len(file.read())
      file.write('.')
    if count in range(*_bounds(self.path)):
      raise RuntimeError(f'unstable at {count}')
    return super().step(action)


class FlakyEvaluation(Base):
  """The second that is used fails in its first episode, once."""

  length = 5

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    self.path, self.turn = pathlib.Path(path), None

  def step(self, action):
    if self.turn is None:
      with self.path.open('a') as file:
        file.write('.')
        self.turn = file.tell()
    if self.turn == 2:
      raise RuntimeError('the motor is hot')
    return super().step(action)


class Changing(Base):
  """Every third episode is too short to be learned from."""

  count = 0

  def reset(self, seed=None, options=None):
    self.count += 1
    self.length = 20 if self.count % 3 else 4
    return super().reset(seed=seed)


class Telling(Base):
  """Succeeds at one step after its second, fourth, ... reset."""

  length, count = 10, 0

  def reset(self, seed=None, options=None):
    self.count += 1
    return super().reset(seed=seed)

  def step(self, action):
    *rest, _ = super().step(action)
    success = np.bool_(self.count % 2 == 0 and self.time == 7)
    return *rest, {'success': success, 'left': [10 - self.time], 'name': 'a'}


class Chatty(Base):
  def step(self, action):
    print('step', self.time, 'ü' * 3000)
    sys.stderr.write('no end of line' if self.time == 3 else 'end\n')
    if self.time == 4:
      os.write(1, b'last words \xff')
      os.kill(os.getpid(), signal.SIGKILL)
    return super().step(action)


class SlowStart(Base):
  def __init__(self, seconds, render_mode=None):
    super().__init__(render_mode)
    time.sleep(seconds)


class SlowAgain(Base):
  """Takes the seconds in a file to start, and writes its process there."""

  length = 10

  def __init__(self, path, render_mode=None):
    super().__init__(render_mode)
    path = pathlib.Path(path)
    seconds = float(path.read_text())
    path.with_suffix('.pid').write_text(str(os.getpid()))
    time.sleep(seconds)


class Slow(Base):
  def step(self, action):
    time.sleep(60)


# Workers import this module for them: 'gym_user_envs:Flaky-v0'.
# fmt: off
for _kind in (
  Changing, Chatty, Flaky, FlakyEvaluation, Gone, Growing, OnePort, Slow,
  SlowAgain, SlowStart, Telling,
):
  # fmt: on
  register(_kind)
