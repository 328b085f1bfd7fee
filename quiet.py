"""Imports TensorFlow quietly; to be imported before anything that needs it."""

import contextlib
import gc
import os
import re
import sys
import tempfile
import warnings

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


def _check():
  """UserError for what these imports, or the first operation, would fail at."""
  if sys.flags.optimize > 1:
    raise cli.UserError(
      'TensorFlow does not load without docstrings: unset PYTHONOPTIMIZE, or '
      'set it to 1'
    )
  try:
    tempfile.gettempdir()
  except OSError:
    raise cli.UserError(
      'no folder for temporary files can be written: set TMPDIR to one that can'
    ) from None
  for name in 'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS':
    if re.fullmatch(r'\s*-\d+', os.environ.get(name, '')):
      raise cli.UserError(
        f'{name} is {os.environ[name]}: the number of threads is 1 or more, or '
        '0 for as many as there are cores'
      )


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # counts when it loads
os.environ['KERAS_BACKEND'] = 'tensorflow'  # whatever keras.json says
_check()
unwarned = warnings.catch_warnings(action='ignore')  # of -W error, errors
with cli.quiet_stderr(), unwarned, cli.interruptible(), _uncollected():
  import keras
  import tensorflow  # noqa: ICN001, F401
  import tensorflow_probability  # noqa: F401

if keras.config.backend() != 'tensorflow':  # chosen by who imported it before
  raise cli.UserError(
    f'Keras was loaded with the backend {keras.config.backend()}, and Dreamer '
    'needs tensorflow: import it before keras, or set KERAS_BACKEND=tensorflow'
  )
