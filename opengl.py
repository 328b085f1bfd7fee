"""What drawing with OpenGL asks of a process, and its errors. No TensorFlow."""

import contextlib
import os
import re
import sys
import traceback

from cli import UserError
from worker_calls import RenderError, TaskError


def refuse_tensorflow(task):
  """Raises TaskError where TensorFlow lives in this process."""
  if 'tensorflow' in sys.modules:
    raise TaskError(
      f'Task {task!r} may render with OpenGL, which crashes in one process '
      'with TensorFlow: use --parallel process.'
    )


# Files of packages that draw: dm_control, PyOpenGL, mujoco, Gymnasium.
_GRAPHICS = re.compile(
  r'/dm_control/_render/|/OpenGL/|/mujoco/(egl|glfw|osmesa)/'
  r'|/mujoco/(gl_context|mujoco_rendering)\.py$'
)


@contextlib.contextmanager
def graphics_errors():
  """Turns errors of OpenGL into a RenderError; others pass."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    if any(_GRAPHICS.search(frame.filename) for frame in frames):
      raise render_error(error) from error
    raise


@contextlib.contextmanager
def changed_variables(**changes):
  """Changes variables of the process, which workers inherit, for a while."""
  before = {name: os.environ.get(name) for name in changes}
  os.environ.update(changes)
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name)
      os.environ.update({} if value is None else {name: value})


def render_error(error):
  """A RenderError that says what to install."""
  chosen = os.environ.get('MUJOCO_GL') or 'unset'
  reason = str(error).strip().split('\n')[0].rstrip('.')
  reason = reason or type(error).__name__
  return RenderError(
    f'Cannot render with OpenGL (MUJOCO_GL is {chosen}): {reason}. '
    'Install the Debian packages libegl1, libopengl0, libgl1-mesa-dri and set '
    'MUJOCO_GL=egl, or install libosmesa6 and set MUJOCO_GL=osmesa. '
    'If MUJOCO_GL is not set, both are tried. What draws nothing works with '
    'MUJOCO_GL=disabled.'
  )
