"""Runs of dreamer.py on Ray: processes on its nodes, and who looks after them.

Ray is optional; sweep.py imports it.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from cli import UserError, leave_terminal, signal_name, take_signals
from ray_cluster import quiet_errors, reach, start_ray

ROOT = pathlib.Path(__file__).resolve().parent
FINISHED = 'sweep.json'  # in a logdir: the step at which its run finished
CPUS = 2  # of a run: the trainer's, and its environments'
GRACE = 300  # seconds that runs have for saving when they are stopped
POLL = 1  # seconds
ENDED = ('done', 'failed', 'refused', 'stopped')

# Starts dreamer.py so that it saves and ends when what asked for it is gone,
# however that ended: PR_SET_PDEATHSIG (1) lasts beyond exec. Ray blocks
# signals, and nohup ignores SIGHUP.
BOOT = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if sys.platform == 'linux':
  ctypes.CDLL(None).prctl(1, signal.SIGHUP)
if os.getppid() != int(sys.argv[1]):
  sys.exit('the process that started this run is gone')
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


# Ray would kill at once what a worker leaves behind.
KEPT = dict(env_vars={'RAY_kill_child_processes_on_worker_exit': '0'})


def say(line):
  print(line, flush=True)


# --- Running, on some node --------------------------------------------------


class Runner:
  """A Ray actor: keeps one run of dreamer.py, a process of its own."""

  def start(self, logdir, flags, folder, cpus, gpus):
    """Returns when the process is there, in `folder` if this host has it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('RAY_')}
    threads = str(max(1, int(cpus)))
    env.update(OMP_NUM_THREADS=threads, TF_NUM_INTRAOP_THREADS=threads)
    env.update(RAY_USAGE_STATS_ENABLED='0')
    env.pop('TF_CONFIG', None)  # a run is of one process
    if not gpus:
      env['CUDA_VISIBLE_DEVICES'] = ''
    self._logdir = logdir
    logdir.parent.mkdir(parents=True, exist_ok=True)
    self._out = logdir.with_name(f'{logdir.name}.out').open('a+b')
    self._begin = self._out.seek(0, os.SEEK_END)
    command = [sys.executable, str(ROOT / 'dreamer.py'), *flags]
    now = datetime.datetime.now().isoformat(' ', 'seconds')
    line = f'--- {now}, {socket.gethostname()}: {" ".join(command)}\n'
    self._out.write(line.encode())
    self._out.flush()
    self._process = subprocess.Popen(
      [command[0], '-P', '-c', BOOT, str(os.getpid()), *command[1:]],
      stdin=subprocess.DEVNULL,
      stdout=self._out,
      stderr=subprocess.STDOUT,
      cwd=folder if os.path.isdir(folder) else ROOT,
      env=env,
      start_new_session=True,  # Ctrl-C is for sweep.py, which asks runs to stop
    )

  def poll(self):
    """None while it runs, then (exit code, finished at step, last words)."""
    code = self._process.poll()
    if code is None:
      return None
    end = self._out.seek(0, os.SEEK_END)
    self._out.seek(max(self._begin, end - 2**16))
    text = self._out.read().decode(errors='replace')
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if line.startswith('dreamer.py: error:')]
    words = (errors or lines or ['it said nothing'])[-1]
    steps = re.findall(r'^Finished at step (\d+)', text, re.MULTILINE)
    if code or not steps:
      return code, None, words
    record = json.dumps(dict(step=int(steps[-1])))
    (self._logdir / FINISHED).write_text(record + '\n')
    return code, int(steps[-1]), words

  def signal(self, number):
    """SIGTERM: to save and stop. SIGKILL: its workers end by themselves."""
    with contextlib.suppress(ProcessLookupError):
      if number == signal.SIGKILL:
        os.killpg(self._process.pid, number)
      else:
        self._process.send_signal(number)


# --- Running all ------------------------------------------------------------


def import_ray():
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  os.environ.setdefault('RAY_worker_niceness', '0')  # runs inherit it
  os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
  try:
    import ray
    import rich  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"sweep.py needs Ray ({error}): pip install '.[sweep]'"
    ) from None
  return ray


def connect(ray, address):
  """Joins the cluster at an address, or starts one here."""
  address = '' if address in (None, 'local') else address
  quiet_errors(ray)
  try:
    reach(address)
    where = address or start_ray(
      object_store_memory=2**27, _node_ip_address='127.0.0.1'
    )
    ray.init(where, log_to_driver=False, logging_level='ERROR')
  except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
    error = getattr(error, 'strerror', None) or str(error).strip()
    first = error.partition('\n')[0]
    raise UserError(
      f'--address {address}: {first} (is it up? A cluster with tokens needs '
      'RAY_AUTH_MODE=token)'
      if address
      else f'Ray: {first}'
    ) from None


def resources(ray):
  """(CPUs, GPUs) of each node."""
  nodes = [node['Resources'] for node in ray.nodes() if node['Alive']]
  return [(node.get('CPU', 0), node.get('GPU', 0)) for node in nodes]


def places(ray, cpus, gpus):
  """How many runs there is room for at once."""
  return sum(
    min(room(c, cpus), room(g, gpus) if gpus else math.inf)
    for c, g in resources(ray)
  )


def room(have, each):
  """How many shares there are in what a node has."""
  return math.floor(have / each + 1e-9)  # 1.0 // 0.1 is 9


