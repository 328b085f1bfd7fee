"""Workers that environments live in: processes, threads, Ray actors.

    Async(constructor, 'process')

         caller                                 worker
    reset, step(action)  -- order (pipe, Ray) -->  env.reset, env.step
    promise              <- answer --------------  result, or error as text

TensorFlow and Mesa's software OpenGL crash in one process, so workers import
what makes the environment, and never TensorFlow. Nor does this module.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import faulthandler
import functools
import importlib
import importlib.machinery
import importlib.util
import io
import logging
import logging.handlers
import os
import pickle
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import typing
import weakref
from multiprocessing import connection as mp_connection

from cli import UserError

STRATEGIES = ('process', 'thread', 'none', 'ray')


class TaskError(UserError):
  """A task name, or a way to run a task, that does not exist here."""


class RenderError(RuntimeError):
  """OpenGL does not work; the message says what to install."""


class WorkerError(RuntimeError):
  """An environment failed or its worker died.

  Attributes:
    traceback: text of the worker's traceback, or its last output if it died.
  """

  traceback = ''


class WorkerLost(WorkerError):  # noqa: N818 (says more than WorkerLostError)
  """A worker died or hangs; a fresh one may do better."""


@contextlib.contextmanager
def quiet_stderr():
  """Drops what libraries write to standard error, from C++ too.

  For imports: gym prints a notice under NumPy 2, TensorFlow several lines
  before its log level counts. Exceptions pass.
  """
  sys.stderr.flush()
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


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
      must pickle for 'process' and 'ray': `partial(make_task, 'toy_reach')`.
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
      raise ValueError(f'Strategy {strategy!r} is not one of {STRATEGIES}.')
    self._constructor, self._strategy = constructor, strategy
    self._limits = timeout, start_timeout
    self._log = log, name
    self._number = None
    self._worker = self._start()

  def _start(self):
    remote = dict(process=_ProcessWorker, ray=_RayWorker)
    if self._strategy in remote:
      worker = remote[self._strategy]
      return worker(self._constructor, *self._limits, _Output(*self._log))
    if self._strategy == 'thread':
      executor = concurrent.futures.ThreadPoolExecutor(1, 'environment')
      return _LocalWorker(self._constructor, executor)
    return _LocalWorker(self._constructor, _Immediate())

  def number(self, number):
    """The next episode is this one (see `EpisodeSeeds`)."""
    self._number = number
    self._worker.call('number', number)()

  def restart(self):
    """Replaces the worker; episodes go on with the number after the last."""
    self._worker.close()
    self._worker = self._start()
    if self._number is not None:
      self._worker.call('number', self._number)

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

  def reset(self, blocking=True):
    """Returns obs, or without blocking a function without arguments for it."""
    if self._number is not None:
      self._number += 1
    promise = self._worker.call('reset')
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


def _attempt(function, *args):
  """Returns (True, result), or (False, error as text) if `function` fails."""
  try:
    return True, function(*args)
  except Exception as error:
    kind = next((x.__name__ for x in _KNOWN if isinstance(error, x)), '')
    message = str(error) or type(error).__name__
    if not kind:
      message += f' ({type(error).__name__} in the environment)'
    return False, (kind, message, traceback.format_exc())


def _resolve(answer):
  """Returns the result in an answer of `_attempt`, or raises its error."""
  success, payload = answer
  if success:
    return payload
  kind, message, trace = payload
  classes = {x.__name__: x for x in _KNOWN}
  error = classes.get(kind, WorkerError)(message)
  error.traceback = trace
  error.add_note(f'In the environment worker:\n{trace}')
  raise error


def _about(env):
  return env.observation_space, env.action_space, getattr(env, 'about', [])


class _Immediate(concurrent.futures.Executor):
  """Runs what is submitted at once, in the caller's thread."""

  def submit(self, function, *args):
    future = concurrent.futures.Future()
    future.set_result(function(*args))
    return future


class _LocalWorker:
  """Runs an environment in an executor of this process."""

  def __init__(self, constructor, executor):
    self._executor = executor
    self._env = executor.submit(_attempt, constructor)
    self._closed = False

  def about(self):
    return _about(_resolve(self._env.result()))

  def call(self, method, *args):
    if self._closed:
      raise WorkerError('The environment is closed.')
    env = _resolve(self._env.result())
    future = self._executor.submit(_attempt, getattr(env, method), *args)
    return lambda: _resolve(future.result())

  def close(self):
    if self._closed:
      return
    self._closed = True
    success, env = self._env.result()
    if success:
      self._executor.submit(_attempt, env.close).result()
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


