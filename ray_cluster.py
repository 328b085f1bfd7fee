"""Ray on this host or on a cluster: started, connected to, watched.

Ray is optional: it is imported only where it is asked for.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from cli import SIGNALS, quiet_stderr
from worker_calls import TaskError, WorkersLost


def require_ray():
  if importlib.util.find_spec('ray') is None:
    raise TaskError("--parallel ray needs Ray: pip install '.[sweep]'.")


def connect():
  """Returns the module ray, connected to a cluster.

  That is the one that this process uses already, or that of RAY_ADDRESS, or
  one that this process starts for itself.
  """
  require_ray()
  if 'ray' in sys.modules and sys.modules['ray'].is_initialized():
    return sys.modules['ray']
  address = os.environ.get('RAY_ADDRESS', 'local')
  where = f'Ray at RAY_ADDRESS={address}'
  if address in ('', 'local'):
    where, address = 'a Ray of its own', _own_ray()
  # Else it ends this process after 60 seconds without its head (see `Head`).
  os.environ.setdefault('RAY_gcs_rpc_server_reconnect_timeout_s', '600')
  import ray

  logging.getLogger('ray').setLevel(logging.ERROR)
  quiet_errors(ray)
  ended = queue.SimpleQueue()

  def attempt():
    error = None
    try:
      reach(address)
      ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except BaseException as caught:
      error = caught
    ended.put(error)

  # In another thread Ray leaves the handlers of signals as they are, and these
  # need not wait for it.
  with quiet_stderr():
    threading.Thread(target=attempt, daemon=True).start()
    error = ended.get()
  if error:
    raise TaskError(f'Cannot connect to {where}: {error}') from error
  # Its C++ has handlers, too, which would abort this process after 3 seconds.
  for number in SIGNALS:
    with contextlib.suppress(ValueError):  # not in the main thread
      signal.signal(number, signal.getsignal(number))
  return ray


def quiet_errors(ray):
  """Ray prints what it hears of dead workers, which come as errors anyway."""
  ray._private.worker.listen_error_messages = lambda *args: None


def reach(address):
  """OSError where nobody listens at a cluster's address.

  Ray itself would try for minutes.
  """
  if address == 'auto':  # the one that `ray start` began here last
    with contextlib.suppress(Exception):  # no part of Ray's interface
      from ray._private import services

      address = services.canonicalize_bootstrap_address('auto') or ''
  host, _, port = address.rpartition(':')
  if host and port.isdigit() and '/' not in host:
    socket.create_connection((host.strip('[]'), int(port)), timeout=20).close()


def is_own(ray):
  own = _own_ray.cache_info().currsize and _own_ray()
  return ray.get_runtime_context().gcs_address == own


# Ends with the trainer, however that ends, because its input does.
_RAY_CODE = """
import json, shutil, signal, sys, tempfile
import ray
folder = tempfile.mkdtemp(prefix='ray-', dir='/tmp')
try:
  ray.init(
    'local', include_dashboard=False, log_to_driver=False, _temp_dir=folder,
    **json.loads(sys.argv[1]),
  )
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or the folder would stay
  print('address', ray.get_runtime_context().gcs_address, flush=True)
  sys.stdin.read()
finally:
  ray.shutdown()
  shutil.rmtree(folder, ignore_errors=True)
"""


@functools.cache
def _own_ray():
  """The address of a Ray for environments alone, which need no CPUs of it."""
  return start_ray(num_cpus=0, num_gpus=0, object_store_memory=100 * 2**20)


def start_ray(**options):
  """Starts a Ray on this host, for this process alone; returns its address.

  It lives in a session of its own: Ctrl-C in a terminal, or a signal to all
  processes of a job, is for the trainer, which ends Ray when it has saved.

  Args:
    **options: of `ray.init`.
  """
  log = tempfile.TemporaryFile()
  # Ray reads these when it is imported, here and there. The token keeps other
  # users of the network out.
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  os.environ.setdefault('RAY_AUTH_MODE', 'token')
  if 'RAY_AUTH_TOKEN_PATH' not in os.environ:
    os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
  if 'ray' in sys.modules:
    with contextlib.suppress(ImportError):  # Ray < 2.52 knows no tokens
      from ray._raylet import AuthenticationTokenLoader, Config

      Config.initialize('')
      AuthenticationTokenLoader.instance().reset_cache()
  keeper = subprocess.Popen(
    [sys.executable, '-P', '-c', _RAY_CODE, json.dumps(options)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=log,
    start_new_session=True,
  )
  for line in keeper.stdout:  # others are notices
    if line.startswith(b'address '):
      atexit.register(_end_own_ray, keeper)
      return line.decode().split()[1]
  keeper.wait()
  log.seek(0)
  said = log.read().decode(errors='replace').split('\n')
  last = next((line for line in reversed(said) if line.strip()), 'no word')
  raise TaskError(f'Ray does not start: {last.strip()} (is /tmp full?)')


def _end_own_ray(keeper):
  import ray

  ray.shutdown()
  keeper.stdin.close()
  with contextlib.suppress(subprocess.TimeoutExpired):
    keeper.wait(10)


class Head:
  """The head of a Ray cluster, without which nothing new begins there.

  Ray ends this process when it has not heard of the head for long, so the run
  must end, and be saved, before.

  Args:
    address: host and port.
  """

  EVERY = 5  # seconds between looks
  PATIENCE = 20  # seconds without an answer

  def __init__(self, address):
    self._address = address
    self._next = 0.0
    self._silent = None  # since when

  def check(self):
    """Looks, if it is time to; WorkersLost: it has been silent for too long."""
    now = time.monotonic()
    if now < self._next:
      return
    self._next = now + self.EVERY
    host, port = self._address.rsplit(':', 1)
    try:
      socket.create_connection((host, port), timeout=self.EVERY).close()
      self._silent = None
    except OSError as error:
      self._silent = self._silent or now
      if now - self._silent >= self.PATIENCE:
        raise WorkersLost(
          f'Ray at {self._address} does not answer any more: {error}'
        ) from None

  def wait(self):
    """Returns when it answers; raises as `check`."""
    self._next = 0.0
    self.check()
    while not self.answers:
      time.sleep(1)
      self.check()

  @property
  def answers(self):
    return self._silent is None


head = functools.cache(Head)