def share(ray, args):
  """(CPUs, GPUs) of a run; UserError where no node has them."""
  have, gpus = resources(ray), args.gpus_per_run
  if gpus is None:
    gpus = int(any(g >= 1 for _, g in have))
  most = max((c for c, g in have if g >= gpus), default=0)
  cpus = args.cpus_per_run or min(CPUS, max(1, most))
  if any(0 < n < 1e-4 for n in (cpus, gpus)) or gpus > max(1, int(gpus)):
    raise UserError(
      'Ray gives no less than 0.0001 of a CPU or GPU, and above one GPU whole '
      f'ones: not {cpus:g} CPUs (--cpus-per-run) and {gpus:g} GPUs '
      '(--gpus-per-run)'
    )
  if not places(ray, cpus, gpus):
    each = '; '.join(f'{c:g} CPUs, {g:g} GPUs' for c, g in have)
    raise UserError(
      f'a run is to have {cpus:g} CPUs and {gpus:g} GPUs (--cpus-per-run, '
      f'--gpus-per-run), and no node has that: there are {len(have)}, with '
      f'{each}'
    )
  return cpus, gpus


class Sweep:
  """Hands runs to Ray and looks after them.

  Args:
    ray: the module, connected to a cluster.
    runs: in the order in which they are to start.
    retries: how often one is tried again.
    cpus: of a run.
    gpus: of a run.
  """

  def __init__(self, ray, runs, retries, cpus, gpus):
    self._ray, self._runs, self._retries = ray, runs, retries
    self._share = cpus, gpus
    self._folder = os.getcwd()
    options = dict(num_cpus=cpus, num_gpus=gpus, runtime_env=KEPT)
    self._make = ray.remote(**options)(Runner).remote
    self._counted = 0  # signals but for SIGHUP, which comes with others
    self._wanted = 0  # 1: runs are to save and end, more: at once
    self._asked = 0  # signals that were passed on
    self._deadline = None

  def install(self):
    take_signals(self._handle)

  def _handle(self, number, frame):
    if number == signal.SIGHUP:
      leave_terminal()
    else:
      self._counted += 1
    self._wanted = max(self._wanted, self._counted, 1)

  def run(self, board):
    """Returns when all have ended; whether it was stopped before."""
    while True:
      self._obey()
      self._submit()
      self._listen()
      board.show()
      if all(run.state in ENDED for run in self._runs):
        return self._wanted > 0
      time.sleep(POLL)

  def _submit(self):
    """No more than there is room for: Ray does not keep their order."""
    room = places(self._ray, *self._share)
    room -= sum(run.actor is not None for run in self._runs)
    due = [run for run in self._runs if run.state == 'waiting']
    due = [run for run in due if not run.actor and run.after < time.monotonic()]
    for run in due[: max(0, room)]:
      run.actor = self._make()
      run.answer = run.actor.start.remote(
        run.logdir, run.flags, self._folder, *self._share
      )

  def _listen(self):
    """Takes the answers that are there."""
    waiting = {run.answer: run for run in self._runs if run.actor}
    if not waiting:
      return
    ready, _ = self._ray.wait(
      list(waiting), num_returns=len(waiting), timeout=0.1
    )
    for answer in ready:
      self._take(waiting[answer], answer)

  def _take(self, run, answer):
    errors = self._ray.exceptions
    try:
      result = self._ray.get(answer)
    except errors.ActorUnavailableError:
      result = None  # for now; when it is given up, the next error comes
    except errors.RayTaskError as error:
      self._again(run, str(error.cause))
      return
    except errors.RayError:
      self._again(run, 'its node or Ray worker was lost')
      return
    if result is None:
      run.state = 'running'
      run.answer = run.actor.poll.remote()
    else:
      self._end(run, *result)

  def _end(self, run, code, step, words):
    used = code == 2 and 'is in use' in words  # after a retry: as yet
    if code == 0 and step is not None:
      run.progress['step'] = step
      self._release(run, 'done')
    elif code == 2 and not (used and run.tries):
      self._release(run, 'refused', words.removeprefix('dreamer.py: error: '))
    elif code < 0:
      self._again(run, f'killed by {signal_name(-code)}')
    elif code == 0:
      self._again(run, 'stopped by another than sweep.py')
    else:
      self._again(run, words)

  def _again(self, run, why):
    if self._wanted:
      self._release(run, 'stopped')
    elif run.tries >= self._retries:
      self._release(run, 'failed', why)
    else:
      run.tries += 1
      run.after = time.monotonic() + min(60, 2**run.tries)
      self._release(run, 'waiting', f'retry {run.tries}: {why}')

  def _release(self, run, state, note=''):
    """Gives back what Ray reserved."""
    if run.actor:
      self._ray.kill(run.actor)
    run.actor = run.answer = None
    run.state, run.note = state, note

  def _obey(self):
    """Passes on a first signal as SIGTERM, later ones as SIGKILL."""
    if self._deadline and time.monotonic() > self._deadline:
      self._wanted = max(self._wanted, 2)
    if self._asked >= self._wanted:
      return
    number = signal.SIGTERM if self._wanted == 1 else signal.SIGKILL
    self._asked = self._wanted
    self._deadline = self._deadline or time.monotonic() + GRACE
    for run in self._runs:
      if run.state == 'running':
        run.actor.signal.remote(number)
      elif run.state not in ENDED:
        self._release(run, 'stopped')
    if number == signal.SIGTERM:
      say('Stopping: runs save and end. A second Ctrl-C kills them.')