class _Output:
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
      pickle.dump(constructor, order)
      order.seek(0)
      self._process = _start_worker(other, order)
    self._reader = threading.Thread(
      target=output.follow, args=[self._process.stdout], daemon=True
    )
    self._reader.start()
    self._ready = self._expect(_start_limit(start_timeout))
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
    return functools.partial(self._wait, self._expect(_limit(self._timeout)))

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
    return _resolve(future.result())

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


class _Limit(typing.NamedTuple):
  """Seconds that an answer may take (0: any), and what to say after them."""

  seconds: float
  text: str

  def __str__(self):
    return self.text.format(self.seconds)


def _limit(seconds):
  text = 'gave no answer for {:g} seconds, the limit of --worker_timeout'
  return _Limit(seconds, text)


def _start_limit(seconds):
  text = 'took more than {:g} seconds to start, the limit of --start_timeout'
  return _Limit(seconds, text)


# The trainer has the cores; several workers with a pool each would only stand
# in each other's way.
_ONE_THREAD = {f'{x}_NUM_THREADS': '1' for x in ('OMP', 'OPENBLAS', 'MKL')}

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
  env = {**os.environ, **_ONE_THREAD}
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
  success, env = _attempt(_construct, sys.stdin.buffer, os.getcwd())
  if not success and env[0] == 'RenderError' and fallback:
    environment['MUJOCO_GL'] = fallback
    os.lseek(0, 0, os.SEEK_SET)
    command = _worker_command(handle, '')
    os.execve(command[0], command, environment)
  # The trainer is gone, killed perhaps, when the connection breaks.
  with contextlib.suppress(EOFError, OSError):
    if success:
      _send(connection, (True, _about(env)))
      _serve(connection, env)
      env.close()
    else:
      _send(connection, (False, env))
  # Without the interpreter's clean-up, in which OpenGL libraries complain.
  os._exit(0)


def _construct(order, folder):
  """Makes the environment that a pickled constructor in a file makes."""
  constructor = pickle.load(order)
  _make_way(folder)
  return constructor()


def _serve(connection, env):
  while (request := connection.recv()) is not None:
    method, args = request
    answer = _attempt(getattr(env, method), *args)
    sent, failure = _attempt(_send, connection, answer)
    if not sent:
      _send(connection, (False, failure))


def _send(connection, answer):
  with _own_modules():
    connection.send(answer)


# --- Modules of the user ----------------------------------------------------
# They may have the names of ours.

OWN = ('cli', 'gym_env', 'spaces', 'workers', 'wrappers')  # that workers load
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
def _own_modules():
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


# --- Ray --------------------------------------------------------------------


