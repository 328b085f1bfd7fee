"""Imports TensorFlow quietly; to be imported before anything that needs it."""

import contextlib
import gc
import os

import cli


@contextlib.contextmanager
def _uncollected():
  """Imports without garbage collection; later collections skip what they made.

  The many objects of TensorFlow and Keras live as long as the process anyway.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    gc.freeze()
    if enabled:
      gc.enable()


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # counts when it loads
os.environ['KERAS_BACKEND'] = 'tensorflow'  # whatever keras.json says
with cli.quiet_stderr(), cli.interruptible(), _uncollected():
  import keras
  import tensorflow  # noqa: ICN001, F401
  import tensorflow_probability  # noqa: F401

if keras.config.backend() != 'tensorflow':  # chosen by who imported it before
  raise cli.UserError(
    f'Keras was loaded with the backend {keras.config.backend()}, and Dreamer '
    'needs tensorflow: import it before keras, or set KERAS_BACKEND=tensorflow'
  )
