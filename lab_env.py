"""DeepMind Lab. No TensorFlow."""

import importlib.util

import numpy as np

import spaces
from spaces import gym
from worker_calls import TaskError


class DeepMindLab:
  """A level of DeepMind Lab, through its Python package `deepmind_lab`.

  The package must be built by hand; this class has been run against a
  stand-in with the same interface only. Each episode has a seed of its own,
  drawn from `seed`. When a level ends, by time as most do or not, the discount
  is 0: the package does not tell.

  Args:
    level: a level of DMLab-30, such as 'rooms_watermaze', or any other by its
      path, such as 'lt_chasm'; 'collect' is short for
      'rooms_collect_good_objects_train', the paper's task.
    action_repeat: frames for each action.
    seed: int or None.
    test: use the levels that Lab holds out for testing: those that end in
      '_test' rather than '_train', and other random layouts.
  """

  # Look right (in pixels), look up, strafe right, forward, fire, jump, crouch:
  # the set of IMPALA (Espeholt et al., 2018), which the paper uses as well.
  ACTIONS = (
    (0, 0, 0, 1, 0, 0, 0),  # forward
    (0, 0, 0, -1, 0, 0, 0),  # backward
    (0, 0, -1, 0, 0, 0, 0),  # strafe left
    (0, 0, 1, 0, 0, 0, 0),  # strafe right
    (-20, 0, 0, 0, 0, 0, 0),  # look left
    (20, 0, 0, 0, 0, 0, 0),  # look right
    (-20, 0, 0, 1, 0, 0, 0),  # look left, forward
    (20, 0, 0, 1, 0, 0, 0),  # look right, forward
    (0, 0, 0, 0, 1, 0, 0),  # fire
  )

  def __init__(
    self,
    level,
    action_repeat=4,
    seed=None,
    test=False,
    inputs='image',
    record='',
  ):
    require_lab(level)
    import deepmind_lab

    config = dict(height='64', width='64', logLevel='WARN')
    if test:  # the seed that Lab's documentation sets aside for testing
      config.update(allowHoldOutLevels='true', mixerSeed=str(0x600D5EED))
    path = lab_level(level, test)
    self._lab = deepmind_lab.Lab(path, ['RGB_INTERLEAVED'], config=config)
    self._random = np.random.RandomState(seed)
    self._repeat = action_repeat
    image = spaces.Offer(spaces.image_space(), 'the screen')
    view = spaces.View(f'dmlab_{level}', dict(image=image), inputs, record)
    self.about, self.observation_space = view.about, view.space
    self.action_space = gym.spaces.Discrete(len(self.ACTIONS))

  def reseed(self, seed):
    self._random.seed(seed)

  def reset(self):
    self._lab.reset(seed=self._random.randint(2**31 - 1))
    self._image = self._lab.observations()['RGB_INTERLEAVED']
    return {'image': self._image.copy()}

  def step(self, action):
    raw = np.array(self.ACTIONS[action], np.intc)
    reward = self._lab.step(raw, num_steps=self._repeat)
    done = not self._lab.is_running()
    if not done:  # after the end there are no observations
      self._image = self._lab.observations()['RGB_INTERLEAVED']
    info = {'discount': np.float32(0 if done else 1)}
    return {'image': self._image.copy()}, float(reward), done, info

  def close(self):
    self._lab.close()


def require_lab(level):
  """Raises TaskError unless the package of DeepMind Lab is there."""
  if importlib.util.find_spec('deepmind_lab') is None:
    raise TaskError(
      f'Task {"dmlab_" + level!r} needs the Python package deepmind_lab, which '
      'is not on PyPI: build it from https://github.com/google-deepmind/lab.'
    )


# fmt: off
_LAB30 = (
  'explore_goal_locations_large', 'explore_goal_locations_small',
  'explore_object_locations_large', 'explore_object_locations_small',
  'explore_object_rewards_few', 'explore_object_rewards_many',
  'explore_obstructed_goals_large', 'explore_obstructed_goals_small',
  'language_answer_quantitative_question', 'language_execute_random_task',
  'language_select_described_object', 'language_select_located_object',
  'lasertag_one_opponent_large', 'lasertag_one_opponent_small',
  'lasertag_three_opponents_large', 'lasertag_three_opponents_small',
  'natlab_fixed_large_map', 'natlab_varying_map_randomized',
  'natlab_varying_map_regrowth',
  'psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition',
  'psychlab_sequential_comparison', 'psychlab_visual_search',
  'rooms_collect_good_objects_train', 'rooms_collect_good_objects_test',
  'rooms_exploit_deferred_effects_train', 'rooms_watermaze',
  'rooms_exploit_deferred_effects_test', 'rooms_keys_doors_puzzle',
  'rooms_select_nonmatching_object', 'skymaze_irreversible_path_hard',
  'skymaze_irreversible_path_varied',
)
# fmt: on


def lab_level(name, test=False):
  """The path of a level in DeepMind Lab, of the held-out one for `test`."""
  if name == 'collect':
    name = 'rooms_collect_good_objects_train'
  if test and name.endswith('_train'):
    name = f'{name.removesuffix("_train")}_test'
  return f'contributed/dmlab30/{name}' if name in _LAB30 else name
