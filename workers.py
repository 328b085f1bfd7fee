"""Workers that environments live in: processes, threads, Ray actors.

    Async(constructor, 'process')

         caller                                 worker
    reset, step(action)  -- order (pipe, Ray) -->  env.reset, env.step
    promise              <- answer --------------  result, or error as text

TensorFlow and Mesa's software OpenGL crash in one process, so workers import
what makes the environment, and never TensorFlow. Nor does this module.
"""

import collections
import concurrent.futures
import contextlib
import faulthandler
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import logging.handlers
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import typing
import weakref
from multiprocessing import connection as mp_connection

import cloudpickle

from cli import Failure, UserError
from cli import quiet_stderr as quiet_stderr


class TaskError(UserError):
  """A task name, or a way to run a task, that does not exist here."""


class RenderError(UserError):
  """OpenGL does not work; the message says what to install."""


class WorkerError(Failure):
  """An environment failed or its worker died.

  Attributes:
    traceback: text of the worker's traceback, or its last output if it died.
  """

  code = 2
  traceback = ''

  @property
  def detail(self):
    return self.traceback


class WorkerLost(WorkerError):  # noqa: N818 (says more than WorkerLostError)
  """A worker died or hangs; a fresh one may do better."""


class Wrapper:
  """Hands everything that a subclass does not define to the inner `env`."""

  def __init__(self, env):
    self._env = env

  def __getattr__(self, name):
    # Private names are not handed on: while a wrapper is being unpickled it
    # has no `_env` yet, and looking for it here would never end.
    if name.startswith('_'):
      raise AttributeError(name)
    return getattr(self._env, name)


class Async:
  """An environment that steps in a worker, while the caller does other things.

  With 'process' the worker is a fresh Python that imports what `constructor`
  needs and nothing of the caller's main module. Workers start while the caller
  goes on; the first use waits. If MUJOCO_GL is not set, they try EGL, then
  OSMesa. 'thread' uses a thread of this process; 'none' steps at once. 'ray' is
  like 'process', with workers that are Ray actors, on any host of the cluster
  that RAY_ADDRESS names, or on this one if it is not set.

  Args:
    constructor: makes the environment; a function without arguments, which
      must pickle (as cloudpickle does) for 'process' and 'ray':
      `partial(make_task, 'toy_reach')`.
    strategy: 'process', 'thread', 'none' or 'ray'.
    timeout: seconds that a caller waits for a reset or step, until the process
      is killed; 0 waits for ever.
    start_timeout: seconds that it waits for the environment to be made.
    log: from `open_log`, for what the worker prints; None for no file.
    name: of the worker, in the log.

  Every use raises WorkerError if the environment failed and WorkerLost if its
  worker died or was killed, but TaskError and RenderError arrive as what they
  are. All of them carry the worker's traceback as text in `traceback`.
  """

  def __init__(
    self,
    constructor,
    strategy='process',
    timeout=0,
    start_timeout=0,
    log=None,
    name='worker',
  ):
    if strategy not in STRATEGIES:
      raise ValueError(
        f'Strategy {strategy!r} is not one of {", ".join(STRATEGIES)}.'
      )
    self._constructor, self._strategy = constructor, strategy
    self._limits = timeout, start_timeout
    self._log = log, name
    self._worker = self._start()

  def _start(self):
    start = STRATEGIES[self._strategy]
    return start(self._constructor, *self._limits, Output(*self._log))

  def restart(self):
    """Replaces the worker."""
    self._worker.close()
    self._worker = self._start()

  @property
  def observation_space(self):
    return self._worker.about()[0]

  @property
  def action_space(self):
    return self._worker.about()[1]

  @property
  def about(self):
    """What the environment says of itself, a list of sentences."""
    return self._worker.about()[2]

  def reset(self, blocking=True, number=None):
    """Returns obs, or without blocking a function without arguments for it.

    The `number` of the episode is for environments that take one.
    """
    promise = self._worker.call('reset', *([] if number is None else [number]))
    return promise() if blocking else promise

  def step(self, action, blocking=True):
    """Returns obs, reward, done, info, or without blocking a promise of them.

    The promise is a function without arguments that waits for the answer.
    """
    promise = self._worker.call('step', action)
    return promise() if blocking else promise

  def close(self):
    """Closes the environment and ends the worker; may be called repeatedly."""
    self._worker.close()


_KNOWN = (TaskError, RenderError, WorkerLost, WorkerError)


def fail(error):
  """A promise that is not kept."""
  raise error


