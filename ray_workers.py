"""Workers that are Ray actors, for `--parallel ray` (see workers.py).

Ray is optional: this module is imported only where it is asked for, and by
the actors themselves.
"""

import collections
import concurrent.futures
import contextlib
import functools
import io
import math
import os
import pickle
import signal
import sys
import time
import weakref

import cloudpickle

import ray_cluster
from worker_calls import (
  Output,
  RenderError,
  WorkerError,
  WorkerLost,
  attempt,
  call_limit,
  describe,
  leave_signals,
  resolve,
  start_limit,
)
from worker_process import ONE_THREAD, construct, own_modules


class RayWorker:
  """Runs an environment in a Ray actor, which may be on another host.

  The folders of the code and of the packages have the same paths there. What
  hangs in Python is stopped by the actor itself, which says where (`_Served`);
  what hangs deeper is killed from here, a little later.
  """

  PLACING = 60  # seconds, or the timeout if that is longer
  GRACE = 2  # seconds for an actor to say where it hangs, or to close

  def __init__(self, constructor, timeout, start_timeout, output):
    self._order = cloudpickle.dumps(constructor)
    self._limits = call_limit(timeout), start_limit(start_timeout)
    self._output = output
    self._pending = collections.deque()
    self._ray = ray_cluster.connect()
    self._head = ray_cluster.head(self._ray.get_runtime_context().gcs_address)
    chosen = os.environ.get('MUJOCO_GL')
    self._fallback = None if chosen else 'osmesa'
    self._launch(chosen or 'egl')

  def _launch(self, renderer):
    """Starts an actor; nothing waits for it here."""
    self._head.wait()
    self._cpus = 0 if ray_cluster.is_own(self._ray) else 1
    actor = self._ray.remote(_actor_class()).options(
      num_cpus=self._cpus,
      runtime_env={'env_vars': {**ONE_THREAD, 'MUJOCO_GL': renderer}},
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
      self,
      _end_actor,
      self._ray,
      self._head,
      self._actor,
      self._ready,
      self._pending,
      self._limits[0].seconds or 60,
      self._output,
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

  def begin_close(self):
    pass

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
    return resolve(future.result())

  def _receive(self, coming, limit):
    """Returns an answer of the actor, or one for an actor that gives none."""
    try:
      seconds = limit.seconds + self.GRACE if limit.seconds else math.inf
      answer, printed = pickle.loads(self._watch(coming, seconds))
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

  def _watch(self, coming, seconds):
    """The result of a future of Ray; raises TimeoutError, and `Head.check`."""
    end = time.monotonic() + seconds
    while True:
      self._head.check()
      left = max(0, end - time.monotonic())
      try:
        return coming.result(min(left, ray_cluster.Head.EVERY))
      except TimeoutError:
        if not left:
          raise

  def _last_output(self):
    """What a dead actor wrote to standard error, if that was on this host."""
    if not self._log.done() or self._log.exception():
      return b''
    with contextlib.suppress(OSError), open(self._log.result(), 'rb') as log:
      log.seek(max(0, os.fstat(log.fileno()).st_size - Output.TAIL))
      return log.read()
    return b''

  def _wait_for_place(self):
    """Raises WorkerError if the cluster has no room for the actor."""
    seconds = max(self.PLACING, self._limits[0].seconds)
    try:
      self._log.exception(seconds)  # errors come with the other answers, too
    except TimeoutError:
      self._end()
      total = self._ray.cluster_resources().get('CPU', 0)
      free = self._ray.available_resources().get('CPU', 0)
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


def _end_actor(ray, head, actor, ready, pending, timeout, output):
  """Ends an actor: kindly, or by force if it has not begun or is stuck.

  The environment's `close` may take as long as a step.
  """
  if not (ray.is_initialized() and head.answers):
    return  # it ends with the connection
  if ready.done():
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
      closing = actor.call.remote('close', pickle.dumps(()))
      grace = RayWorker.GRACE
      waiting = [coming for coming, *_ in pending]
      stuck = concurrent.futures.wait(waiting, grace).not_done
      answer = closing.future().result(0 if stuck else timeout + grace)
      (closed, failure), printed = pickle.loads(answer)
      output.write(printed if closed else printed + failure[-1].encode())
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

  Answers are pickled pairs: one of `attempt`, and what was printed since the
  last.

  Args:
    order: the pickled constructor.
    folder: where the user is.
    timeout, start_timeout: seconds for a call, and for the constructor.
  """

  def __init__(self, order, folder, timeout, start_timeout):
    leave_signals()
    signal.signal(signal.SIGALRM, self._give_up)
    self._limits = call_limit(timeout), start_limit(start_timeout)
    self._order = io.BytesIO(order), folder
    self._printed = [_Printed(number) for number in (1, 2)]

  def about(self):
    return self._answer(self._construct, self._limits[1])

  def _construct(self):
    self._env = construct(*self._order)
    return describe(self._env)

  def call(self, method, args):
    args = pickle.loads(args)
    return self._answer(
      lambda: getattr(self._env, method)(*args), self._limits[0]
    )

  def _answer(self, function, limit):
    answer = attempt(self._limited, function, limit)
    printed = b''.join(stream.read() for stream in self._printed)
    with own_modules():
      packed, result = attempt(pickle.dumps, (answer, printed))
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
