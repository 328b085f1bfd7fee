"""The environments of a run: how they are made, and where their episodes go.

Each lives in a worker of its own (`workers.Async`), records its episodes
(`replay.Collect`) and hands them on to be stored and logged.
"""

import contextlib
import functools
import threading
import weakref

import numpy as np

import episode_files
import replay
import runfile
import spaces
import suites
import workers
from cli import Failure
from worker_calls import (
  RenderError,
  TaskError,
  WorkerError,
  WorkerLost,
  open_log,
)

VIDEO = 1000  # images of an evaluation that are logged, at most


def make_env(
  config,
  index=0,
  prefix='train',
  callbacks=(),
  lost=None,
  log=None,
  function=None,
  proven=None,
):
  """Environment number `index` in its worker, recording episodes.

  `lost` is called with the error of a worker that had to be replaced, and for
  `proven` see `replay.Collect`; for the rest see `make_worker`.
  """
  return replay.Collect(
    make_worker(config, index, prefix, log, function),
    callbacks,
    lost=lost,
    tolerant=config.env_errors == 'drop',
    proven=proven,
  )


def make_worker(config, index=0, prefix='train', log=None, function=None):
  """Environment number `index` in its worker, a `workers.Async`.

  Each has random streams of its own, from (seed, index) and the number of the
  episode; those of evaluations (`prefix` test) differ from those of training.
  What workers print goes to `log`, from `open_log`. `function` makes
  the environment of a custom task.
  """
  stream = [config.seed, index, int(prefix == 'test')]
  seed = int(np.random.SeedSequence(stream).generate_state(1)[0] >> 1)
  make = functools.partial(
    suites.make_task,
    config.task,
    action_repeat=config.action_repeat,
    time_limit=config.time_limit,
    seed=seed,
    test=prefix == 'test',
    args=config.env_args,
    inputs=config.inputs,
    record=config.record,
    cameras=tuple(map(int, filter(None, config.cameras.split(',')))),
    detail=config.render_detail,
    function=function,
    log_info=config.log_info,
  )
  return workers.Async(
    make,
    config.parallel,
    config.worker_timeout,
    config.start_timeout,
    log,
    f'{prefix} {index}',
  )


@contextlib.contextmanager
def running(run):
  """Yields training environments, and one for evaluations (the chief's).

  Their episodes are stored and logged. A run that does not collect has none of
  the first kind, and of the second only if its task can run here. Without
  `--eval_episodes` there is none of the second.
  """
  config, team, envs = run.config, run.team, []
  count = config.envs if run.collects else 0
  evaluates = team.chief and run.evaluates and config.eval_episodes > 0
  function = run.function
  if function and config.parallel in ('none', 'thread'):
    function = Distinct(function, count + evaluates)
  log = open_log(run.home / f'workers{team.suffix}.log')
  make = functools.partial(
    make_env,
    config,
    lost=Replacements(run),
    log=log,
    function=function,
    proven=lambda: _collected(run),
  )
  store, summarize = _callbacks(run)
  test = None
  try:
    for index in range(count):
      ended = functools.partial(run.episode_ended, index)
      number = team.index * config.envs + index
      env = make(number, 'train', [*store, ended])
      env = watch(env, config, _log_told(run, 'train'), run.say)
      envs.append(Deadlines(env, run, 'missed'))
    if evaluates:
      test = make(0, 'test', [summarize])
      test = watch(test, config, _log_told(run, 'test'), run.say)
      test = Deadlines(test, run, 'test_missed')
      if not envs:
        test = if_it_runs(test, lambda x: run.say(f'No evaluations: {x}'))
    yield envs, test
  finally:
    with contextlib.ExitStack() as closing:  # all, though a signal ends a wait
      closing.callback(log.close)
      for env in [*envs, test] if test else envs:
        env.begin_close()
        closing.callback(env.close)


def watch(env, config, ended, say):
  """The environment; `Told` around it with `--log_info`."""
  names = list(filter(None, config.log_info.split(',')))
  return Told(env, names, ended, say) if names else env


def _log_told(run, prefix):
  """A function that logs the numbers that an episode told."""

  def log(told):
    numbers = {f'{prefix}/{k}': v for k, v in told.items()}
    run.logger.scalars(run.steps(), numbers)

  return log


