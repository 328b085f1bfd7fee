"""Dreamer: learning behaviors by latent imagination (Hafner et al., 2020).

    python dreamer.py --logdir ./logdir/walker --task dmc_walker_walk

Symbols of the paper and their names here:

  s_t   model state            `post`, `prior`: {mean, std, stoch, deter}
  o_t   image, or vectors      `data['image']`, `data['vector']`
  a_t   action                 `action`
  r_t   reward                 `reward`
  gamma discount               `config.discount`, per state `pcont`
  lambda                       `config.disclam`
  beta  KL scale               `config.kl_scale`
  H     imagination horizon    `config.horizon`
  p_theta(s_t|s_t-1,a_t-1,o_t) `WorldModel.dynamics.obs_step` and `.embed`
  q_theta(s_t|s_t-1,a_t-1)     `WorldModel.dynamics.img_step`
  q_theta(o_t|s_t)             `WorldModel.representation.decoders`, `.vector`
  q_theta(r_t|s_t)             `WorldModel.reward`
  q_phi(a_t|s_t)               `behaviors.ActorCritic.actor`
  v_psi(s_t)                   `behaviors.ActorCritic.value`

Letters in shapes: B batch, T time, H horizon, A action, E environments, F
feature. Steps are environment steps; gradient steps are called updates.
"""

import functools
import pkgutil
import sys

import own_names  # noqa: F401  (before what it looks for)

# isort: split
import cli
import commandline
import configs

if __name__ == '__main__':  # typos and --help need not wait for TensorFlow
  cli.check('dreamer.py', commandline.parse_flags)

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import keras
import numpy as np
import tensorflow as tf

import distribute
import exploration
import library
import spaces
import tools
import training
from configs import define_config as define_config
from environments import make_env as make_env
from environments import summarize_episode as summarize_episode
from layers import Tapes
from replay import count_steps as count_steps
from replay import load_dataset as load_dataset
from world_model import WorldModel
from world_model import preprocess as preprocess


