"""Images of the control suite: what is drawn faster, and how alike it stays."""

import functools
import pathlib

import numpy as np
import pytest

import cli
import commandline
import dmc_env
import environments
import workers
import wrappers


class Drawn:
  """Makes a task in a worker, which shows what its images were drawn with."""

  def __init__(self, task, detail, plain=False):
    self.task, self.detail, self.plain = task, detail, plain

  def __call__(self):
    name = self.task.removeprefix('dmc_')
    self.env = wrappers.DeepMindControl(name, seed=0, detail=self.detail)
    self.physics = self.env._env.physics
    self.observation_space = self.env.observation_space
    self.action_space = self.env.action_space
    if self.plain:  # as the suite has it
      from dm_control import suite

      self.copy = suite.load(*dmc_env.DMC_TASKS[name]).physics
    return self

  def reset(self):
    return self._with(self.env.reset())

  def step(self, action):
    obs, *rest = self.env.step(action)
    return self._with(obs), *rest

  def _with(self, obs):
    view = self.physics.model.vis
    names = pathlib.Path('/proc/self/task').glob('*/comm')
    obs['threads'] = sum('llvmpipe' in name.read_text() for name in names)
    obs['shadow'] = view.quality.shadowsize
    obs['stacks'] = view.quality.numstacks
    obs['buffer'] = view.global_.offheight, view.global_.offwidth
    if self.plain:
      with self.copy.reset_context():
        self.copy.set_state(self.physics.get_state())
      obs['plain'] = self.copy.render(64, 64, camera_id=0)
    return obs

  def close(self):
    self.env.close()


def images(task, detail, steps=8):
  """Of the same states, whatever the detail; and the last observation."""
  env = workers.Async(Drawn(task, detail))
  rng, found = np.random.default_rng(0), []
  try:
    found.append(env.reset()['image'])
    for _ in range(steps):
      action = rng.uniform(-1, 1, env.action_space.shape)
      obs = env.step(action.astype(np.float32))[0]
      found.append(obs['image'])
  finally:
    env.close()
  return np.stack(found).astype(int), obs


@pytest.mark.parametrize(
  'task', ['dmc_walker_walk', 'dmc_ball_in_cup_catch', 'dmc_cartpole_swingup']
)
def test_low_detail_is_nearly_the_same_image(task):
  full, _ = images(task, 'full')
  low, obs = images(task, 'low')
  assert obs['threads'] == 0
  assert (obs['shadow'], obs['stacks']) == (512, 6)
  difference = np.abs(full - low)
  assert 0 < difference.mean() < 0.3  # of 255
  assert (difference > 32).mean() < 0.002


def test_the_flag_reaches_the_environment():
  found = []
  for detail in ('full', 'low'):
    config = commandline.parse_flags(
      ['--logdir=x', f'--render_detail={detail}']
    )
    env = environments.make_worker(config)
    try:
      found.append(env.reset()['image'])
    finally:
      env.close()
  assert (found[0] != found[1]).any()
  with pytest.raises(cli.UserError, match='toy_reach has none'):
    commandline.parse_flags(
      ['--logdir=x', '--task=toy_reach', '--render_detail=low']
    )


def test_full_detail_is_that_of_the_suite_pixel_by_pixel():
  """In a buffer of the image's size."""
  env = workers.Async(Drawn('dmc_walker_walk', 'full', plain=True))
  try:
    for obs in [env.reset(), env.step(np.full(6, 0.5, np.float32))[0]]:
      np.testing.assert_array_equal(obs['image'], obs['plain'])
  finally:
    env.close()
  assert (obs['shadow'], obs['stacks']) == (2048, 16)
  assert obs['buffer'] == (64, 64)


def test_software_is_known_by_its_name():
  """Here Mesa's renders; a GPU's name would leave the detail as it is."""
  _, obs = images('dmc_cartpole_balance', 'auto', 1)
  make = functools.partial(Named, 'dmc_cartpole_balance')
  env = workers.Async(make)
  try:
    name = env.reset()['name']
  finally:
    env.close()
  software = any(x in name.lower() for x in ('llvmpipe', 'softpipe', 'swrast'))
  assert (obs['shadow'] == 512) == software


class Named:
  """An environment that tells the name of what renders it."""

  def __init__(self, task):
    self.env = wrappers.DeepMindControl(task.removeprefix('dmc_'))
    self.env.reset()
    self.observation_space = self.env.observation_space
    self.action_space = self.env.action_space

  def reset(self):
    from OpenGL import GL

    with self.env._env.physics.contexts.gl.make_current() as context:
      name = context.call(GL.glGetString, GL.GL_RENDERER)
    return dict(name=name.decode())

  def close(self):
    self.env.close()
