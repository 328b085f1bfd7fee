"""The agent as a library: NumPy in and out.

    agent = dreamer.load('./logdir/walker')
    action = agent.act(obs, reset=True)

`dreamer.load` and `dreamer.train` call this; docs/library.md shows how.

Letters in shapes: E environments, A action, H steps of imagination.
"""

import os
import re

import cloudpickle
import numpy as np
import tensorflow as tf

import agent_spec
import arguments
import checkpoints
import commandline
import environments
import run_setup
import runfile
import spaces
import tools
import training
from cli import AttrDict, Stopped, StopSignal, UserError, kept_signals
from logger import to_uint8
from pure_policy import Policy


class Agent:
  """A trained agent that acts in one environment, or in a batch of them.

  It remembers what it has seen of the episode: call `act` once for each agent
  step (--action_repeat environment steps), with `reset` at the first.

  Attributes:
    config: the flags of its run.
    inputs: {name: shape} of the observations that it sees.
    action_space: of its actions, in [-1, 1] or one-hot.
    step, updates: what it has learned from.
  """

  def __init__(self, agent, config=None):
    self._policy = Policy(agent)
    self._act = tf.function(self._policy.act, autograph=False)
    self._imagine = tf.function(self._policy.imagine, autograph=False)
    self.config = config or agent.config
    self.inputs = dict(agent.world.inputs)
    self.action_space = agent.action_space
    self.step, self.updates = int(agent.step), int(agent.updates.numpy())
    self.reset(self.config.seed)

  def reset(self, seed=None):
    """Forgets the episode; with a seed it begins that stream of noise."""
    if seed is not None:
      self._seed = np.array([seed & 0x7FFFFFFF, 0], np.int32)
    self._state = None

  def act(self, obs, reset=False, sample=False):
    """The action after an observation.

    Args:
      obs: {name: array}, of shapes `inputs` or [E, ...] with an axis in front;
        of one input the array alone will do. Other names are ignored. Images
        are uint8.
      reset: whether an episode begins: bool, or bool [E].
      sample: draw from the action model, else take its mode.

    Returns:
      float32 [A] or [E, A], in [-1, 1] or one-hot.

    Raises:
      ValueError: an observation is missing, or of another shape or type.
    """
    obs, single = self._read(obs)
    state = self._before(len(next(iter(obs.values()))), reset)
    action, self._state = self._act(obs, state, bool(sample))
    self._seed = self._state['seed'].numpy()
    return action.numpy()[0] if single else action.numpy()

  def imagine(self, obs, actions, reset=False):
    """What the agent expects of actions; it changes nothing that it remembers.

    Args:
      obs: the present observation, as for `act`, before it was acted on; None
        to go on from the last that was.
      actions: [H, A] or [E, H, A], as `act` gives them.
      reset: whether an episode begins with the observation: bool, or bool [E].

    Returns:
      {name: array [H, ...] or [E, H, ...]}: `reward`, with `--clip_rewards
      tanh` (Atari, Lab) its tanh; `discount`, the probability that the episode
      continues, where the run predicts it; images uint8; vectors by their
      names, float32.
    """
    actions = np.asarray(actions, np.float32)
    wanted = self.action_space.shape[0]
    if actions.ndim not in (2, 3) or actions.shape[-1] != wanted:
      raise ValueError(
        f'Actions are [H, {wanted}] or [E, H, {wanted}], not {actions.shape}.'
      )
    self._check_actions(actions.reshape(-1, wanted))
    single = actions.ndim == 2
    actions = actions[None] if single else actions
    if obs is not None:
      obs, _ = self._read(obs)
      count = len(next(iter(obs.values())))
      if count != len(actions):
        raise ValueError(
          f'Observations are of {count} environments, actions are of '
          f'{len(actions)}.'
        )
    if obs is None and self._state is None:
      raise ValueError('There is no observation yet: give one, or act first.')
    if obs is None and np.any(reset):
      raise ValueError('An episode begins: give its first observation.')
    predictions = self._imagine(obs, self._before(len(actions), reset), actions)
    predictions = {k: v.numpy() for k, v in predictions.items()}
    predictions.update(self._split(predictions.pop('vector', None)))
    for name in filter(spaces.is_image, predictions):
      predictions[name] = to_uint8(predictions[name])
    return {k: v[0] for k, v in predictions.items()} if single else predictions

  def _check_actions(self, rows):
    """ValueError unless all of [N, A] are as `act` gives them."""
    if getattr(self.action_space, 'discrete', False):
      if not all(map(self.action_space.contains, rows)):
        raise ValueError('Actions are one-hot vectors, one for each choice.')
    elif not (np.abs(rows) <= 1 + 1e-5).all():
      raise ValueError('Actions are numbers within [-1, 1].')

  def make_env(self, seed=None, function=None):
    """The environment of the run in a worker of its own, a `workers.Async`.

    Its `reset()` gives observations as `act` takes them, and `step(action)`
    observation, reward, whether the episode has ended, and a dictionary. To be
    closed with `close()`. `function` is that of `dreamer.train`, if it was.
    """
    config = AttrDict(self.config)
    config.seed = config.seed if seed is None else seed
    return environments.make_worker(config, 0, 'test', function=function)

  def _read(self, obs):
    """Observations {name: [E, ...]}, and whether there was no such axis."""
    if not isinstance(obs, dict):
      if len(self.inputs) > 1:
        raise ValueError(f'The agent sees {", ".join(self.inputs)}: give all.')
      obs = dict.fromkeys(self.inputs, obs)
    missing = [name for name in self.inputs if name not in obs]
    if missing:
      raise ValueError(
        f'The agent sees {", ".join(self.inputs)}; the observation lacks '
        f'{", ".join(missing)}.'
      )
    arrays = {k: self._array(k, obs[k]) for k in self.inputs}
    extra = {v.ndim - len(self.inputs[k]) for k, v in arrays.items()}
    if len(extra) > 1:
      raise ValueError('Only some observations have an axis of environments.')
    single = extra == {0}
    arrays = {k: v[None] if single else v for k, v in arrays.items()}
    if len({len(v) for v in arrays.values()}) > 1:
      raise ValueError('Observations are of different numbers of environments.')
    return arrays, single

  def _array(self, name, value):
    array, shape = np.asarray(value), self.inputs[name]
    if spaces.is_image(name):
      if array.dtype != np.uint8:
        raise ValueError(f'{name} is {array.dtype}; images are uint8.')
    else:
      array = array.astype(np.float32)
      if not np.isfinite(array).all():
        raise ValueError(f'{name} has numbers that are not finite.')
    if shape not in (array.shape, array.shape[1:]):
      raise ValueError(
        f'{name} has shape {array.shape}, not {shape} or (E, '
        f'{", ".join(map(str, shape))}).'
      )
    return array

  def _before(self, count, reset):
    """The state before this step, anew where an episode begins."""
    reset = np.asarray(reset)
    if reset.shape not in ((), (count,)) or not np.isin(reset, (0, 1)).all():
      raise ValueError(
        f'reset is a bool, or one for each of the {count} environments.'
      )
    start = self._policy.start(count, tf.constant(self._seed))
    if self._state is None or np.all(reset):
      return start
    if len(self._state['action']) != count:
      raise ValueError(
        f'There were {len(self._state["action"])} environments, not {count}: '
        'call agent.reset() first.'
      )
    kept = {k: v for k, v in self._state.items() if k != 'seed'}
    keep = np.broadcast_to(reset == 0, [count])
    return dict(start, **tools.keep_rows(kept, keep))

  def _split(self, vector):
    """Vectors by their names, as the environment gives them."""
    if vector is None:
      return {}
    if self.config.vector_scale == 'symlog':
      vector = np.sign(vector) * np.expm1(np.abs(vector))
    parts, start = {}, 0
    for name, shape in self.inputs.items():
      if not spaces.is_image(name):
        size = int(np.prod(shape))
        part = vector[..., start : start + size]
        parts[name] = part.reshape(*vector.shape[:-1], *shape)
        start += size
    return parts