class Dreamer:
  """The agent: acts, and makes updates (Algorithm 1).

  When to act and when to learn is decided in training.py.

  Args:
    config: from `define_config`; what is `auto` in it is resolved.
    actspace: a `gym.spaces.Box` of shape [A] within [-1, 1], or of one-hot
      vectors, a `spaces.OneHotBox`.
    team: `distribute.Team`, or None for one device.
    inputs: {name: shape} of the observations that it sees.

  Attributes:
    world, behavior: `WorldModel`, and the class of `--behavior`.
    optimizers: {name: `tools.Adam`}: model, and what the behavior has learned.
    config, action_space: as they were given.
    actions: A.
    step, updates: environment steps and updates so far, variables int64.
  """

  def __init__(self, config, actspace, team=None, inputs=spaces.IMAGE_ONLY):
    configs.resolve_actions(config, actspace)
    self.config = self._c = config
    self.action_space = actspace
    self._team = team or distribute.Team()
    self.actions = actspace.shape[0]
    self._choices = getattr(actspace, 'choices', None)  # of discrete actions
    self._random = tf.random.Generator.from_seed(self._team.seed(config.seed))
    self._evaluation_random = tf.random.Generator.from_seed(0)
    counter = functools.partial(tf.Variable, 0, dtype=tf.int64, trainable=False)
    self.step = counter()
    with self._team.scope():
      self.updates = counter()  # seeds the noise of updates, too
      self.world = WorldModel(config, self.actions, inputs)
      method = configs.BEHAVIORS[config.behavior]
      self.behavior = pkgutil.resolve_name(method.path)(
        config, self.world, self.actions, self._choices
      )
      self.behavior.build(self.world.example)
      self.optimizers = self._make_optimizers()
    self._compile()

  def _make_optimizers(self):
    c = self._c
    modules = dict(model=self.world.networks.values())
    behavior = self.behavior
    modules.update({k: [behavior.networks[k]] for k in behavior.learned})
    return {
      name: tools.Adam(
        name,
        layers,
        c[f'{name}_lr'],
        clip=c.grad_clip,
        wd=c.weight_decay,
        wdpattern=c.weight_decay_pattern,
        eps=c.opt_eps,
        loss_scaling=keras.config.dtype_policy().compute_dtype == 'float16',
      )
      for name, layers in modules.items()
    }

  def _compile(self):
    """Makes graphs of what is called often, or XLA programs (`--jit`).

    XLA cannot compile what replicas exchange, which all of them have in the
    world model's loss; there it compiles the behavior's alone. No branch or
    loop depends on a tensor; AutoGraph, which looks for these, would take a
    good part of the time until the first update.
    """
    several = self._team.replicas > 1
    graph = functools.partial(tf.function, autograph=False)
    self.world.dynamics.unroll = not self.jit
    self.policy = graph(self.policy, jit_compile=self.jit)
    self.train = graph(self.train, jit_compile=self.jit and not several)
    if self.jit and several:
      self._behavior_gradients = graph(
        self._behavior_gradients, jit_compile=True
      )

  @property
  def jit(self):
    """Whether XLA compiles (`--jit`)."""
    if self._c.jit == 'auto':
      return bool(tf.config.list_physical_devices('GPU'))
    return self._c.jit == 'True'

  def networks(self):
    """All networks: {name in checkpoints: Keras layer}."""
    return {**self.world.networks, **self.behavior.networks}

  def trackable(self):
    """What a checkpoint holds of the agent, by name."""
    # Keras layers hide those in lists, so these are their weights.
    weights = {k: list(v.weights) for k, v in self.networks().items()}
    optimizers = {f'{k}_opt': v.optimizer for k, v in self.optimizers.items()}
    counters = dict(step=self.step, updates=self.updates, random=self._random)
    return {**counters, **weights, **optimizers, **self.behavior.state}

  def knowledge(self):
    """What of `trackable` acting, imagining and exporting need."""
    names = {'step', 'updates', *self.networks()}
    return {k: v for k, v in self.trackable().items() if k in names}

  def count_parameters(self):
    """Number of parameters of the optimizers, and of evolution, by name."""
    groups = {name: opt.variables for name, opt in self.optimizers.items()}
    for name, layer in self.behavior.networks.items():
      groups.setdefault(name, layer.weights)
    return {
      name: sum(int(np.prod(v.shape)) for v in variables)
      for name, variables in groups.items()
    }

  def reseed(self, seed):
    """Begins another stream of the noise of acting in training."""
    self._random.reset_from_seed(seed)

  def _begin_evaluation(self):
    """Its noise is by seed and step, and so training goes on as without it."""
    stream = np.random.SeedSequence([self._c.seed, int(self.step)])
    seed = int(stream.generate_state(1)[0] >> 1)
    self._evaluation_random.reset_from_seed(seed)

  # Acting

  def __call__(self, obs, reset, state=None, training=True):
    """One action for each environment; learns nothing.

    Args:
      obs: dictionary of arrays [E, ...]; images are uint8.
      reset: bool [E], true where an episode begins.
      state: what the last call returned; None at the first.
      training: explore, else act as in evaluations.

    Returns:
      Actions [E, A] and the new state.
    """
    if state is None:
      batch = len(reset)
      last = tf.zeros([batch, self.actions])
      state = self.world.dynamics.initial(batch), last
      if not training:
        self._begin_evaluation()
    if training:
      self.behavior.before_action(reset)
    seen = {k: np.asarray(obs[k], spaces.dtype(k)) for k in self.world.inputs}
    action, state = self.policy(
      seen, reset, state, self.noise(training), training
    )
    return action.numpy(), state

  def policy(self, obs, reset, state, noise, training):
    """One action for each environment (Algorithm 1, interaction).

    Args:
      obs: the inputs: images uint8 [E, 64, 64, 3], vectors float32.
      reset: bool [E].
      state: (model state {...: [E, ...]}, last action [E, A]).
      noise: float scalar, exploration amount.
      training: sample the action (or `--collect_action mode`), else mode.

    Returns:
      Action [E, A] and the new state.
    """
    state = tools.keep_rows(state, tf.logical_not(reset))
    random = self._random if training else self._evaluation_random
    seeds = tools.make_seeds(3, random)
    latent = self.observe(obs, *state, seeds[0])
    action = self.behavior.act(latent, seeds[1], training)
    action = self.explore(action, noise, seeds[2])
    return action, (latent, action)

  def observe(self, obs, latent, action, seed):
    """Posterior states {...: [E, ...]} from those before, and an action.

    Args:
      obs: the inputs, as in `policy`.
      latent: model states {...: [E, ...]}.
      action: the last, [E, A].
      seed: int32 [2].
    """
    embed = self.world.embed(self.world.preprocess(obs))
    return self.world.dynamics.obs_step(latent, action, embed, seed)[0]

  def noise(self, training):
    """Exploration amount at this step, a float32 number."""
    done = int(self.step), int(self.updates.numpy())
    return np.float32(exploration.amount(self._c, *done, training))

  def explore(self, action, noise, seed):
    """Adds exploration noise to actions [E, A]."""
    kind = exploration.KINDS[self._c.expl]
    return kind(action, noise, seed, self._choices)

  # Learning

  def set_learning_rates(self):
    """As the flags say, which a resumed run may change."""
    self.optimizers['model'].set_learning_rate(self._c.model_lr)
    updates = int(self.updates.numpy())
    for name in self.behavior.learned:
      rate = self.behavior.learning_rate(name, updates)
      self.optimizers[name].set_learning_rate(rate)

  def update(self, data):
    """As `train`, with what a behavior learns by other ways than gradients."""
    delayed = int(self.updates.numpy()) < self._c.actor_delay
    self.behavior.before_update(delayed)
    return self.behavior.after_update(self.train(data))

  def train(self, data):
    """One update of all parameters (Algorithm 1, learning).

    All losses are computed before any variable moves.

    Args:
      data: batch of `load_dataset`: images uint8 [B, T, 64, 64, 3], action
        [B, T, A], reward [B, T], discount [B, T]; as `Team.place` gives it.

    Returns:
      Metrics, a dictionary of float32 scalars.
    """
    return self._team.run(self._train_replica, data)

  def _train_replica(self, data):
    """As `train`, with the rows of the batch that this replica has."""
    data = self.world.preprocess(data)
    seeds = self.seeds(data['action'].shape[1], 0)
    with Tapes(self.optimizers['model'].variables) as tapes:
      losses, metrics, post = self.world.losses(data, seeds)
    grads = self._gradients(tapes, losses)
    behavior_grads, behavior_metrics = self._behavior_gradients(post)
    grads = distribute.sum_({**grads, **behavior_grads})
    metrics = distribute.mean({**metrics, **behavior_metrics})
    for name, opt in self.optimizers.items():
      metrics.update(opt.apply(grads[name]))
    return metrics

  def _behavior_gradients(self, post):
    """Gradients of the behavior's networks, by name, and metrics."""
    learned = [self.optimizers[k].variables for k in self.behavior.learned]
    with Tapes(*learned) as tapes:
      seeds = self.seeds(2 * self._c.horizon, 1)
      losses, metrics = self.behavior.losses(post, seeds)
    return self._gradients(tapes, losses), metrics

  def _gradients(self, tapes, losses):
    """Of each loss by the variables of its optimizer, by name."""
    return {
      name: self.optimizers[name].gradient(tapes, loss)
      for name, loss in losses.items()
    }

  def seeds(self, count, stream):
    """Seeds int32 [count, 2] by the number of this update.

    Stream 0 is for the posterior, 1 for imagination. All replicas draw alike.
    """
    seed = tf.stack([self._c.seed, 2 * self.updates + stream])
    return tf.random.stateless_uniform([count, 2], seed, None, None, tf.int32)


# --- The library, and the command -------------------------------------------


def load(logdir):
  """The agent of a run as its newest checkpoint has it, a `library.Agent`.

  Args:
    logdir: folder of the run; only config.json and checkpoints are read.

  Raises:
    cli.UserError: there is no such run, or it is of other code.
  """
  return library.load(logdir, Dreamer)


def train(make_env, logdir, **flags):
  """Trains on environments of the user; resumes what is in the logdir.

  Args:
    make_env: function without arguments that makes an environment of Gymnasium
      or Gym. It is called in other processes, so it must pickle (cloudpickle).
    logdir: folder of the run.
    flags: those of the command line, without dashes: `steps=100_000`,
      `preset='cpu'`, `inputs='state'`; docs/usage.md has all.

  Returns:
    The trained agent, a `library.Agent`.

  Raises:
    cli.Failure: as the command line would end, with its message.
  """
  return library.train(make_env, logdir, Dreamer, **flags)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main(
    'dreamer.py',
    lambda words: training.run(commandline.parse_flags(words), Dreamer),
    argv,
  )


if __name__ == '__main__':
  sys.exit(main())