def attempt(function, *args):
  """Returns (True, result), or (False, error as text) if `function` fails."""
  try:
    return True, function(*args)
  except Exception as error:
    kind = next((x.__name__ for x in _KNOWN if isinstance(error, x)), '')
    message = str(error) or type(error).__name__
    if not kind:
      message += f' ({type(error).__name__} in the environment)'
    return False, (kind, message, traceback.format_exc())


def resolve(answer):
  """Returns the result in an answer of `attempt`, or raises its error."""
  success, payload = answer
  if success:
    return payload
  kind, message, trace = payload
  classes = {x.__name__: x for x in _KNOWN}
  error = classes.get(kind, WorkerError)(message)
  error.traceback = trace
  error.add_note(f'In the environment worker:\n{trace}')
  raise error


def describe(env):
  return env.observation_space, env.action_space, getattr(env, 'about', [])


class _Immediate(concurrent.futures.Executor):
  """Runs what is submitted at once, in the caller's thread."""

  def submit(self, function, *args):
    future = concurrent.futures.Future()
    future.set_result(function(*args))
    return future


class _LocalWorker:
  """Runs an environment in an executor of this process, without limits."""

  def __init__(self, executor, constructor, *limits_and_output):
    self._executor = executor()
    self._env = self._executor.submit(attempt, constructor)
    self._closed = False

  def about(self):
    return describe(resolve(self._env.result()))

  def call(self, method, *args):
    if self._closed:
      raise WorkerError('The environment is closed.')
    env = resolve(self._env.result())
    future = self._executor.submit(attempt, getattr(env, method), *args)
    return lambda: resolve(future.result())

  def close(self):
    if self._closed:
      return
    self._closed = True
    success, env = self._env.result()
    if success:
      self._executor.submit(attempt, env.close).result()
    self._executor.shutdown()


class _Log(logging.handlers.RotatingFileHandler):
  """A log that does without what it cannot write, as on a full disk."""

  def handleError(self, record):  # noqa: N802 (the library's name)
    pass


def open_log(path):
  """A file for what workers print, of 2 MB at most: `path` and `path`.1."""
  log = _Log(path, maxBytes=10**6, backupCount=1, encoding='utf8', delay=True)
  log.setFormatter(logging.Formatter('%(asctime)s %(name)s: %(message)s'))
  return log


class Output:
  """What one worker prints: the end of it, and all of it in a log.

  Args:
    log: from `open_log`, which workers may share; None for no file.
    name: of the worker, for the log.
  """

  TAIL = 4000  # bytes
  LINE = 4000  # bytes of a line; longer ones are broken

  def __init__(self, log=None, name=''):
    self._log, self._name = log, name
    self._tail = self._line = b''

  def write(self, data):
    self._tail = (self._tail + data)[-self.TAIL :]
    *lines, self._line = (self._line + data).split(b'\n')
    if len(self._line) > self.LINE:
      lines, self._line = [*lines, self._line], b''
    for line in lines:
      for start in range(0, len(line) or 1, self.LINE):
        self._record(line[start : start + self.LINE])

  def follow(self, pipe):
    """Takes all that comes from a pipe, until its other end is closed."""
    with pipe:
      while data := pipe.read1(2**16):
        self.write(data)
    if self._line:
      self.write(b'\n')

  def _record(self, line):
    if self._log:
      text = line.decode(errors='replace')
      self._log.handle(logging.makeLogRecord(dict(name=self._name, msg=text)))

  def where(self):
    """A sentence that names the log, if there is one."""
    path = self._log and self._log.baseFilename
    return f' What workers print is in {path}.' if path else ''

  def lost(self, cause, tail=None):
    """The answer of a worker that can give none any more.

    Args:
      cause: how it ended, in words.
      tail: the last that it printed, if not what was written here.
    """
    tail = (self._tail if tail is None else tail).decode(errors='replace')
    message = f'The environment worker {cause}.{self.where()}'
    if tail.strip():
      message += f' Its last output:\n{tail.strip()}'
    return False, ('WorkerLost', message, tail.strip())


class _ProcessWorker:
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
    self._end = weakref.finalize(
      self,
      _end_worker,
      *(self._process, self._connection, self._ready, self._reader),
    )

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
        if self._connection.poll(limit.seconds or None):
          answer = self._connection.recv()
        else:
          answer = self._kill(limit)
      except (EOFError, OSError):
        answer = self._obituary()
      self._pending.popleft()
      oldest.set_result(answer)
    return resolve(future.result())

  def _kill(self, limit):
    """Ends a worker that hangs, and returns its answer."""
    self._process.send_signal(signal.SIGABRT)  # it prints where it is
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(2)
    self._process.kill()
    return self._obituary(str(limit))

  def _obituary(self, cause=None):
    """Returns the answer of a worker that can give none any more."""
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
    if code is not None and code < 0:
      return f'was killed by signal {signal.Signals(-code).name}'
    return f'ended with exit code {code}'


