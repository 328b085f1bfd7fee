"""Replay: windows and batches of episodes, and the recording of them.

No TensorFlow here.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import pathlib

import numpy as np

import spaces
import worker_calls
import workers
from cli import UserError, warn
from episode_files import (
  EpisodeFile,
  OtherShape,
  count_episodes,
  episode_length,
  is_onehot,
  list_episodes,
)

SOURCE = '/source'  # key of a window's origin; no array's name begins so


class Replay:
  """The episodes of a folder, and windows drawn from them.

  Args:
    directory: folder of episode files; `rescan` looks for new ones.
    length: rows in a window; None for whole episodes.
    capacity: agent steps to draw from, the newest in episodes that are long
      enough; 0 for all.
    shapes: {key: shape of a row} that all episodes must have.
    repair: rename broken files to *.broken; else they stay, unused.
    onehot: whether all actions must be one-hot vectors.
  """

  def __init__(
    self,
    directory,
    length=None,
    capacity=0,
    shapes=None,
    repair=True,
    onehot=False,
  ):
    self._directory = pathlib.Path(directory)
    self._length = length
    self._capacity = capacity
    self._needs = shapes, onehot
    self._repair = repair
    self._unused = set()
    self._episodes = {}
    self._recent = []  # those that windows are drawn from
    self._changed = None

  def rescan(self):
    changed = self._directory.stat().st_mtime_ns
    if changed == self._changed:
      return
    self._changed = changed
    names = list_episodes(self._directory)
    names = [name for name in names if name not in self._unused]
    known = self._episodes
    self._episodes = {
      n: known.get(n) or EpisodeFile(self._directory / n, *self._needs)
      for n in names
    }
    self._recent, steps = [], 0
    for episode in reversed(self._episodes.values()):
      if self._capacity and steps >= self._capacity:
        break
      if episode.length >= (self._length or 1):
        self._recent.append(episode)
        steps += episode.length - 1
    self._recent.reverse()

  def check(self):
    """Sets aside files whose structure is broken, all at once.

    UserError if all that are whole are of another task.
    """
    self.rescan()
    broken = []
    for episode in list(self._episodes.values()):
      try:
        episode.check()
      except ValueError as error:
        broken.append((episode, error))
    others = [error for _, error in broken if isinstance(error, OtherShape)]
    if others and len(broken) == len(self._episodes):
      raise UserError(
        f'the episodes in {self._directory} are of another task: {others[0]}. '
        'Give the --task and flags that they were made with, or a new --logdir'
      )
    for episode, error in broken:
      self._set_aside(episode, error)

  def window(self, rng, balance=False):
    """One window: dictionary of arrays [length, ...], and where from, `SOURCE`.

    An episode is drawn uniformly, then a window of it: any that fits, the
    one that ends in the last row included. With `balance`, draws that do not
    fit count as the last window, so that ends of episodes come more often.
    """
    while True:
      if not self._recent:
        raise self._nothing()
      episode = self._recent[rng.integers(len(self._recent))]
      total = self._length or episode.length
      last = episode.length - total
      start = int(rng.integers((episode.length if balance else last) + 1))
      start = min(start, last)
      try:
        window = episode.read(start, start + total)
        return {**window, SOURCE: f'{episode.path.name}, row {start}'}
      except ValueError as error:
        self._set_aside(episode, error)

  def _nothing(self):
    longest = max([e.length for e in self._episodes.values()], default=0)
    if longest < 2:
      return UserError(
        f'learning needs episodes with actions, and there are none in '
        f'{self._directory}'
      )
    return UserError(
      f'batch_length {self._length} is longer than any episode in '
      f'{self._directory}: the longest has {longest} rows. '
      f'Choose --batch_length {longest} or less.'
    )

  def _set_aside(self, episode, error):
    if self._repair:
      target = episode.path.with_suffix('.npz.broken')
      with contextlib.suppress(FileNotFoundError):
        episode.path.rename(target)
      warn(f'set aside the broken episode {target}: {error}')
    else:
      self._unused.add(episode.path.name)
      warn(f'leaving out the broken episode {episode.path}: {error}')
    self._changed = None
    self.rescan()


def load_episodes(
  directory,
  rescan,
  length=None,
  balance=False,
  seed=0,
  capacity=0,
  start=0,
  shapes=None,
  stream=0,
  repair=True,
  onehot=False,
):
  """Yields windows of episodes for ever.

  Windows come in blocks of `rescan`, for each of which new episodes are
  looked for and a random stream is begun from (seed, block). So a reader
  that stopped after n blocks goes on with `start=n`.

  Args:
    directory: folder of episode files.
    rescan: windows in a block.
    length: rows in a window; None for whole episodes.
    balance: see `Replay.window`.
    seed, start: of the random stream.
    capacity: agent steps to draw from, the newest; 0 for all.
    shapes, repair, onehot: see `Replay`.
    stream: number of the reader, where several draw from one folder.

  Raises:
    UserError: no episode is long enough.
  """
  replay = Replay(directory, length, capacity, shapes, repair, onehot)
  for block in itertools.count(start):
    replay.rescan()
    rng = np.random.default_rng([seed, block, stream])
    for _ in range(rescan):
      yield replay.window(rng, balance)


LOOKED_AT = 20  # episodes, for what their actions are


def describe(directory):
  """What the episodes of a folder hold.

  Returns:
    {key: shape of a row} of the first that is whole, and of how many choices
    the actions of the first ones are one-hot vectors, 0 if they are numbers.

  Raises:
    UserError: none is whole, with actions that an agent can choose.
  """
  directory = pathlib.Path(directory)
  names, why = list_episodes(directory), ''
  for index, name in enumerate(names):
    episode = EpisodeFile(directory / name)
    if episode.length < 2:
      why = f': {name} should end in its number of rows, as in walk-51.npz'
      continue
    try:
      rows = episode.read(0, episode.length)
    except ValueError as error:
      why = f': {name}: {error}'
      continue
    shapes = {k: v.shape[1:] for k, v in rows.items()}
    counts = {_choices(rows['action'][1:])}
    others = [n for n in names[index + 1 :] if episode_length(n) > 1]
    for other in others[: LOOKED_AT - 1]:
      with contextlib.suppress(ValueError):  # of another task, or broken
        counts.add(_choices(EpisodeFile(directory / other, shapes).actions()))
    return shapes, counts.pop() if len(counts) == 1 else 0
  raise UserError(f'{directory} holds no whole episode{why}')


def _choices(actions):
  """How many choices actions [T, A] may be, side by side; 0 for numbers."""
  onehot = len(actions) and actions.shape[-1] > 1 and is_onehot(actions)
  return int(actions[0].sum()) if onehot else 0


def count_steps(datadir, config, folders=1):
  """Environment steps in the episodes of a folder, times as many folders."""
  return count_episodes(datadir)[1] * config.action_repeat * folders


def load_dataset(
  directory,
  config,
  start=0,
  actions=None,
  source=False,
  part=(0, 1),
  inputs=spaces.IMAGE_ONLY,
  folders=1,
):
  """Yields batches of windows for ever: numpy arrays [B, T, ...].

  Images stay uint8; they become floats on the device, in the compiled step.

  Args:
    directory: folder of episodes.
    config: `batch_size` B, `batch_length` T, `dataset_balance`, `seed`,
      `replay_capacity`; with `offline`, or `role` learn, the folder is left as
      it is.
    start: index of the first batch; batch number n is the same however often
      the run was interrupted, as long as the episodes are.
    actions: A, if episodes with other actions are to be set aside.
    source: say where the windows are from, as `SOURCE`, strings [B].
    part: (index, number) of processes, each of which draws its share of B.
    inputs: {name: shape} of the observations that the agent sees.
    folders: of episodes, of all processes, which share the capacity.
  """
  share = config.batch_size // part[1]
  capacity = math.ceil(
    config.replay_capacity / (config.action_repeat * folders)
  )
  windows = load_episodes(
    directory,
    rescan=share,
    length=config.batch_length,
    balance=config.dataset_balance,
    seed=config.seed,
    stream=part[0],
    capacity=capacity,
    start=start,
    shapes={**inputs, **(dict(action=(actions,)) if actions else {})},
    repair=not config.get('offline') and config.get('role') != 'learn',
    onehot=config.get('action_dist') == 'onehot',
  )
  while True:
    batch = [next(windows) for _ in range(share)]
    data = {}
    for key in (*inputs, *spaces.TRANSITION_KEYS):
      data[key] = np.stack([x[key] for x in batch])
      if not spaces.is_image(key):
        data[key] = data[key].astype(np.float32)
    if source:
      data[SOURCE] = np.array([x[SOURCE] for x in batch])
    yield data


def prefetch(iterator):
  """Yields what `iterator` does, taking the next in another thread."""
  with concurrent.futures.ThreadPoolExecutor(1, 'prefetch') as executor:
    upcoming = executor.submit(next, iterator)
    while True:
      current, upcoming = upcoming, executor.submit(next, iterator)
      yield current.result()


# --- Recording --------------------------------------------------------------


class Collect(workers.Wrapper):
  """Records episodes, in the trainer's process, around an `Async` or plain env.

  Row t of an episode holds the observation *after* action[t], with reward[t]
  and discount[t]. Row 0 is the reset: zero action, reward 0, discount 1.

      row          0       1       2     ...   T
      image       o_0     o_1     o_2    ...  o_T
      action       0      a_0     a_1    ...  a_{T-1}     (o_0, a_0) -> o_1
      reward       0      r_1     r_2    ...  r_T

  When an episode is done, its rows are stacked to arrays [T + 1, ...], given to
  every callback as `callback(episode)` and put into `info['episode']`. Without
  `info['discount']` the discount is 1 - done.

  A worker that died or hangs is restarted. Its episode is dropped: the step
  then returns done, with `info['lost']`, and no callback is called. So is one
  in which the environment raised an error, if `tolerant`, unless there is no
  whole episode yet. After `LOSSES` losses without a whole episode between them
  the last error is raised.

  Args:
    env: an `Async` or an environment.
    callbacks: functions of one argument, the episode.
    precision: bits of the stored floats and signed integers, 16, 32 or 64.
    lost: function of one argument, called with the error of a lost worker or
      of an environment.
    tolerant: replace environments that raise errors, as lost workers.
    proven: function without arguments that says whether others of its kind have
      made whole episodes.
  """

  LOSSES = 5

  def __init__(
    self,
    env,
    callbacks=None,
    precision=32,
    lost=None,
    tolerant=False,
    proven=None,
  ):
    super().__init__(env)
    self._others_proven = proven or (lambda: False)
    self._lost = lost or (lambda error: None)
    self._losses = 0
    self._tolerant = tolerant
    self._proven = False  # whether it has made a whole episode
    self._number = None  # of the next episode
    self._callbacks = list(callbacks or ())
    self._float = {16: np.float16, 32: np.float32, 64: np.float64}[precision]
    self._int = {16: np.int16, 32: np.int32, 64: np.int64}[precision]
    self._rows = None

  def number(self, number):
    """The next episode is this one: earlier ones were whole."""
    self._proven = self._proven or number > 0
    self._number = number

  def reset(self, blocking=True):
    """Starts an episode; returns obs, or without blocking a promise of it."""
    promise = functools.cache(
      functools.partial(self._record_reset, self._begin())
    )
    return promise() if blocking else promise

  def _restart(self, error):
    """Replaces a worker; raises its error if it may not, or does too often."""
    while True:
      own = not isinstance(error, worker_calls.WorkerLost)  # of the environment
      self._losses += 1
      proven = self._proven or self._others_proven()
      if own and not (self._tolerant and proven):
        raise error
      gone = isinstance(error, worker_calls.WorkersLost)
      if gone or self._losses >= self.LOSSES:
        raise error
      self._lost(error)
      try:
        self._env.restart()
        return
      except worker_calls.WorkerError as another:
        error = another

  def step(self, action, blocking=True):
    """Returns obs, reward, done, info, or without blocking a promise of them.

    The promise, a function without arguments, records the step when it is
    called; further calls give the same answer and record nothing.
    """
    if self._rows is None:
      raise RuntimeError('No episode has begun: call reset() first.')
    # The caller may write over its array before the promise is called.
    action = np.array(action)
    promise = functools.cache(
      functools.partial(self._record_step, action, self._send('step', action))
    )
    return promise() if blocking else promise

  def _begin(self):
    """A promise of the first observation of the next episode."""
    if self._number is None:
      return self._send('reset')
    self._number += 1
    return self._send('reset', number=self._number - 1)

  def _send(self, method, *args, **kwargs):
    method = getattr(self._env, method)
    if isinstance(self._env, workers.Async):
      try:
        return method(*args, blocking=False, **kwargs)
      except worker_calls.WorkerError as error:
        return functools.partial(worker_calls.fail, error)
    result = method(*args, **kwargs)
    return lambda: result

  def _record_reset(self, promise):
    while True:
      try:
        obs = promise()
        break
      except worker_calls.WorkerError as error:
        self._restart(error)
        promise = self._begin()
    space = self._env.action_space
    action = np.zeros(space.shape, space.dtype)
    self._rows = []
    self._record(obs, action=action, reward=0.0, discount=1.0)
    return obs

  def _record(self, obs, **rest):
    """Adds a row, with copies of arrays that may be written over later."""
    obs = {k: np.array(v) for k, v in obs.items()}
    self._rows.append({**obs, **rest})

  def _record_step(self, action, promise):
    try:
      obs, reward, done, info = promise()
    except worker_calls.WorkerError as error:
      self._restart(error)
      row, self._rows = self._rows[-1], None
      obs = {k: v for k, v in row.items() if k not in ('action', 'discount')}
      return obs, 0.0, True, {'lost': True}
    info = {k: v for k, v in info.items() if k != 'lost'}  # that is ours
    discount = info.get('discount', 1.0 - float(done))
    self._record(obs, action=action, reward=reward, discount=discount)
    if done:
      episode = self._stack(self._rows)
      self._rows, self._losses, self._proven = None, 0, True
      for callback in self._callbacks:
        callback(episode)
      info = {**info, 'episode': episode}
    return obs, reward, done, info

  def _stack(self, rows):
    return {
      key: self._convert(np.array([row[key] for row in rows]))
      for key in rows[0]
    }

  def _convert(self, value):
    if value.dtype in (np.uint8, np.bool_):
      return value
    if np.issubdtype(value.dtype, np.floating):
      return value.astype(self._float)
    if np.issubdtype(value.dtype, np.integer):
      return value.astype(self._int)
    raise TypeError(f'Cannot store observations of type {value.dtype}.')
