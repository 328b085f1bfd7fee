"""Environments and their wrappers.

An environment here has `observation_space` (a `gym.spaces.Dict`),
`action_space`, `reset() -> obs`, `step(action) -> (obs, reward, done, info)`
and `close()`. Images, `obs['image']`, `obs['image_2']`, ..., are uint8
[64, 64, 3]; all others are vectors. `info['discount']`, where present, is the
factor that applies to everything after this step: 0 if the task really ended
there, 1 if only a time limit did. `info['missed']`, where time does not wait
for the agent, counts the ticks since the last step for which no action came.

An *environment step* is one step of the simulator, an *agent step* one action
of the agent; the action repeat lies between the two.

This module never imports TensorFlow, nor anything that does: Mesa's software
OpenGL and TensorFlow crash in one process, so `Async` keeps environments in
workers. suites.py has them by the names of tasks.
"""

import numpy as np

import spaces
from atari_env import Atari as Atari
from dmc_env import DeepMindControl as DeepMindControl
from replay import Collect as Collect
from spaces import gym
from workers import Async as Async
from workers import Wrapper


class ActionRepeat(Wrapper):
  """Repeats each action for `amount` environment steps.

  Rewards add up and discounts multiply; stops where the episode ends. An `env`
  with `advance` and `observe` renders only what is returned.
  """

  def __init__(self, env, amount):
    super().__init__(env)
    if amount < 1:
      raise ValueError(f'The action repeat must be at least 1, not {amount}.')
    self._amount = amount

  def step(self, action):
    unseen = hasattr(self._env, 'advance')
    total, discount, missed = 0.0, 1.0, 0
    for _ in range(self._amount):
      if unseen:
        reward, done, info = self._env.advance(action)
      else:
        obs, reward, done, info = self._env.step(action)
      total += reward
      discount *= info.get('discount', 1.0)
      missed += info.get('missed', 0)
      if done:
        break
    if unseen:
      obs = self._env.observe()
    if 'discount' in info:
      info = {**info, 'discount': np.float32(discount)}
    if 'missed' in info:
      info = {**info, 'missed': missed}
    return obs, total, done, info


class NormalizeActions(Wrapper):
  """Maps actions in [-1, 1] onto the Box of `env` (see `spaces.BoxMap`)."""

  def __init__(self, env):
    super().__init__(env)
    self._map = spaces.BoxMap(env.action_space)
    self.action_space = gym.spaces.Box(
      -1.0, 1.0, env.action_space.shape, np.float32
    )

  def step(self, action):
    return self._env.step(
      self._map(spaces.check_action(action, self.action_space))
    )


class TimeLimit(Wrapper):
  """Ends episodes after `duration` agent steps.

  An episode that only this limit ends keeps the discount of the environment,
  or 1 if that gives none: what comes after it would still have counted.
  """

  def __init__(self, env, duration):
    super().__init__(env)
    if duration < 1:
      raise ValueError(f'The time limit must be 1 step at least: {duration}.')
    self._duration = duration
    self._step = None

  def reset(self):
    self._step = 0
    return self._env.reset()

  def step(self, action):
    if self._step is None:
      raise RuntimeError('The episode is over: call reset() first.')
    obs, reward, done, info = self._env.step(action)
    self._step += 1
    if self._step >= self._duration:
      info = {'discount': np.float32(0 if done else 1), **info}
      done = True
    if done:
      self._step = None
    return obs, reward, done, info


class ObsDict(Wrapper):
  """Puts the observation of `env` under `key` of a dictionary."""

  def __init__(self, env, key='obs'):
    super().__init__(env)
    self._key = key
    self.observation_space = gym.spaces.Dict({key: env.observation_space})

  def reset(self):
    return {self._key: self._env.reset()}

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    return {self._key: obs}, reward, done, info


class OneHotAction(Wrapper):
  """Takes one-hot vectors where `env` takes numbers: Discrete, MultiDiscrete.

  Several choices are one-hot vectors side by side. `step` raises ValueError
  for what is not.
  """

  def __init__(self, env):
    super().__init__(env)
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
      self.action_space = spaces.OneHotBox(space.n)
    elif isinstance(space, gym.spaces.MultiDiscrete):
      self.action_space = spaces.OneHotBox(space.nvec)
    else:
      raise TypeError(f'{space} is not a Discrete action space.')
    self._single = isinstance(space, gym.spaces.Discrete)

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'Action {action} is not one-hot.')
    index = self.action_space.decode(action)
    return self._env.step(int(index[0]) if self._single else index)


class RewardObs(Wrapper):
  """Adds the reward to the observation, float32 []; it is 0 after a reset."""

  def __init__(self, env):
    super().__init__(env)
    parts = dict(env.observation_space.spaces)
    parts['reward'] = gym.spaces.Box(-np.inf, np.inf, (), np.float32)
    self.observation_space = gym.spaces.Dict(parts)

  def reset(self):
    return {**self._env.reset(), 'reward': np.zeros((), np.float32)}

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    return {**obs, 'reward': np.array(reward, np.float32)}, reward, done, info


class CheckFinite(Wrapper):
  """Refuses rewards and observations that are not finite in float32.

  Args:
    env: an environment with dictionaries as observations.
    name: of the task, for the error.
  """

  def __init__(self, env, name):
    super().__init__(env)
    self._name = name

  def reset(self):
    obs = self._env.reset()
    self._check(obs)
    return obs

  def step(self, action):
    obs, reward, done, info = self._env.step(action)
    self._check({**obs, 'the reward': reward})
    return obs, reward, done, info

  def _check(self, values):
    for key, value in values.items():
      value = np.asarray(value)
      if value.dtype.kind == 'f' and not np.isfinite(_stored(value)).all():
        raise FloatingPointError(
          f'{self._name} gave {key} that is not finite: {value}'
        )


def _stored(value):
  """As float32, where what is too large becomes infinite."""
  with np.errstate(over='ignore'):
    return value.astype(np.float32)


class EpisodeSeeds(Wrapper):
  """Seeds each episode by its number, so that any of them can be run again.

  Args:
    env: an environment with `reseed(seed)`, which says what the next `reset`
      starts from.
    seed: int; episode n gets a seed made of this and n.
  """

  def __init__(self, env, seed):
    super().__init__(env)
    self._seed = seed
    self._number = 0

  def reset(self, number=None):
    """Begins episode `number`, else that after the last; they count from 0."""
    self._number = self._number if number is None else number
    sequence = np.random.SeedSequence([self._seed, self._number])
    self._env.reseed(int(sequence.generate_state(1)[0] >> 1))
    self._number += 1
    return self._env.reset()
