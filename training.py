"""A run: collecting, learning, evaluating, saving (Algorithm 1), and resuming.

    run                  one call a run: what it needs, then
      _train             begins, resumes and ends it
        _begin           makes the agent
        prefill          episodes of random actions
        _resume          restores what learns, and the progress
        _collect         the loop of Algorithm 1
        _learn_offline   updates alone (`--offline`)
        _learn_beside    updates beside a process that acts (`--role learn`)
          Learner        acts, and makes the updates that are due beside it
          Progress       checkpoints, evaluations, resuming

Steps are environment steps; gradient steps are called updates. E environments.
"""

import contextlib
import errno
import math

import keras
import numpy as np
import tensorflow as tf

import agent_spec
import checkpoints
import cli
import configs
import distribute
import environments
import episode_files
import file_io
import free
import replay
import run_kinds
import run_setup
import runfile
import suites
import tools
import worker_calls
from cli import UserError
from learner import Learner
from logger import Logger, OutputLost
from progress import ExactProgress, Progress

# --- Prefill -----------------------------------------------------------------


STREAM = 0, 1  # apart from those of the replay, (seed, block, stream)


def random_agent(actspace, seed, number=0):
  """A policy that draws actions uniformly, as `simulate` takes it.

  Args:
    actspace: action space of the environments.
    seed: int; with the number of an episode it seeds that episode's actions.
    number: of the first episode.
  """
  rng = None

  def act(obs, reset, state=None):
    nonlocal number, rng
    if np.any(reset):
      rng = np.random.default_rng([seed, number, *STREAM])
      number += int(np.sum(reset))
    if getattr(actspace, 'discrete', False):
      size = (len(reset), len(actspace.choices))
      return actspace.encode(rng.integers(actspace.choices, size=size)), None
    size = (len(reset), *actspace.shape)
    return rng.uniform(-1, 1, size).astype(np.float32), None

  return act


PORTION = 500  # agent steps of a prefill after which processes may stop


def prefill(run, envs):
  """Fills the replay with episodes of random actions, to `--prefill` steps."""
  config, team = run.config, run.team
  episodes, _ = episode_files.count_episodes(run.datadir)
  if episodes and run.exact and runfile.has_checkpoint(config.logdir):
    return  # it had its prefill; what came later is regenerated
  missing = math.ceil(
    (config.prefill - team.from_chief(run.steps())) / team.workers
  )
  if missing <= 0:
    if not episodes:
      raise UserError(
        f'--prefill {config.prefill} with no episodes in {run.datadir}: '
        f'learning needs episodes, of --batch_length {config.batch_length} '
        'rows at least; choose --prefill 1 or more'
      )
    return
  run.say(f'Prefill: {missing} environment steps of random actions.')
  seed = team.seed(config.seed)
  act = random_agent(envs[0].action_space, seed, episodes)

  def checked(*args):
    if team.workers == 1:
      run.stop.check()
    return act(*args)

  state, count = None, math.ceil(missing / config.action_repeat)
  for begin in range(0, count, PORTION):
    if team.any(run.stop.requested):
      raise cli.Stopped
    portion = min(PORTION, count - begin)
    state = tools.simulate(checked, envs, steps=portion, state=state)


def number_episodes(run, envs):
  """Episode n starts alike, however often a run was interrupted before it."""
  for env in envs:
    env.number(episode_files.count_episodes(run.datadir)[0])


# --- The run ----------------------------------------------------------------


class Estimate:
  """Says once, without a GPU and at release sizes, what a run takes here."""

  def __init__(self, run, learner):
    self._run, self._learner, c = run, learner, run.config
    large = c.batch_size * c.batch_length >= 1000
    follows = c.learner == 'scheduled'  # so that steps tell updates
    gpus = tf.config.list_physical_devices('GPU')
    self._wanted = large and follows and not gpus

  def __call__(self):
    seconds = self._learner.seconds_per_update
    if not self._wanted or seconds is None:
      return
    self._wanted = False
    c = self._run.config
    hours = seconds * c.train_steps * 1e5 / c.train_every / 3600
    self._run.say(
      f'An update takes {seconds:.1f} s here, so 1e5 environment steps take '
      f'about {hours:.0f} hours of updates. --preset cpu (in a new logdir) has '
      'smaller networks and batches, for machines without a GPU.'
    )


