"""The DeepMind control suite. No TensorFlow."""

import functools
import importlib.util
import os
import sys

import numpy as np

import opengl
import spaces
from spaces import gym
from worker_calls import TaskError, check_name

# What dm_control.suite.ALL_TASKS holds. It is written out because importing
# dm_control loads OpenGL, which the training process must not do.
_SUITE = {
  'acrobot': 'swingup swingup_sparse',
  'ball_in_cup': 'catch',
  'cartpole': (
    'balance balance_sparse swingup swingup_sparse two_poles three_poles'
  ),
  'cheetah': 'run',
  'dog': 'stand walk trot run fetch',
  'finger': 'spin turn_easy turn_hard',
  'fish': 'upright swim',
  'hopper': 'stand hop',
  'humanoid': 'stand walk run run_pure_state',
  'humanoid_CMU': 'stand walk run',
  'lqr': 'lqr_2_1 lqr_6_2',
  'manipulator': 'bring_ball bring_peg insert_ball insert_peg',
  'pendulum': 'swingup',
  'point_mass': 'easy hard',
  'quadruped': 'walk run escape fetch',
  'reacher': 'easy hard',
  'stacker': 'stack_2 stack_4',
  'swimmer': 'swimmer6 swimmer15',
  'walker': 'stand walk run',
}
DMC_TASKS = {
  f'{domain}_{task}': (domain, task)
  for domain, tasks in _SUITE.items()
  for task in tasks.split()
}
# The paper and the 2020 release call this domain 'cup'.
DMC_TASKS['cup_catch'] = ('ball_in_cup', 'catch')