def _path(logdir):
  """As every flag, with ~ for the home of a user."""
  if isinstance(logdir, os.PathLike):
    logdir = os.fspath(logdir)
  if not isinstance(logdir, str):
    raise UserError(f'logdir is a path, not a {type(logdir).__name__}')
  try:
    return arguments.Path().parse(logdir)
  except ValueError as error:
    raise UserError(f'logdir {logdir!r} is not a path{error}') from None


def load(logdir, make_agent):
  """The agent of a run, or of a folder of scores/trained.

  Raises:
    UserError: there is none, or it is of other code.
  """
  logdir = _path(logdir)
  config = runfile.load_config(logdir)
  run_setup.setup_gpus(config)
  run_setup.setup_precision(config.precision)
  return Agent(load_dreamer(config, make_agent), config)


def load_dreamer(config, make_agent, env=None):
  """`checkpoints.load_agent`, asking the environment where config.json is old.

  Args:
    config: from `runfile.load_config`.
    make_agent: class of the agent.
    env: of the run's task; None to make one, if it is needed.

  Raises:
    UserError: the environment shows or takes something else than config.json
      says.
  """
  inputs, actions = runfile.load_spaces(config.logdir)
  if env or inputs is None:
    asked = env or environments.make_env(config, 0, 'test')
    try:
      inputs, actions, _ = agent_spec.of_environment(config, asked)
      runfile.check_spaces(config.logdir, inputs, actions)
    finally:
      if not env:
        asked.close()
  acts = AttrDict(config, collect_action='sample')  # for act(..., sample=True)
  return checkpoints.load_agent(acts, make_agent, actions, inputs)


def train(make_env, logdir, make_agent, **flags):
  """Trains on environments that a function makes; see `dreamer.train`."""
  name = re.sub(r'\W+', '', getattr(make_env, '__name__', 'env'))
  flags = {'task': f'custom_{name}', **flags, 'logdir': logdir}
  flags = {k: v for k, v in flags.items() if v is not None}
  if make_env is not None and not callable(make_env):
    raise UserError(
      'make_env is a function that makes an environment, not a '
      f'{type(make_env).__name__}; a task with a name is given as task='
    )
  config = commandline.parse_flags([_word(*flag) for flag in flags.items()])
  if config.parallel in ('process', 'ray'):
    _check_sendable(make_env)
  stop = StopSignal()
  try:
    with kept_signals():
      training.run(config, make_agent, make_env, stop)
  except Stopped:
    raise KeyboardInterrupt from None
  if stop.requested:  # all is saved; the caller is to end, too
    raise KeyboardInterrupt
  return load(config.logdir, make_agent)


def _word(name, value):
  """A flag as on the command line; UserError for what cannot be written."""
  value = _path(value) if name == 'logdir' else value
  try:
    return f'--{name}={arguments.text(value)}'
  except (TypeError, ValueError) as error:
    raise UserError(f'{name} cannot be written as JSON: {error}') from None


def _check_sendable(make_env):
  try:
    cloudpickle.dumps(make_env)
  except Exception as error:  # whatever its parts raise
    raise UserError(
      f'make_env cannot be sent to another process ({error}): it must be a '
      'function that makes the environment, and not hold one; or give '
      "parallel='thread', which sends nothing"
    ) from error