def run(config, make_agent, function=None, stop=None):
  """Trains, from an empty logdir or from where the last run stopped.

  Args:
    config: from `commandline.parse_flags`.
    make_agent: class of the agent: `dreamer.Dreamer`.
    function: makes the environment of a custom task.
    stop: `cli.StopSignal`, which tells the caller of a signal.

  Raises:
    cli.Failure: with a message for the user and an exit code.
  """
  if function or not config.offline:
    suites.check_function(config.task, function)
  if config.parallel in ('none', 'thread'):  # the environment may go elsewhere
    config.logdir = config.logdir.absolute()
  with _failures(), contextlib.ExitStack() as held:
    team = run_setup.setup_devices(config)
    with team.chief_first():
      held.enter_context(run_setup.setup_logdir(config, team))
    team.compare_folders(config.logdir)
    run_setup.check_folder(config.logdir, team)
    if team.folders > 1:
      file_io.remove_temporary_files(config.logdir / 'episodes')
    stop = stop or cli.StopSignal()
    stop.install()
    kind = run_kinds.kind_of_run(config)
    this = kind(config, team, stop, None, make_agent, function)
    this.logger = Logger(this.home, config.steps, this.steps(), team.index)
    held.callback(this.logger.close)
    with environments.running(this) as (envs, test_env):
      _train(this, envs, test_env)


@contextlib.contextmanager
def _failures():
  """Turns what a machine lacks into a message for the user."""
  try:
    yield
  except OSError as error:
    limits = errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM
    other = 'the system' if error.errno in limits else 'logdir'
    where = error.filename or other  # writing to an open file does not name it
    reason = error.strerror or str(error) or type(error).__name__
    raise cli.Failure(
      f'{where}: {reason}. What was saved before is intact; the same command '
      'resumes.'
    ) from error
  except (tf.errors.ResourceExhaustedError, MemoryError) as error:
    if 'No space left' in str(error) or 'quota' in str(error):
      raise cli.Failure(
        'no space left on the device of --logdir. What was saved before is '
        'intact; with more space, the same command resumes.'
      ) from error
    reason = (str(error) or 'no more can be had').partition('\n')[0][:200]
    raise cli.Failure(
      f'out of memory ({reason}). Smaller --batch_size, --batch_length or '
      'networks need less; the last checkpoint is intact.'
    ) from error


def _train(run, envs, test_env):
  """Begins or resumes a run, and ends it.

  Of several processes only the chief evaluates and saves; the updates are made
  together, in which the others wait for it.
  """
  run.wait_for_other_process()
  with run.stop.immediate():
    agent, spec = _begin(run, envs, test_env)
  if envs:
    prefill(run, envs)
  with run.stop.immediate():
    learner, progress = _resume(run, agent, spec)
    number_episodes(run, envs)  # resuming may have deleted some
  before, estimate = (learner.step, learner.updates), Estimate(run, learner)
  learner.after_update = lambda: (estimate(), progress.save_if_due())
  try:
    if envs:
      _collect(run, learner, progress, envs, test_env)
    elif run.config.offline:
      _learn_offline(run, learner, progress, test_env)
    else:
      _learn_beside(run, learner)
    learner.halt()
    progress.save_at_end()
    run.say(_ending(run, learner, before))
    run.team.wait()  # to leave together
  except cli.Stopped:
    with contextlib.suppress(OutputLost):  # what reads it may have ended
      run.say('Stopping after the update under way; a second signal: unsaved.')
    _stop(run, learner, progress)
  except OutputLost:
    _stop(run, learner, progress)
    raise
  except worker_calls.ERRORS:
    _stop(run, learner, progress)
    raise
  except distribute.PeerLost:
    progress.save()
    raise
  finally:
    learner.halt()


def _stop(run, learner, progress):
  """Saves a run that goes on another time."""
  learner.halt()
  line = f'Stopped at step {learner.step}, {learner.updates} updates;'
  line += progress.save_when_stopped()
  with contextlib.suppress(OutputLost):
    run.say(f'{line} saved to {run.config.logdir}. The same command resumes.')


def _begin(run, envs, test_env):
  """The agent, with weights of another run if it is to have them; a `Spec`."""
  spec = _prepare(run, envs, test_env)
  environments.log_missing_episode(run)
  agent = run.make_agent(run.config, spec.actions, run.team, spec.inputs)
  for name, count in agent.count_parameters().items():
    run.say(f'Found {count} {name} parameters.')
  if run.learns and _takes_weights(run.config):
    _initialize(run, agent, spec)
  return agent, spec


def _resume(run, agent, spec):
  """What learns, and its progress, as the newest checkpoint has them."""
  learner = _make_learner(run, agent, spec)
  run.attach(learner)
  run.after_episode = agent.behavior.after_episode
  progress = _make_progress(run, learner)
  progress.resume()
  _record(run, spec)  # not before: this version may be refused
  return learner, progress


def _record(run, spec):
  """Writes config.json, once."""
  if run.team.chief and not run.recorded:
    runfile.write_config(run.config, spec.inputs, spec.actions, run.home)
    run.recorded = True


def _make_learner(run, agent, spec):
  """What acts, and makes the updates beside it."""
  if run.config.learner == 'scheduled':
    return Learner(agent, run)
  if not run.collects:
    return free.FreeLearner(agent, run)
  copy = run.make_agent(run.config, spec.actions, inputs=spec.inputs)
  kind = free.FreeLearner if run.learns else free.Follower
  return kind(agent, run, copy)


