"""What environments show: names of inputs, vectors of all kinds, cameras.

Without TensorFlow, as workers import this file.
"""

import functools
import pathlib
import re

import gym
import gymnasium
import numpy as np
import pytest

import commandline
import configs
import spaces
import suites
import toys
import workers
from worker_calls import TaskError

ROOT = pathlib.Path(suites.__file__).parent


# --- Names ------------------------------------------------------------------


def offers():
  names = ['orientations', 'height', 'image', 'image_2']
  box = gym.spaces.Box(-1, 1, (2,), np.float32)
  return {name: spaces.Offer(box, f'the {name}') for name in names}


@pytest.mark.parametrize(
  ('inputs', 'names'),
  [
    ('image', ['image']),
    ('state', ['height', 'orientations']),
    ('state,image', ['image', 'height', 'orientations']),
    ('orientations,image_2', ['image_2', 'orientations']),
  ],
)
def test_names_of_inputs_in_a_fixed_order(inputs, names):
  view = spaces.View('task', offers(), inputs)
  assert view.names == names
  seen, *unused = view.about
  assert seen == f'The agent sees {", ".join(f"the {n}" for n in names)}.'
  assert len(unused) == 1


def test_a_wrong_name_is_an_error_with_those_that_exist():
  with pytest.raises(TaskError, match='did you mean height') as info:
    spaces.View('task', offers(), 'image,hight')
  assert 'it has image, image_2, height, orientations, state' in str(info.value)


def test_method_names_say_the_inputs():
  config = configs.define_config()
  assert configs.method_name(config) == 'dreamer'
  config.update(inputs='image,state')
  assert configs.method_name(config) == 'dreamer-image-state'
  config.update(behavior='planning', inputs='pose/arm')
  assert configs.method_name(config) == 'planet-pose-arm'


def test_the_preset_for_state_is_not_that_for_images(tmp_path):
  words = ['--logdir', str(tmp_path), '--preset', 'cpu']
  image = commandline.parse_flags(words)
  state = commandline.parse_flags([*words, '--inputs', 'state'])
  both = commandline.parse_flags([*words, '--inputs', 'image,state'])
  assert image.kl_scale == both.kl_scale == 1 and state.kl_scale == 0.6
  assert image.reward_scale == both.reward_scale == 10
  assert state.reward_scale == 1 and state.precision == '32'
  assert image.decode_images == both.decode_images == 128
  assert image.train_steps == both.train_steps == state.train_steps == 200
  assert image.imag_starts == both.imag_starts == state.imag_starts == 64


# --- Environments -----------------------------------------------------------


class Library:
  """Makes a task in a worker, and says whether OpenGL is loaded there."""

  def __init__(self, *args, **kwargs):
    self.args, self.kwargs = args, kwargs

  def __call__(self):
    self.env = suites.make_task(*self.args, **self.kwargs)
    self.observation_space = self.env.observation_space
    self.action_space = self.env.action_space
    return self

  def reset(self):
    obs = self.env.reset()
    maps = pathlib.Path('/proc/self/maps').read_text()
    names = set(re.findall('lib(?:EGL|GL|OSMesa|OpenGL|gallium)', maps))
    return dict(obs, opengl=bool(names))

  def close(self):
    self.env.close()


@pytest.mark.parametrize(
  ('inputs', 'names'),
  [
    ('state', ['height', 'orientations', 'velocity']),
    ('image,state', ['height', 'image', 'orientations', 'velocity']),
    ('image,height', ['height', 'image', 'orientations', 'velocity']),
  ],
)
def test_state_of_the_control_suite_needs_no_opengl(inputs, names):
  env = workers.Async(Library('dmc_walker_walk', inputs=inputs))
  try:
    obs = env.reset()
  finally:
    env.close()
  assert obs.pop('opengl') == ('image' in inputs)
  assert sorted(obs) == sorted([*names, 'reward'])
  assert all(type(x) is np.ndarray or x.shape == () for x in obs.values())