class DeepMindControl:
  """A task of the DeepMind control suite.

  Observations are images of cameras, uint8 [*size, 3], and the task's own
  arrays in float32. Actions are float32 within the bounds that the suite gives.
  Without images nothing is rendered, and OpenGL is not touched.

  Args:
    name: '<domain>_<task>', such as 'walker_walk' or 'ball_in_cup_catch'.
    size: height and width of the images in pixels.
    cameras: indices; the first is `image`, the next `image_2`. None takes 0,
      or 2 for the quadruped, whose camera 0 does not follow it.
    seed: int or None, for the start states and whatever else is random.
    inputs, record: see `spaces.View`.
    detail: of images: 'full' as the suite draws them, 'low' (see `LOW_DETAIL`),
      or 'auto': low where OpenGL renders in software.

  Raises:
    TaskError: no such task, camera or observation, or TensorFlow lives in this
      process already.
    RenderError: OpenGL does not work.
  """

  def __init__(
    self,
    name,
    size=(64, 64),
    cameras=None,
    seed=None,
    inputs='image',
    record='state',
    detail='auto',
  ):
    check_name(name, DMC_TASKS, 'dmc_')
    renders = spaces.names_image(f'{inputs},{record}')
    if renders:
      opengl.refuse_tensorflow(f'dmc_{name}')
    if renders and detail != 'full':
      # Of Mesa; a small image of low detail gains nothing by threads.
      os.environ.setdefault('LP_NUM_THREADS', '0')
    domain, task = DMC_TASKS[name]
    self._size = tuple(size)
    suite = _import_suite(renders)
    # Models that are drawn at random (LQR's) are the same for all seeds.
    self._env = suite.load(domain, task, task_kwargs={'random': 0})
    self.reseed(seed)
    if not renders:
      _refuse_drawing(self._env.physics)
    cameras = cameras or [2 if domain == 'quadruped' else 0]
    self._cameras = {
      spaces.image_name(index): camera for index, camera in enumerate(cameras)
    }
    self._check_cameras(f'dmc_{name}')
    view = spaces.View(f'dmc_{name}', self._offers(), inputs, record)
    self._names, self.about = view.names, view.about
    self.observation_space = view.space
    self.action_space = self._action_space()
    if renders:
      try:
        self._set_detail(detail)
        self._images()
      except Exception as error:
        raise opengl.render_error(error) from error

  def reseed(self, seed):
    self._env.task.random.seed(seed)

  def reset(self):
    self._now = self._env.reset()
    return self.observe()

  def step(self, action):
    reward, done, info = self.advance(action)
    return self.observe(), reward, done, info

  def advance(self, action):
    """Steps like `step`, but spares the rendering; see `observe`."""
    action = spaces.check_action(action, self.action_space)
    self._now = now = self._env.step(action)
    discount = 1 if now.discount is None else now.discount
    info = {'discount': np.float32(discount)}
    return float(now.reward or 0), now.last(), info

  def observe(self):
    """Returns the observation of the present state."""
    vectors = {
      key: np.asarray(value, np.float32)
      for key, value in self._now.observation.items()
      if key in self._names
    }
    return {**self._images(), **vectors}

  def render(self, camera=None):
    """Returns the image of the present state, uint8 [*size, 3]."""
    camera = self._cameras['image'] if camera is None else camera
    return self._env.physics.render(*self._size, camera_id=camera)

  def close(self):
    self._env.close()

  def _set_detail(self, detail):
    """Before the first image, which fixes it."""
    view = self._env.physics.model.vis
    # The buffer's default, 640x480, costs time and changes no pixel.
    view.global_.offheight, view.global_.offwidth = self._size
    if detail == 'low' or (detail == 'auto' and renders_in_software()):
      for name, value in LOW_DETAIL.items():
        setattr(view.quality, name, value)

  def _images(self):
    return {
      name: self.render(camera)
      for name, camera in self._cameras.items()
      if name in self._names
    }

  def _check_cameras(self, task):
    count = self._env.physics.model.ncam
    for camera in self._cameras.values():
      if camera >= count:
        raise TaskError(
          f'--cameras {camera}: {task} has the cameras 0 to {count - 1}'
        )

  def _offers(self):
    size = 'x'.join(map(str, self._size))
    image = spaces.image_space(self._size)
    offers = {
      name: spaces.Offer(image, f'camera {camera}, {size}')
      for name, camera in self._cameras.items()
    }
    for key, spec in self._env.observation_spec().items():
      space = gym.spaces.Box(-np.inf, np.inf, spec.shape, np.float32)
      offers[key] = spaces.Offer(space, f'{key} {list(spec.shape)}')
    return offers

  def _action_space(self):
    spec = self._env.action_spec()
    low = np.broadcast_to(spec.minimum, spec.shape).astype(np.float32)
    high = np.broadcast_to(spec.maximum, spec.shape).astype(np.float32)
    return gym.spaces.Box(low, high, dtype=np.float32)


# Software spends most of an image's time on a shadow map of 2048x2048 and
# on spheres of 16 stacks (docs/performance.md).
LOW_DETAIL = dict(shadowsize=512, numstacks=6)


@functools.cache
def renders_in_software():
  """Whether OpenGL draws on the CPU, by what it calls itself."""
  from dm_control import _render
  from OpenGL import GL

  renderer = _render.Renderer(1, 1)
  try:
    with renderer.make_current() as context:
      name = context.call(GL.glGetString, GL.GL_RENDERER).decode().lower()
  finally:
    renderer.free()
  words = 'llvmpipe', 'softpipe', 'swrast', 'software', 'swr'
  return any(word in name for word in words)


def _refuse_drawing(physics):
  """Lets a task see that nothing is drawn, where it would draw at a reset."""
  physics.__class__ = type('Physics', (type(physics),), dict(contexts=None))


def _import_suite(renders):
  """Imports dm_control, telling trouble with OpenGL from all other trouble."""
  if importlib.util.find_spec('dm_control') is None:
    raise ImportError(
      'This task needs dm_control: pip install -r requirements.txt, and on '
      'Python 3.13 also pip install --no-deps dm-control (see README.md).'
    )
  changes = {}
  if not renders and 'dm_control' not in sys.modules:
    changes.update(MUJOCO_GL='disabled')  # or dm_control loads OpenGL
  with opengl.graphics_errors(), opengl.changed_variables(**changes):
    from dm_control import suite

  return suite
