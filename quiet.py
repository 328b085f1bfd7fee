"""Imports TensorFlow quietly; to be imported before anything that needs it."""

import os
import signal
import threading

import cli

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # counts when it loads
main = threading.current_thread() is threading.main_thread()
if main:  # Ctrl-C while it loads ends the program, without a traceback
  handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
with cli.quiet_stderr():
  import keras  # noqa: F401
  import tensorflow  # noqa: ICN001, F401
  import tensorflow_probability  # noqa: F401
if main:
  signal.signal(signal.SIGINT, handler)