class Limit(typing.NamedTuple):
  """Seconds that an answer may take (0: any), and what to say after them."""

  seconds: float
  text: str

  def __str__(self):
    return self.text.format(self.seconds)


def call_limit(seconds):
  text = 'gave no answer for {:g} seconds, the limit of --worker_timeout'
  return Limit(seconds, text)


def start_limit(seconds):
  text = 'took more than {:g} seconds to start, the limit of --start_timeout'
  return Limit(seconds, text)


# The trainer has the cores; several workers with a pool each would only stand
# in each other's way.
ONE_THREAD = {f'{x}_NUM_THREADS': '1' for x in ('OMP', 'OPENBLAS', 'MKL')}

_WORKER_CODE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from {module} import _work
_work(*sys.argv[1:])
"""


def _worker_command(handle, fallback):
  code = _WORKER_CODE.format(module=__name__)
  return [sys.executable, '-u', '-c', code, str(handle), fallback]


def _start_worker(connection, order):
  env = {**os.environ, **ONE_THREAD}
  fallback = ''
  if not env.get('MUJOCO_GL'):
    env['MUJOCO_GL'], fallback = 'egl', 'osmesa'
  return subprocess.Popen(
    _worker_command(connection.fileno(), fallback),
    stdin=order,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=env,
    pass_fds=[connection.fileno()],
    # Ctrl-C in a terminal is for the trainer alone.
    start_new_session=True,
  )


def _end_worker(process, connection, ready, reader):
  """Ends a worker: kindly, or by force if it has not begun or is stuck."""
  with contextlib.suppress(OSError):
    connection.send(None)
  try:
    process.wait(2 if ready.done() else 0)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  connection.close()
  reader.join(2)


def _work(handle, fallback):
  """Main function of a worker process.

  Args:
    handle: file descriptor of the connection to the trainer, as text.
    fallback: value of MUJOCO_GL to start over with if rendering fails, or ''.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  faulthandler.enable()  # prints a traceback when it crashes or is aborted
  environment = dict(os.environ)
  connection = mp_connection.Connection(int(handle))
  success, env = attempt(construct, sys.stdin.buffer, os.getcwd())
  if not success and env[0] == 'RenderError' and fallback:
    environment['MUJOCO_GL'] = fallback
    os.lseek(0, 0, os.SEEK_SET)
    command = _worker_command(handle, '')
    os.execve(command[0], command, environment)
  # The trainer is gone, killed perhaps, when the connection breaks.
  with contextlib.suppress(EOFError, OSError):
    if success:
      _send(connection, (True, describe(env)))
      _serve(connection, env)
      env.close()
    else:
      _send(connection, (False, env))
  # Without the interpreter's clean-up, in which OpenGL libraries complain.
  os._exit(0)


def construct(order, folder):
  """Makes the environment that a pickled constructor in a file makes."""
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


def _ray_worker(*args):
  import ray_workers  # optional

  return ray_workers.RayWorker(*args)


_thread = functools.partial(
  concurrent.futures.ThreadPoolExecutor, 1, 'environment'
)
# How workers are started, by --parallel: functions of constructor, timeout,
# start timeout and `Output`.
STRATEGIES = dict(
  process=_ProcessWorker,
  thread=functools.partial(_LocalWorker, _thread),
  none=functools.partial(_LocalWorker, _Immediate),
  ray=_ray_worker,
)


# --- Modules of the user ----------------------------------------------------
# They may have the names of ours.

# Those that workers load.
# fmt: off
OWN = (
  'cli', 'episode_files', 'gym_env', 'ray_workers', 'replay', 'spaces',
  'suites', 'workers', 'wrappers',
)
# fmt: on
_hidden = {}  # those of them whose names the user has taken


def _make_way(folder):
  """From here on, the user's modules go before ours of the same name.

  Args:
    folder: where the user is; modules are found there, too.
  """
  own = os.path.dirname(os.path.abspath(__file__))
  rest = [p for p in map(os.path.abspath, sys.path) if p != own]
  if folder not in (own, *rest):
    rest.insert(0, folder)
  sys.path[:] = [*rest, own]
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