class _RayWorker:
  """Runs an environment in a Ray actor, which may be on another host.

  The folders of the code and of the packages have the same paths there. What
  hangs in Python is stopped by the actor itself, which says where (`_Served`);
  what hangs deeper is killed from here, a little later.
  """

  PLACING = 60  # seconds, or the timeout if that is longer
  GRACE = 2  # seconds for an actor to say where it hangs, or to close

  def __init__(self, constructor, timeout, start_timeout, output):
    self._order = pickle.dumps(constructor)
    self._limits = _limit(timeout), _start_limit(start_timeout)
    self._output = output
    self._pending = collections.deque()
    self._ray = _connect_ray()
    chosen = os.environ.get('MUJOCO_GL')
    self._fallback = None if chosen else 'osmesa'
    self._launch(chosen or 'egl')

  def _launch(self, renderer):
    """Starts an actor; nothing waits for it here."""
    self._cpus = 0 if _is_own_ray(self._ray) else 1
    actor = self._ray.remote(_actor_class()).options(
      num_cpus=self._cpus,
      runtime_env={'env_vars': {**_ONE_THREAD, 'MUJOCO_GL': renderer}},
    )
    self._actor = actor.remote()
    self._log = self._actor.log.remote().future()  # its first answer
    path = [os.path.abspath(folder) for folder in sys.path]
    seconds = [limit.seconds for limit in self._limits]
    starting = self._actor.start.remote(
      path, __name__, self._order, os.getcwd(), *seconds
    )
    self._ready = self._expect(starting, self._limits[1])
    self._end = weakref.finalize(
      self, _end_actor, self._ray, self._actor, self._ready
    )

  def about(self):
    self._wait_for_place()
    try:
      return self._wait(self._ready)
    except RenderError:
      if not self._fallback:
        raise
    self._end()
    renderer, self._fallback = self._fallback, None
    self._launch(renderer)
    return self.about()

  def call(self, method, *args):
    if not self._end.alive:
      raise WorkerError('The environment is closed.')
    self.about()
    args = pickle.dumps(args)
    call = self._actor.call.remote(method, args)
    answer = self._expect(call, self._limits[0])
    return functools.partial(self._wait, answer)

  def close(self):
    self._end()

  def _expect(self, reference, limit):
    # Signal handlers may raise while a future is waited for, but not in
    # `ray.get`.
    future = concurrent.futures.Future()
    self._pending.append((reference.future(), future, limit))
    return future

  def _wait(self, future):
    """Takes answers, which come in the order of the calls, up to this one."""
    while not future.done():
      coming, oldest, limit = self._pending[0]
      answer = self._receive(coming, limit)
      oldest.set_result(answer)
      self._pending.popleft()
    return _resolve(future.result())

  def _receive(self, coming, limit):
    """Returns an answer of the actor, or one for an actor that gives none."""
    try:
      seconds = limit.seconds + self.GRACE if limit.seconds else None
      answer, printed = pickle.loads(coming.result(seconds))
      self._output.write(printed)
      success, payload = answer
      if not success and payload[0] == 'WorkerLost':
        kind, message, trace = payload
        payload = kind, message + self._output.where(), trace
      return success, payload
    except TimeoutError:
      self._ray.kill(self._actor)
      return self._output.lost(str(limit), self._last_output())
    except self._ray.exceptions.RayTaskError as error:  # no such code there
      trace = str(error)
      return False, ('', trace.splitlines()[-1], trace)
    except self._ray.exceptions.RayError as error:
      if not self._end.alive:
        return False, ('', 'The environment is closed.', '')
      cause = f'died: {_why_lost(error)}'
      return self._output.lost(cause, self._last_output())

  def _last_output(self):
    """What a dead actor wrote to standard error, if that was on this host."""
    if not self._log.done() or self._log.exception():
      return b''
    with contextlib.suppress(OSError), open(self._log.result(), 'rb') as log:
      log.seek(max(0, os.fstat(log.fileno()).st_size - _Output.TAIL))
      return log.read()
    return b''

  def _wait_for_place(self):
    """Raises WorkerError if the cluster has no room for the actor."""
    seconds = max(self.PLACING, self._limits[0].seconds)
    try:
      self._log.exception(seconds)  # errors come with the other answers, too
    except TimeoutError:
      self._end()
      total, free = (
        resources().get('CPU', 0)
        for resources in (
          self._ray.cluster_resources,
          self._ray.available_resources,
        )
      )
      raise WorkerError(
        f'Ray started no worker for an environment within {seconds:g} seconds. '
        f'Each environment, that of evaluations too, takes {self._cpus} CPU; '
        f'the cluster has {total:g}, {free:g} of them free. Use fewer --envs '
        'or a larger cluster.'
      ) from None


def _why_lost(error):
  """The part of Ray's message that says how an actor ended."""
  text = str(error).strip()
  text = text.rpartition('Worker exit detail: ')[2]
  return text.partition(' Some common causes')[0].splitlines()[-1].strip('. ')


def _end_actor(ray, actor, ready):
  """Ends an actor: kindly, or by force if it has not begun or is stuck."""
  if not ray.is_initialized():
    return  # it has ended with the connection
  if ready.done():
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
      closing = actor.call.remote('close', pickle.dumps(()))
      closing.future().result(_RayWorker.GRACE)
  ray.kill(actor)


def _actor_class():
  """Returns the class of the actors.

  It is made in a function so that Ray sends its code, not the name of this
  module, which the actor's process finds only when it knows the path.
  """

  class Environment:
    def log(self):
      import os

      return os.readlink('/proc/self/fd/2')

    def start(self, path, module, *args):
      import importlib
      import sys

      sys.path[:] = path + [x for x in sys.path if x not in path]
      self._served = importlib.import_module(module)._Served(*args)
      return self._served.about()

    def call(self, *args):
      return self._served.call(*args)

  return Environment


