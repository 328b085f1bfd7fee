"""Workers that environments live in: processes, threads, Ray actors.

    Async(constructor, 'process')

         caller                                 worker
    reset, step(action)  -- order (pipe, Ray) -->  env.reset, env.step
    promise              <- answer --------------  result, or error as text

TensorFlow and Mesa's software OpenGL crash in one process, so workers import
what makes the environment, and never TensorFlow. Nor does this module.
"""

import concurrent.futures
import functools

import spaces
from worker_calls import (
  Output,
  TaskError,
  WorkerError,
  attempt,
  describe,
  resolve,
)
from worker_process import ProcessWorker


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

  The environment of a replaced worker must show and take what that of the first
  did, see `spaces.outline`; else every use but `step` raises TaskError.
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
    self._outline = None
    self._worker = self._start()

  def _start(self):
    start = STRATEGIES[self._strategy]
    return start(self._constructor, *self._limits, Output(*self._log))

  def restart(self):
    """Replaces the worker."""
    self._worker.close()
    self._worker = self._start()

  def expect(self, outline):
    """Refuses environments with another `spaces.outline` than this."""
    self._outline = outline

  def _checked_about(self):
    """What the environment says of itself, if it is like the first."""
    about = self._worker.about()
    outline = spaces.outline(*about[:2])
    self._outline = self._outline or outline
    if outline != self._outline:
      raise TaskError(
        f'environment {self._log[1]} shows and takes '
        f'{outline}, and the first of this run {self._outline}: all must be '
        'alike, made again and for evaluations too'
      )
    return about

  @property
  def observation_space(self):
    return self._checked_about()[0]

  @property
  def action_space(self):
    return self._checked_about()[1]

  @property
  def about(self):
    """What the environment says of itself, a list of sentences."""
    return self._checked_about()[2]

  def reset(self, blocking=True, number=None):
    """Returns obs, or without blocking a function without arguments for it.

    The `number` of the episode is for environments that take one.
    """
    self._checked_about()
    promise = self._worker.call('reset', *([] if number is None else [number]))
    return promise() if blocking else promise

  def step(self, action, blocking=True):
    """Returns obs, reward, done, info, or without blocking a promise of them.

    The promise is a function without arguments that waits for the answer.
    """
    promise = self._worker.call('step', action)
    return promise() if blocking else promise

  def begin_close(self):
    """As `close`, but waits for nothing; `close` is to follow.

    So several environments in processes close at the same time; others close
    one after the other, in `close`.
    """
    self._worker.begin_close()

  def close(self):
    """Closes the environment and ends the worker; may be called repeatedly."""
    self._worker.close()


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

  def begin_close(self):
    pass

  def close(self):
    if self._closed:
      return
    self._closed = True
    success, env = self._env.result()
    if success:
      self._executor.submit(attempt, env.close).result()
    self._executor.shutdown()


def _ray_worker(*args):
  import ray_workers  # optional

  return ray_workers.RayWorker(*args)


_thread = functools.partial(
  concurrent.futures.ThreadPoolExecutor, 1, 'environment'
)
# How workers are started, by --parallel: functions of constructor, timeout,
# start timeout and `Output`.
STRATEGIES = dict(
  process=ProcessWorker,
  thread=functools.partial(_LocalWorker, _thread),
  none=functools.partial(_LocalWorker, _Immediate),
  ray=_ray_worker,
)