def _callbacks(run):
  """Functions of whole episodes: a list in training, and one of evaluations."""
  summarize = functools.partial(
    summarize_episode,
    config=run.config,
    datadir=run.datadir,
    logger=run.logger,
    folders=run.team.folders,
    count=run.steps,
  )

  def save(episode):
    try:
      run.datadir.mkdir(exist_ok=True)
    except FileNotFoundError:
      logdir = run.config.logdir
      raise Failure(f'--logdir {logdir} was removed during the run') from None
    episode_files.save_episodes(run.datadir, [episode], run.exact)

  train, test = (
    functools.partial(summarize, prefix=prefix) for prefix in ('train', 'test')
  )
  return [save, train, ShortEpisodes(run)], test


class Distinct:
  """A user's function, whose first calls must make different environments.

  In one process the episodes of one that is given twice would mix.

  Args:
    function: without arguments.
    count: of environments that a run has.
  """

  def __init__(self, function, count):
    self._function, self._count = function, count
    self._made, self._lock = weakref.WeakSet(), threading.Lock()

  def __call__(self):
    env = self._function()
    # What cannot be remembered is not compared; wrappers may be new ones.
    with self._lock, contextlib.suppress(TypeError):
      inner = getattr(env, 'unwrapped', env)
      if len(self._made) < self._count and inner in self._made:
        raise TaskError(
          'make_env gave one environment twice: it must make another at each '
          'call, or be called once (--envs 1 --eval_episodes 0)'
        )
      self._made.add(inner)
    return env


def _collected(run):
  """Whether the environments of a run have made whole episodes."""
  return run.collects and episode_files.count_episodes(run.datadir)[0] > 0


def if_it_runs(env, say):
  """The environment, or None where its task cannot run here.

  Args:
    env: from `make_env`.
    say: called with the error that says why.
  """
  try:
    _ = env.about  # waits
    return env
  except (TaskError, RenderError, WorkerError) as error:
    env.close()
    say(error)
    return None


def summarize_episode(
  episode, config, datadir, logger, prefix, folders=1, count=None
):
  """Logs a finished episode; `prefix` is train or test.

  The step is that of `count()`, or that of the replay.
  """
  episodes = episode_files.count_episodes(datadir)[0] * folders
  steps = count() if count else replay.count_steps(datadir, config, folders)
  length = (len(episode['reward']) - 1) * config.action_repeat
  score = episode_files.episode_return(episode)
  name = dict(train='Episode', test='Evaluation')[prefix]
  logger.say(f'{name}: return {score:.1f} in {length} steps, at step {steps}.')
  metrics = {f'{prefix}/return': score, f'{prefix}/length': length}
  group = '' if prefix == 'train' else 'test_'
  about = describe_behavior(episode, config)
  metrics.update({f'{group}{k}': v for k, v in about.items()})
  logger.scalars(steps, dict(metrics, episodes=episodes))
  images = sorted(filter(spaces.is_image, episode))
  if prefix == 'test' and config.log_images and images:
    logger.video(steps, 'test/policy', episode[images[0]][None, :VIDEO])


def log_missing_episode(run):
  """Logs the newest episode, if a kill came between its file and its line."""
  again = run.exact and runfile.has_checkpoint(run.config.logdir)
  if not run.collects or run.team.workers > 1 or again:
    return
  names = episode_files.list_episodes(run.datadir)
  logged, steps = run.logger.steps_of('train/return'), run.steps()
  if len(logged) != len(names) - 1 or steps in (0, *logged):
    return
  file = episode_files.EpisodeFile(run.datadir / names[-1])
  try:
    episode = file.read(0, file.length)
  except ValueError:  # broken: it is set aside when it is drawn
    return
  summarize_episode(episode, run.config, run.datadir, run.logger, 'train')


def describe_behavior(episode, config):
  """Numbers that show an action model which collapsed, or values too high.

  Args:
    episode: as stored, T + 1 rows.
    config: from `commandline.parse_flags`, actions resolved.

  Returns:
    saturated: share of numbers in actions beyond 0.99, if they are continuous.
    changes: share of numbers with another sign than in the action before, or
      of actions that are another choice.
    real_value: mean discounted return of states 1 to T, as the value model
      sees them: from its reward on. Where an episode is cut off, each state's
      rewards stand for those that would have come.
  """
  action, reward = episode['action'][1:], episode['reward'][1:]
  result = dict(real_value=_real_value(reward, episode['discount'][-1], config))
  if config.action_dist == 'onehot':
    changed = (action[1:] != action[:-1]).any(-1)
  else:
    result['saturated'] = float((np.abs(action) > 0.99).mean())
    changed = np.sign(action[1:]) != np.sign(action[:-1])
  if changed.size:
    result['changes'] = float(changed.mean())
  return result