class _Served:
  """An environment in its actor.

  Answers are pickled pairs: one of `_attempt`, and what was printed since the
  last.

  Args:
    order: the pickled constructor.
    folder: where the user is.
    timeout, start_timeout: seconds for a call, and for the constructor.
  """

  def __init__(self, order, folder, timeout, start_timeout):
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, self._give_up)
    self._limits = _limit(timeout), _start_limit(start_timeout)
    self._order = io.BytesIO(order), folder
    self._printed = [_Printed(number) for number in (1, 2)]

  def about(self):
    return self._answer(self._construct, self._limits[1])

  def _construct(self):
    self._env = _construct(*self._order)
    return _about(self._env)

  def call(self, method, args):
    args = pickle.loads(args)
    return self._answer(
      lambda: getattr(self._env, method)(*args), self._limits[0]
    )

  def _answer(self, function, limit):
    answer = _attempt(self._limited, function, limit)
    printed = b''.join(stream.read() for stream in self._printed)
    with _own_modules():
      packed, result = _attempt(pickle.dumps, (answer, printed))
      return result if packed else pickle.dumps(((False, result), printed))

  def _limited(self, function, limit):
    self._limit = limit
    signal.setitimer(signal.ITIMER_REAL, limit.seconds)
    try:
      return function()
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)

  def _give_up(self, number, frame):
    raise WorkerLost(f'The environment worker {self._limit}.')


class _Printed:
  """What this process adds to the file behind a file descriptor."""

  MOST = 10_000  # bytes at a time; the last of them are kept

  def __init__(self, number):
    self._number = number
    self._place = os.fstat(number).st_size

  def read(self):
    """What is new there."""
    sys.stdout.flush()
    size = os.fstat(self._number).st_size
    start, self._place = max(self._place, size - self.MOST), size
    if start == size:
      return b''
    try:
      with open(f'/proc/self/fd/{self._number}', 'rb') as file:
        file.seek(start)
        return file.read(size - start)
    except OSError:
      return b''


def require_ray():
  if importlib.util.find_spec('ray') is None:
    raise TaskError("--parallel ray needs Ray: pip install '.[sweep]'.")


def _connect_ray():
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
  import ray

  logging.getLogger('ray').setLevel(logging.ERROR)
  # Ray prints what it hears of dead workers, which arrives as errors anyway.
  ray._private.worker.listen_error_messages = lambda *args: None

  def connect():
    if re.fullmatch(r'[^/]+:\d+', address):  # Ray itself tries for minutes
      socket.create_connection(address.rsplit(':', 1), timeout=20).close()
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)

  # In another thread Ray leaves the handlers of signals as they are.
  with concurrent.futures.ThreadPoolExecutor(1) as thread, quiet_stderr():
    error = thread.submit(connect).exception()
  if error:
    raise TaskError(f'Cannot connect to {where}: {error}') from error
  # Its C++ has handlers, too, which would abort this process after 3 seconds.
  for number in (signal.SIGINT, signal.SIGTERM):
    with contextlib.suppress(ValueError):  # not in the main thread
      signal.signal(number, signal.getsignal(number))
  return ray


def _is_own_ray(ray):
  own = _own_ray.cache_info().currsize and _own_ray()
  return ray.get_runtime_context().gcs_address == own


# Ends with the trainer, however that ends, because its input does.
_RAY_CODE = """
import shutil, sys, tempfile
import ray
folder = tempfile.mkdtemp(prefix='ray-', dir='/tmp')
try:
  ray.init(
    'local', num_cpus=0, num_gpus=0, include_dashboard=False,
    object_store_memory=100 * 2**20, log_to_driver=False, _temp_dir=folder,
  )
  print('address', ray.get_runtime_context().gcs_address, flush=True)
  sys.stdin.read()
finally:
  ray.shutdown()
  shutil.rmtree(folder, ignore_errors=True)
"""


@functools.cache
def _own_ray():
  """Starts a Ray on this host, for this process alone; returns its address.

  It lives in a session of its own: Ctrl-C in a terminal, or a signal to all
  processes of a job, is for the trainer, which ends Ray when it has saved.
  """
  log = tempfile.TemporaryFile()
  # Ray reads these when it is imported, here and there. The token keeps other
  # users of the network out.
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  os.environ.setdefault('RAY_AUTH_MODE', 'token')
  if 'RAY_AUTH_TOKEN_PATH' not in os.environ:
    os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
  keeper = subprocess.Popen(
    [sys.executable, '-c', _RAY_CODE],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=log,
    start_new_session=True,
  )
  for line in keeper.stdout:  # others are notices
    if line.startswith(b'address '):
      atexit.register(_end_own_ray, keeper)
      return line.decode().split()[1]
  log.seek(0)
  raise TaskError(f'Ray does not start: {log.read().decode()[-1000:]}')


def _end_own_ray(keeper):
  import ray

  ray.shutdown()
  keeper.stdin.close()
  with contextlib.suppress(subprocess.TimeoutExpired):
    keeper.wait(10)