def test_cameras_of_the_control_suite():
  make = functools.partial(
    suites.make_task,
    'dmc_cartpole_balance',
    inputs='image,image_2',
    cameras=(1, 0),
  )
  env = workers.Async(make)
  try:
    obs, about = env.reset(), env.about
  finally:
    env.close()
  assert obs['image'].shape == obs['image_2'].shape == (64, 64, 3)
  assert (obs['image'] != obs['image_2']).mean() > 0.1
  assert about[0] == 'The agent sees camera 1, 64x64, camera 0, 64x64.'


class Nested(gymnasium.Env):
  """Observations of all kinds, as Gymnasium has them."""

  def __init__(self):
    box, kinds = gymnasium.spaces.Box, gymnasium.spaces
    self.action_space = box(-1.0, 1.0, (1,))
    self.observation_space = kinds.Dict(
      front=box(0, 255, (32, 32, 3), np.uint8),
      arm=kinds.Dict(angle=box(-9, 9, (2,)), force=box(0, 255, (3,), np.uint8)),
      gear=kinds.Discrete(4, start=1),
      doors=kinds.MultiDiscrete([2, 3]),
      lamps=kinds.MultiBinary(2),
      reward=box(-1, 1, (), np.float64),
      name=kinds.Text(5),
    )

  def reset(self, seed=None, options=None):
    self.observation_space.seed(seed)
    self.obs = self.observation_space.sample()
    return self.obs, {}

  def step(self, action):
    self.obs = self.observation_space.sample()
    return self.obs, 1.0, False, False, {}

  def close(self):
    pass


@pytest.fixture
def nested():
  gymnasium.register('Nested-v0', Nested)
  yield 'gym_Nested-v0'
  gymnasium.registry.pop('Nested-v0')


def test_spaces_of_gymnasium_as_vectors(nested):
  env = suites.make_task(nested, 1, 100, 0, inputs='image,state')
  obs = env.reset()
  theirs = env.obs if hasattr(env, 'obs') else inner(env).obs
  assert list(obs) == [
    'image', 'arm/angle', 'arm/force', 'doors', 'gear', 'lamps', 'obs/reward',
    'reward',
  ]  # fmt: skip
  np.testing.assert_array_equal(obs['arm/angle'], theirs['arm']['angle'])
  np.testing.assert_array_equal(obs['arm/force'], theirs['arm']['force'])
  assert obs['gear'].tolist() == np.eye(4)[theirs['gear'] - 1].tolist()
  first, second = theirs['doors']
  assert obs['doors'].tolist() == [*np.eye(2)[first], *np.eye(3)[second]]
  np.testing.assert_array_equal(obs['lamps'], theirs['lamps'])
  assert obs['obs/reward'] == np.float32(theirs['reward'])
  assert any("'name' (Text)" in line for line in env.about)
  assert env.observation_space.spaces.keys() == obs.keys()


def inner(env):
  """The environment of the user's in all wrappers."""
  while hasattr(env, '_env'):
    env = env._env
  return env


def test_single_vectors_by_their_names(nested):
  env = suites.make_task(nested, 1, 100, 0, inputs='gear,arm/angle')
  assert list(env.reset()) == ['arm/angle', 'gear', 'reward']
  with pytest.raises(TaskError, match='did you mean arm/angle'):
    suites.make_task(nested, inputs='arm/angel')


def test_a_plain_vector_is_called_state_and_nothing_is_drawn():
  env = suites.make_task('gym_CartPole-v1', 1, 100, 0, inputs='state')
  assert list(env.reset()) == ['state', 'reward']
  assert inner(env).render_mode is None


def test_state_of_the_toys():
  for task, toy in toys.TOYS.items():
    env = suites.make_task(f'toy_{task}', 1, 50, 0, inputs='state')
    obs = env.reset()
    assert list(obs) == ['state', 'reward']
    assert obs['state'].shape == toy(0).state.shape
    action = np.eye(3)[0] if task == 'catch' else np.ones(2)
    env.step(action)  # the robot's actions come one tick late
    step = env.step(action)
    assert (step[0]['state'] != obs['state']).any()
