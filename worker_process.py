"""A worker that is a process: what the caller holds, and what the worker runs.

No TensorFlow here.
"""

import collections
import concurrent.futures
import contextlib
import faulthandler
import functools
import importlib.machinery
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from multiprocessing import connection as mp_connection

import cloudpickle

from cli import signal_name, warn
from worker_calls import (
  WorkerError,
  attempt,
  call_limit,
  describe,
  leave_signals,
  resolve,
  start_limit,
)


class ProcessWorker:
  """Runs an environment in a process of its own.

  This is not `multiprocessing.Process`, which would import the trainer's main
  module, and with it TensorFlow, into the worker.
  """

  def __init__(self, constructor, timeout, start_timeout, output):
    self._pending = collections.deque()
    self._timeout = timeout
    self._output = output
    self._connection, other = mp_connection.Pipe()
    # Standard input is a file, so that the worker can read it again if it has
    # to start over with another OpenGL.
    order = tempfile.TemporaryFile()
    with other, order:
      pickle.dump(sys.path, order)
      cloudpickle.dump(constructor, order)
      order.seek(0)
      self._process = _start_worker(other, order)
    self._reader = threading.Thread(
      target=output.follow, args=[self._process.stdout], daemon=True
    )
    self._reader.start()
    self._ready = self._expect(start_limit(start_timeout))
    self._ending = _Ending(
      self._process,
      self._connection,
      self._reader,
      self._ready,
      self._pending,
      output,
      limit=timeout or 60,
    )
    self._end = weakref.finalize(self, self._ending)

  def about(self):
    return self._wait(self._ready)

  def call(self, method, *args):
    if not self._end.alive:
      raise WorkerError('The environment is closed.')
    self._wait(self._ready)
    # A worker that died is noticed when the answer fails to come.
    with contextlib.suppress(OSError):
      self._connection.send((method, args))
    return functools.partial(
      self._wait, self._expect(call_limit(self._timeout))
    )

  def begin_close(self):
    """Asks the environment to close; `close` waits for it."""
    self._ending.ask()

  def close(self):
    self._end()

  def _expect(self, limit):
    future = concurrent.futures.Future()
    self._pending.append((future, limit))
    return future

  def _wait(self, future):
    """Takes answers, which come in the order of the calls, up to this one."""
    while not future.done():
      oldest, limit = self._pending[0]
      try:
        if self._listen(limit.seconds or None):
          answer = self._connection.recv()
        else:
          answer = self._kill(limit)
      except (EOFError, OSError):
        answer = self._obituary()
      self._pending.popleft()
      oldest.set_result(answer)
    return resolve(future.result())

  def _listen(self, seconds):
    """Waits for an answer; whether it came in time. EOFError: none will come.

    A worker that died is noticed though processes that it forked live on.
    """
    if not hasattr(os, 'pidfd_open') or self._process.returncode is not None:
      return self._connection.poll(seconds)
    try:
      death = os.pidfd_open(self._process.pid)
    except OSError:  # an older kernel, or a container that forbids it
      return self._connection.poll(seconds)
    try:
      ready = mp_connection.wait([self._connection, death], seconds)
    finally:
      os.close(death)
    if ready == [death] and not self._connection.poll():
      raise EOFError
    return bool(ready)

  def _kill(self, limit):
    """Ends a worker that hangs, and returns its answer."""
    self._process.send_signal(signal.SIGABRT)  # it prints where it is
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(2)
    _kill_group(self._process)
    return self._obituary(str(limit))

  def _obituary(self, cause=None):
    """Returns what stands for the answer of a worker that has ended."""
    if not self._end.alive:
      return False, ('', 'The environment is closed.', '')
    cause = cause or self._cause()
    self._reader.join(2)  # for its last words
    return self._output.lost(cause)

  def _cause(self):
    """How the worker ended, in words."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(5)
    code = self._process.returncode
    if code == -signal.SIGSEGV:
      return (
        'was killed by signal SIGSEGV (so ends OpenGL in software beside '
        'TensorFlow: does what makes the environment import that?)'
      )
    if code is not None and code < 0:
      return f'was killed by signal {signal_name(-code)}'
    return f'ended with exit code {code}'


# --- The worker's side -------------------------------------------------------

# The trainer has the cores; several workers with a pool each would only stand
# in each other's way.
ONE_THREAD = {f'{x}_NUM_THREADS': '1' for x in ('OMP', 'OPENBLAS', 'MKL')}

_WORKER_CODE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from {module} import _work
_work(*sys.argv[1:])
"""