def _make_progress(run, learner):
  if run.config.learner == 'free':
    return free.PROGRESS[run.config.role](run, learner)
  return (ExactProgress if run.exact else Progress)(run, learner)


def _collect(run, learner, progress, envs, test_env):
  """The loop of Algorithm 1: collect, learn, evaluate, save."""
  state = None
  learner.begin()
  while run.collected(learner.step) < run.config.steps:
    progress.evaluate_if_due(test_env)
    state = tools.simulate(learner, envs, state=state, **progress.portion())
    progress.after_portion()
  progress.evaluate_if_due(test_env)


def _learn_beside(run, learner):
  """Updates until another process has collected all steps."""
  if learner.step < run.config.steps:
    learner.pretrain()
  while learner.step < run.config.steps:
    learner.learn_on()


def _learn_offline(run, learner, progress, test_env):
  """The loop of Algorithm 1 without collecting: updates on stored episodes."""
  while learner.updates < run.total:
    progress.evaluate_if_due(test_env)
    updates = configs.updates_of(run.config, progress.steps_to_evaluation())
    learner.learn(min(max(1, updates), run.total - learner.updates))
    progress.save()
  progress.evaluate_if_due(test_env)


def _prepare(run, envs, test_env):
  """Checks what must hold before anything is collected; returns a `Spec`."""
  config = run.config
  keras.utils.set_random_seed(config.seed)
  policy = run_setup.setup_precision(config.precision)
  spec = agent_spec.find(run, [*envs, test_env] if test_env else envs)
  configs.resolve_actions(config, spec.actions)
  if _takes_weights(config):
    runfile.load_config(config.init_from)  # or an error, before the work
  if runfile.has_checkpoint(config.logdir):
    runfile.check_spaces(run.home, spec.inputs, spec.actions)
  shapes = {**spec.inputs, 'action': spec.actions.shape}
  replay.Replay(run.datadir, shapes=shapes, repair=bool(envs)).check()
  if config.offline:
    agent_spec.check_choices(run, spec)
    environments.say_short(run)
  if run.team.chief:
    if run.home != config.logdir or not runfile.has_learned(config.logdir):
      _record(run, spec)
    _announce(run, policy)
    for line in spec.about:
      run.say(line)
  run.say(f'Training on {run.team}.')
  number_episodes(run, envs)
  return spec


def _takes_weights(config):
  """Whether the weights of another run are what this one begins with."""
  return config.init_from and not runfile.has_checkpoint(config.logdir)


def _initialize(run, agent, spec):
  """Takes the weights of another run that fit (`--init_from`)."""
  c = run.config
  other = runfile.load_config(c.init_from)
  inputs, actions = runfile.load_spaces(c.init_from)
  actions = actions or spec.actions
  source = checkpoints.load_agent(
    other, run.make_agent, actions, inputs or spec.inputs
  )
  taken, fresh = checkpoints.copy_weights(
    source.networks(), agent.networks(), c.init_only
  )
  if not taken:
    raise UserError(
      f'--init_from {c.init_from}: none of its weights fits this run '
      f'({", ".join(fresh)})'
    )
  run.say(f'Weights of {c.init_from}: {", ".join(taken)}.')
  if fresh:
    run.say(f'New weights: {", ".join(fresh)}.')


def _announce(run, policy):
  config = run.config
  run.say(
    f'Logdir {config.logdir}, task {config.task}, method '
    f'{configs.method_name(config)}, dtypes {policy}.'
  )
  defaults = configs.define_config()
  changed = [
    f'{k}={v}'
    for k, v in config.items()
    if v != defaults[k] and k not in ('logdir', 'task')
  ]
  if changed:
    run.say('Other than the defaults: ' + ', '.join(changed) + '.')


def _ending(run, learner, before):
  """What a run says when it has finished.

  Args:
    run: `run_kinds.Run`.
    learner: as it is at the end.
    before: environment steps and updates that it had at the start.
  """
  line = f'Finished at step {learner.step}, {learner.updates} updates.'
  steps = before[0]
  if not run.learns:
    return line
  if not learner.updates and run.config.offline:
    return f'{line} Nothing was learned: --updates says how much to.'
  if not learner.updates and steps < run.config.steps:
    return (
      f'{line} Nothing was learned, as --pretrain, --train_every and '
      '--train_steps asked for no update.'
    )
  if not learner.updates:
    return (
      f'{line} Nothing was learned, as the replay already holds --steps. To '
      f'learn from it, give --steps more than {learner.step}, and --pretrain '
      'the number of updates to begin with.'
    )
  if (learner.step, learner.updates) == before:
    flag = '--updates' if run.config.updates else '--steps'
    line += f' Nothing was left to do; a larger {flag} goes on.'
  return line
