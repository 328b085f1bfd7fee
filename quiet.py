"""Imports TensorFlow quietly; to be imported before anything that needs it."""

import os

import cli

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # counts when it loads
with cli.quiet_stderr(), cli.interruptible():
  import keras  # noqa: F401
  import tensorflow  # noqa: ICN001, F401
  import tensorflow_probability  # noqa: F401