def _real_value(reward, last, config):
  """Of rewards [T]; `last` is the discount of the last row."""
  if config.clip_rewards == 'tanh':
    reward = np.tanh(reward)
  total, weight, values = 0.0, 0.0, []
  for each in reward[::-1].astype(np.float64):
    total = each + config.discount * total
    weight = 1.0 + config.discount * weight
    values.append((total, weight))
  totals, weights = np.array(values).T
  if last and config.discount < 1:
    totals = totals / weights / (1.0 - config.discount)
  return float(totals.mean())


class Watched(workers.Wrapper):
  """Sees what each step says besides; around a `replay.Collect`."""

  def step(self, action, blocking=True):
    promise = self._env.step(action, blocking=False)
    promise = functools.cache(functools.partial(self._look, promise))
    return promise() if blocking else promise

  def _look(self, promise):
    obs, reward, done, info = promise()
    self.see(info, done)
    return obs, reward, done, info

  def see(self, info, done):
    """Called once for each step."""
    raise NotImplementedError


class Deadlines(Watched):
  """Logs the share of each episode's ticks that the agent missed.

  An environment whose time does not wait counts them, by its own clock
  (`info['missed']`); nothing is logged of others.

  Args:
    env: a `replay.Collect`.
    run: a `run_kinds.Run`.
    name: of the metric.
  """

  def __init__(self, env, run, name):
    super().__init__(env)
    self._run, self._name = run, name

  def reset(self, blocking=True):
    self._ticks = self._missed = 0
    return self._env.reset(blocking)

  def see(self, info, done):
    if 'missed' in info:
      self._missed += info['missed']
      self._ticks += 1 + info['missed']
      if done:
        share = self._missed / self._ticks
        self._run.logger.scalars(self._run.steps(), {self._name: share})


class Told(Watched):
  """Hands on what an episode has told at its end (`--log_info`).

  Args:
    env: a `replay.Collect`.
    names: of the numbers.
    ended: function of {name: number}, of whole episodes.
    say: function of a text, called where a number was never told.
  """

  def __init__(self, env, names, ended, say):
    super().__init__(env)
    self._names, self._ended, self._say = names, ended, say
    self._said = False

  def see(self, info, done):
    if not done or 'lost' in info:
      return
    told = info.get('told', {})
    missing = [name for name in self._names if name not in told]
    if missing and not self._said:
      self._said = True
      self._say(
        f'Warning: in an episode no info had a number {", ".join(missing)} '
        '(--log_info).'
      )
    if told:
      self._ended(told)


class Replacements:
  """Reports environments that were replaced, and counts them.

  Their workers died or hung, or they raised an error.
  """

  def __init__(self, run):
    self._run = run
    self._count = 0

  def __call__(self, error):
    self._count += 1
    text = str(error)
    if not isinstance(error, WorkerLost):
      text = f'The environment failed: {error}\n{error.traceback.rstrip()}'
    self._run.say(
      f'Warning: {text}\nIts episode is dropped; a fresh worker takes over.'
    )
    self._run.logger.scalars(self._run.steps(), {'env_restarts': self._count})


class ShortEpisodes:
  """Says once, after the prefill, that episodes are too short to learn from."""

  def __init__(self, run):
    self._run = run
    self._said = False

  def __call__(self, episode):
    """To be called after an episode was stored."""
    config = self._run.config
    long = len(episode['reward']) >= config.batch_length
    if self._said or long or self._run.steps() < config.prefill:
      return
    self._said = say_short(self._run)


def say_short(run):
  """Says how many episodes are too short to learn from; whether some are."""
  length = run.config.batch_length
  names = episode_files.list_episodes(run.datadir)
  rows = [episode_files.episode_length(name) for name in names]
  short = sum(n < length for n in rows)
  if not 0 < short < len(rows):
    return False
  run.say(
    f'Warning: {short} of {len(rows)} episodes have fewer rows than '
    f'--batch_length {length}. These, and others so short, are not learned '
    'from; a smaller --batch_length may be given when the run resumes.'
  )
  return True