def _worker_command(handle, trainer, fallback):
  code = _WORKER_CODE.format(module=__name__)
  words = map(str, (handle, trainer, fallback))
  # -P: without the current folder, whose files may have names of Python's.
  return [sys.executable, '-u', '-P', '-c', code, *words]


def _start_worker(connection, order):
  env = {**os.environ, **ONE_THREAD}
  fallback = ''
  if not env.get('MUJOCO_GL'):
    env['MUJOCO_GL'], fallback = 'egl', 'osmesa'
  return subprocess.Popen(
    _worker_command(connection.fileno(), os.getpid(), fallback),
    stdin=order,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=env,
    pass_fds=[connection.fileno()],
    # Ctrl-C in a terminal is for the trainer alone.
    start_new_session=True,
  )


def _kill_group(process):
  """Ends a worker, and what its environment has started and left."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


class _Ending:
  """Ends a worker process: kindly, or by force if it is stuck or not begun.

  The environment's `close` may take as long as a step. This holds nothing of
  the `ProcessWorker`, which may be gone.

  Args:
    process, connection, reader: the worker, the way to it, and the thread that
      follows what it prints.
    ready: future of its first answer.
    pending: its calls whose answers nobody has taken yet.
    output: `worker_calls.Output`, which says in the log if it was killed.
    limit: seconds that `close` may take.
  """

  def __init__(
    self, process, connection, reader, ready, pending, output, limit
  ):
    self._process, self._connection = process, connection
    self._reader, self._output = reader, output
    self._ready, self._pending = ready, pending
    self._limit, self._deadline = limit, None

  def ask(self):
    """Asks the worker to end; waits for nothing."""
    if self._deadline is None:
      self._deadline = time.monotonic() + self._limit
      with contextlib.suppress(OSError):
        self._connection.send(None)

  def __call__(self):
    self.ask()
    failure = ''
    try:
      if self._ready.done():
        failure = self._wait()
    finally:  # a signal may have ended the wait
      _kill_group(self._process)
      self._process.wait()
      self._connection.close()
      self._reader.join(2)
      if failure:
        self._output.write(f'The worker was killed: {failure}.\n'.encode())

  def _wait(self):
    """Waits until the worker has ended; why it is to be killed, else ''."""
    if not self._takes_answers():
      return 'a step was under way, so there was no close()'
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(2)
      return ''
    left = max(0, self._deadline - time.monotonic())
    warn(f'waiting for the close() of an environment, {left:.0f} s at most')
    try:
      self._process.wait(left)
      return ''
    except subprocess.TimeoutExpired:
      return 'close() took too long'

  def _takes_answers(self):
    """Takes answers that nobody waits for; whether they come, 2 s for each."""
    try:
      for _ in self._pending:
        if not self._connection.poll(2):
          return False
        self._connection.recv_bytes()
    except (EOFError, OSError):
      pass  # it has ended
    return True


def _work(handle, trainer, fallback):
  """Main function of a worker process.

  Args:
    handle: file descriptor of the connection to the trainer, as text.
    trainer: number of its process, as text.
    fallback: value of MUJOCO_GL to start over with if rendering fails, or ''.
  """
  leave_signals()
  faulthandler.enable()  # prints a traceback when it crashes or is aborted
  threading.Thread(target=_follow, args=[int(trainer)], daemon=True).start()
  environment = dict(os.environ)
  connection = mp_connection.Connection(int(handle))
  success, env = attempt(construct, sys.stdin.buffer, os.getcwd())
  if not success and env[0] == 'RenderError' and fallback:
    environment['MUJOCO_GL'] = fallback
    os.lseek(0, 0, os.SEEK_SET)
    command = _worker_command(handle, trainer, '')
    os.execve(command[0], command, environment)
  gone = True  # the trainer, killed perhaps, when the connection breaks
  with contextlib.suppress(EOFError, OSError):
    if success:
      try:
        _send(connection, (True, describe(env)))
        _serve(connection, env)
      finally:
        closed, failure = attempt(env.close)
        if not closed:
          print(failure[-1], file=sys.stderr)
    else:
      _send(connection, (False, env))
    gone = False
  if gone:  # it ends nothing that the environment has left
    _end_group()
  # Without the interpreter's clean-up, in which OpenGL libraries complain.
  os._exit(0)


def _follow(trainer):
  """Ends a worker that hangs where its trainer was killed."""
  while os.getppid() == trainer:
    time.sleep(1)
  time.sleep(5)  # for `close`
  _end_group()


def _end_group():
  """Ends this worker, with what its environment has started and left."""
  os.killpg(os.getpid(), signal.SIGKILL)


def construct(order, folder):
  """Makes the environment that a pickled constructor in a file makes."""
  _leave_out_agent()
  constructor = pickle.load(order)
  _make_way(folder)
  return constructor()


def _serve(connection, env):
  while (request := connection.recv()) is not None:
    method, args = request
    answer = attempt(getattr(env, method), *args)
    sent, failure = attempt(_send, connection, answer)
    if not sent:
      _send(connection, (False, failure))


def _send(connection, answer):
  with own_modules():
    connection.send(answer)


# --- Modules of the user ----------------------------------------------------

FOLDER = os.path.dirname(os.path.abspath(__file__))  # of our modules


class _Agent(types.ModuleType):
  """`dreamer` in a worker, which has no agent: names without what they do."""

  def __getattr__(self, name):
    if name.startswith('__'):
      raise AttributeError(name)
    return type(name, (), dict(__init__=_refuse))


def _refuse(self, *_, **__):
  raise RuntimeError(
    f'dreamer.{type(self).__name__} is used in the process of an environment, '
    'which has no agent.'
  )


def _leave_out_agent():
  """The module that makes an environment may also train on it.

  What it imports would bring TensorFlow along.
  """
  if 'dreamer' in sys.modules:
    return
  spec = importlib.util.find_spec('dreamer')
  if spec and spec.origin == os.path.join(FOLDER, 'dreamer.py'):
    sys.modules['dreamer'] = _Agent('dreamer')


# Modules of ours that workers load; the user's may have the same names.
# fmt: off
OWN = (
  'atari_env', 'cli', 'dmc_env', 'episode_files', 'file_io', 'gym_env',
  'gym_make', 'gym_spaces', 'lab_env', 'opengl', 'ray_cluster', 'ray_workers',
  'replay', 'spaces', 'suites', 'toys', 'worker_calls', 'worker_process',
  'workers', 'wrappers',
)
# fmt: on
_hidden = {}  # those of them whose names the user has taken


def _make_way(folder):
  """From here on, the user's modules go before ours of the same name.

  Args:
    folder: where the user is; modules are found there, too.
  """
  rest = [p for p in map(os.path.abspath, sys.path) if p != FOLDER]
  if folder not in (FOLDER, *rest):
    rest.insert(0, folder)
  sys.path[:] = [*rest, FOLDER]
  for name in OWN:
    if importlib.machinery.PathFinder.find_spec(name, rest):
      _hidden[name] = sys.modules.pop(name, None) or _hidden.get(name)


@contextlib.contextmanager
def own_modules():
  """Puts our modules back under their names, for pickles of what they hold."""
  theirs = {name: sys.modules.get(name) for name in _hidden}
  sys.modules.update({k: v for k, v in _hidden.items() if v})
  try:
    yield
  finally:
    for name, module in theirs.items():
      if module:
        sys.modules[name] = module
      else:
        sys.modules.pop(name, None)
