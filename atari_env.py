"""Atari games, in the Arcade Learning Environment. No TensorFlow."""

import functools
import importlib.util
import pathlib

import numpy as np

import spaces
from spaces import gym
from worker_calls import check_name

# Games for two players: the emulator ends the process when it loads them.
_FOR_TWO = {'combat', 'joust', 'maze_craze', 'warlords'}


@functools.cache
def atari_games():
  """Names of the games whose ROM `ale_py` brings, such as 'space_invaders'."""
  package = importlib.util.find_spec('ale_py')
  if package is None:
    return []
  folder = pathlib.Path(package.origin).parent / 'roms'
  return sorted({path.stem for path in folder.glob('*.bin')} - _FOR_TWO)


class Atari:
  """A game of the Arcade Learning Environment, after Machado et al. (2018).

  Each frame repeats the last action instead of the given one with probability
  `sticky`. The image is the larger of the last two frames, pixel by pixel (the
  console draws some objects in every other frame only), in color, resized to
  64x64. A game begins with 1 to `noops` frames without action.

  Args:
    name: a game of `atari_games()`.
    action_repeat: frames for each action.
    size: height and width of the image in pixels.
    noops: largest number of frames without action at the start, or 0.
    life_done: end an episode, with discount 0, when a life is lost; the next
      episode then goes on in the same game.
    sticky: probability of a repeated action.
    all_actions: all 18 actions rather than those that the game uses.
    seed: int or None.

  Raises:
    TaskError: no such game.
  """

  def __init__(
    self,
    name,
    action_repeat=4,
    size=(64, 64),
    noops=30,
    life_done=False,
    sticky=0.25,
    all_actions=False,
    seed=None,
    inputs='image',
    record='',
  ):
    check_name(name, atari_games(), 'atari_')
    import ale_py
    import ale_py.roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    self._ale = ale_py.ALEInterface()
    self._ale.setFloat('repeat_action_probability', sticky)
    self._rom = ale_py.roms.get_rom_path(name)
    self._random = np.random.RandomState(seed)
    self._load()
    legal, minimal = self._ale.getLegalActionSet, self._ale.getMinimalActionSet
    self._actions = legal() if all_actions else minimal()
    self._repeat, self._size = action_repeat, tuple(size)
    self._noops, self._life_done = noops, life_done
    height, width = self._ale.getScreenDims()
    screen = (
      f'the screen, {height}x{width}, the larger of the last two frames, '
      f'resized to {"x".join(map(str, size))}'
    )
    offers = dict(image=spaces.Offer(spaces.image_space(size), screen))
    view = spaces.View(f'atari_{name}', offers, inputs, record)
    self.about, self.observation_space = view.about, view.space
    self._goes_on = False  # whether the next episode continues this game
    self._reseeded = False
    self.action_space = gym.spaces.Discrete(len(self._actions))

  def _load(self):
    self._ale.setInt('random_seed', self._random.randint(2**31))
    self._ale.loadROM(self._rom)  # only now does the emulator take the seed

  def reseed(self, seed):
    self._random.seed(seed)
    self._reseeded = True

  def reset(self):
    if not self._goes_on:
      if self._reseeded:
        self._load()
        self._reseeded = False
      self._ale.reset_game()
      frames = 1 + self._random.randint(self._noops) if self._noops else 0
      for _ in range(frames):
        self._ale.act(0)
        if self._ale.game_over():
          self._ale.reset_game()
    self._goes_on = False
    self._lives = self._ale.lives()
    return self._observe([self._ale.getScreenRGB()])

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'Action {action!r} is not one of {self.action_space}.')
    reward, frames = 0.0, []
    for index in range(self._repeat):
      reward += self._ale.act(self._actions[action])
      over = self._ale.game_over()
      if over or index >= self._repeat - 2:
        frames.append(self._ale.getScreenRGB())
      if over:
        break
    lives = self._ale.lives()
    self._goes_on = self._life_done and lives < self._lives and not over
    self._lives = lives
    done = over or self._goes_on
    info = {'discount': np.float32(0 if done else 1), 'lives': lives}
    return self._observe(frames), reward, done, info

  def close(self):
    pass

  def _observe(self, frames):
    return {'image': spaces.resize(np.max(frames, 0), self._size)}
