"""What may be set: flags (Appendix A), presets, arms. No TensorFlow."""

import math
import pathlib
import re
import typing

import arguments
import spaces
import suites
import workers
from arguments import Choice, Number, Truth, Whole
from cli import AttrDict, UserError

# --- Flags ------------------------------------------------------------------


class Flag(typing.NamedTuple):
  """A flag of `dreamer.py`.

  Attributes:
    name: without its dashes.
    kind: what values it takes, from `arguments`.
    default: its value for a control suite task.
    meaning: its unit and meaning.
    source: of the default.
    fixed: function of the value whose result may not change when a run resumes,
      as it shapes weights or replay, or changes what the weights compute; None
      for flags that may.
  """

  name: str
  kind: object
  default: object
  meaning: str
  source: str = ''
  fixed: typing.Callable | None = None


class Method(typing.NamedTuple):
  """A way to choose actions, or what states are learned from.

  Attributes:
    path: its class, as module.name.
    name: its part of the method's name in tables.
    continuous: whether it cannot choose among discrete actions.
  """

  path: str
  name: str
  continuous: bool = False


BEHAVIORS = dict(
  actor_critic=Method('behaviors.ActorCritic', 'dreamer'),
  actor=Method('behaviors.ActorOnly', 'dreamer-actor'),
  planning=Method('behaviors.Planning', 'planet', continuous=True),
  evolution=Method('evolution.Evolution', 'world-models'),
)
REPRESENTATIONS = dict(
  reconstruction=Method('representations.Reconstruction', ''),
  contrastive=Method('representations.Contrastive', 'contrastive'),
  reward=Method('representations.RewardOnly', 'reward'),
)

DREAMER = AttrDict(
  behavior='actor_critic', representation='reconstruction', inputs='image'
)

FIXED = arguments.text  # the value itself
POSITIVE = Whole(1)
SIZE = Whole(1, 20_000)  # beyond, a layer has more than a billion weights
LAYERS = Whole(0, 50)
RATE = Number(0, 1)
WEIGHT = Number(0, 1e6)
AMOUNT = Number(0, 10)  # of exploration
# fmt: off
ACTIVATION = Choice(
  'elu', 'relu', 'celu', 'gelu', 'leaky_relu', 'linear', 'mish', 'relu6',
  'selu', 'sigmoid', 'silu', 'softplus', 'softsign', 'swish', 'tanh',
)
# fmt: on
PRESET = Choice('release', 'paper', 'cpu', 'debug')
PRECISION = Choice('auto', '16', 'bfloat16', '32')
JIT = Choice('auto', 'True', 'False')
STRATEGY = Choice('auto', 'single', 'mirrored', 'multiworker')
PARALLEL = Choice(*workers.STRATEGIES)
REPRESENTATION = Choice(*REPRESENTATIONS)
BEHAVIOR = Choice(*BEHAVIORS)
ACTION_DIST = Choice('auto', 'tanh_normal', 'onehot')
# fmt: off
EXPL = Choice(
  'auto', 'additive_gaussian', 'epsilon_greedy', 'completely_random',
)
# fmt: on

# fmt: off
FLAGS = {
  'Run': [
    Flag('logdir', arguments.Path(), pathlib.Path(),
         'folder of the run; resumes what is there'),
    Flag('task', arguments.Text(suites.check_task), 'dmc_walker_walk',
         'name of the task', fixed=FIXED),
    Flag('preset', PRESET, 'release', 'a set of defaults'),
    Flag('seed', Whole(0, 2**32 - 1), 0,
         'of networks, noise, replay and environments'),
    Flag('steps', Whole(), 5_000_000,
         'environment steps of the whole run', 'App. G'),
    Flag('init_from', arguments.Folder(), '',
         'logdir of a run whose weights a new run begins with'),
    Flag('init_only', arguments.Names(empty=True), '',
         'networks that take their weights from --init_from: encoder, decoder, '
         'dynamics, reward, pcont, vector, state, actor, value, controller; '
         'the default is all'),
    Flag('offline', arguments.Folder(), '',
         'folder of episodes to learn from, without collecting any; may move',
         fixed=bool),
    Flag('updates', Whole(), 0,
         'of a run with --offline; 0: --steps * --train_steps / --train_every'),
    Flag('eval_every', POSITIVE, 10_000,
         'environment steps between evaluations', 'release'),
    Flag('eval_episodes', Whole(0, 1000), 1,
         'episodes of an evaluation, each with a line of metrics; 0: no '
         'evaluations, and no environment for them', 'release'),
    Flag('log_every', POSITIVE, 1000,
         'environment steps between log lines', 'release'),
    Flag('log_scalars', Truth(), True, 'log losses and norms', 'release'),
    Flag('log_images', Truth(), True,
         'log predictions and evaluations', 'release'),
    Flag('log_images_every', POSITIVE, 10_000,
         'least number of environment steps between predictions',
         'release: 1000'),
    Flag('profile', Whole(), 0,
         "updates to record for TensorBoard's profiler"),
    Flag('gpu_growth', Truth(), True, 'take GPU memory as needed', 'release'),
    Flag('precision', PRECISION, 'auto',
         'of layers; auto: 16 on a GPU, else bfloat16 where faster than 32',
         'release: 16'),
    Flag('jit', JIT, 'auto',
         'compile with XLA; auto: on a GPU only, as XLA is slower on a CPU'),
    Flag('strategy', STRATEGY, 'auto',
         'devices: one, all GPUs here, or the processes of TF_CONFIG',
         'release: mirrored'),
    Flag('save_every', WEIGHT, 10.0, 'minutes between checkpoints, at most'),
    Flag('deterministic', Truth(), False,
         'wait for updates before acting, and use exact kernels; slower'),
    Flag('learner', Choice('scheduled', 'free'), 'scheduled',
         'updates follow from steps (--train_every, --train_steps), or go on '
         'without end beside acting', 'Alg. 1; free: DayDreamer'),
    Flag('max_ratio', WEIGHT, 0.0,
         'updates for each environment step that --learner free makes at '
         'most; 0: no limit'),
    Flag('role', Choice('both', 'act', 'learn'), 'both',
         'of this process: act and learn, or one of them, beside a process '
         'with the other role and the same logdir'),
  ],
  'Environment': [
    Flag('envs', Whole(1, 1000), 1,
         'environments that run at the same time', 'release'),
    Flag('env_args', arguments.Arguments(), {},
         'arguments of the constructor of a gym_ task', fixed=FIXED),
    Flag('inputs', arguments.Names(order=spaces.in_order), 'image',
         'what the agent sees: image, image_2, state (all vectors), or names '
         'of vectors', 'section 2', FIXED),
    Flag('record', arguments.Names(empty=True), '',
         'what episodes hold besides, such as image'),
    Flag('log_info', arguments.Names(empty=True), '',
         'numbers in the info of gym_ and custom_ tasks, such as success, to '
         'log of each episode: the last, and the largest'),
    Flag('cameras', arguments.Names(arguments.Whole(0, 1000), empty=True), '',
         'of the control suite, for image, image_2, ...; the default is 0, or '
         '2 for the quadruped', fixed=FIXED),
    Flag('render_detail', Choice('auto', 'full', 'low'), 'auto',
         'of images of the control suite; low: smaller shadow map and coarser '
         'spheres, auto: low where OpenGL renders in software', 'suite: full'),
    Flag('env_errors', Choice('drop', 'stop'), 'drop',
         'what an error in an environment ends, once there is a whole episode '
         '(before that, the run): the episode, or the run'),
    Flag('parallel', PARALLEL, 'process',
         'what each environment runs in: a process, a thread, the process that '
         'learns (none), or a Ray actor (RAY_ADDRESS names the cluster)',
         'release: none'),
    Flag('worker_timeout', Number(0, 1e6), 60.0,
         'seconds that a step or reset may take; 0: no limit'),
    Flag('start_timeout', Number(0, 1e6), 600.0,
         'seconds that the start of an environment may take; 0: no limit'),
    Flag('action_repeat', Whole(1, 1000), 2,
         'environment steps for each action', 'App. A', FIXED),
    Flag('time_limit', POSITIVE, 1000,
         'environment steps of an episode', 'section 6'),
    Flag('prefill', Whole(), 5000,
         'environment steps of random actions', 'App. A'),
    Flag('eval_noise', AMOUNT, 0.0,
         'exploration amount in evaluations', 'release'),
    Flag('clip_rewards', Choice('none', 'tanh'), 'none',
         'bounds the rewards that the model learns', 'App. A', FIXED),
  ],
  'World model': [
    Flag('representation', REPRESENTATION, 'reconstruction',
         'what states are learned from, besides rewards', 'section 4', FIXED),
    Flag('decode_images', Whole(), 0,
         'images of a batch that are reconstructed, drawn anew; 0: all',
         'Eq. 10: all'),
    Flag('contrast', Choice('batch', 'time', 'window'), 'batch',
         'images to tell apart: of the batch, the sequence, or near in time',
         'Eq. 12: batch'),
    Flag('contrast_window', POSITIVE, 5,
         'with --contrast window: agent steps before and after a state'),
    Flag('deter_size', SIZE, 200,
         'units of the GRU, and of the dense layers around it', 'release',
         FIXED),
    Flag('stoch_size', SIZE, 30,
         'dimensions of the latent Gaussian', 'App. A', FIXED),
    Flag('num_units', SIZE, 400,
         'units of dense layers of heads, action and value model (paper: 300)',
         'release', FIXED),
    Flag('reward_layers', LAYERS, 2,
         'hidden layers (paper: 3)', 'release', FIXED),
    Flag('pcont_layers', LAYERS, 3, 'hidden layers', 'App. A', FIXED),
    Flag('value_layers', LAYERS, 3, 'hidden layers', 'App. A', FIXED),
    Flag('actor_layers', LAYERS, 4,
         'hidden layers (paper: 3)', 'release', FIXED),
    Flag('dense_act', ACTIVATION, 'elu',
         'Keras activation of dense layers', 'App. A', FIXED),
    Flag('cnn_act', ACTIVATION, 'relu',
         'Keras activation of convolutions', 'release', FIXED),
    Flag('cnn_depth', Whole(1, 1000), 32,
         'channels of the first convolution', 'release', FIXED),
    Flag('vector_layers', LAYERS, 2,
         'hidden layers of the encoder and the decoder of vectors',
         'DreamerV2', FIXED),
    Flag('vector_scale', Choice('symlog', 'none'), 'symlog',
         'of the entries of vectors: sign(x) ln(1 + |x|), or as they are',
         'DreamerV3', FIXED),
    Flag('vector_std', Number(1e-3, 1e3), 0.3,
         'standard deviation of their Gaussian in Eq. 10'),
    Flag('pcont', Truth(), False,
         'predict discounts, for early termination', 'App. A', FIXED),
    Flag('free_nats', WEIGHT, 3.0, 'nats of KL that cost nothing', 'App. A'),
    Flag('kl_scale', WEIGHT, 1.0, 'beta of Eq. 10', 'App. A'),
    Flag('kl_balance', RATE, 0.0,
         'share of beta that moves the prior, the rest the posterior; 0: one '
         'term for both, Eq. 10', 'DreamerV2: 0.8'),
    Flag('reward_scale', WEIGHT, 1.0, 'weight of the reward loss', 'Eq. 10'),
    Flag('pcont_scale', WEIGHT, 10.0, 'weight of the discount loss', 'release'),
    Flag('weight_decay', RATE, 0.0,
         'decoupled weight decay (AdamW), times the learning rate', 'release'),
    Flag('weight_decay_pattern', arguments.Pattern(), r'.*',
         'regular expression of decaying variables', 'release'),
  ],
  'Training': [
    Flag('batch_size', Whole(1, 100_000), 50,
         'sequences in a batch', 'App. A'),
    Flag('batch_length', Whole(2, 100_000), 50,
         'agent steps in a sequence', 'App. A'),
    Flag('train_every', POSITIVE, 1000,
         'environment steps between trainings', 'App. A'),
    Flag('train_steps', Whole(), 100,
         'updates every --train_every steps', 'App. A'),
    Flag('pretrain', Whole(), 100, 'updates in the first training', 'release'),
    Flag('model_lr', RATE, 6e-4, 'learning rate of the world model', 'App. A'),
    Flag('value_lr', RATE, 8e-5, 'learning rate of the value model', 'App. A'),
    Flag('actor_lr', RATE, 8e-5, 'learning rate of the action model', 'App. A'),
    Flag('actor_delay', Whole(), 0,
         'updates before the action model begins to learn'),
    Flag('grad_clip', WEIGHT, 100.0,
         'largest gradient norm; 0: no limit', 'App. A'),
    Flag('opt_eps', Number(1e-30, 1), 1e-7,
         'epsilon of Adam (2019 code: 1e-4)', 'release'),
    Flag('dataset_balance', Truth(), False,
         'draw the ends of episodes more often', 'release'),
    Flag('replay_capacity', Whole(), 0,
         'environment steps to draw from, the newest; 0: all'),
  ],
  'Behavior': [
    Flag('behavior', BEHAVIOR, 'actor_critic',
         'how actions are found: Eq. 7 and 8, Eq. 7 with V_R, PlaNet, or World '
         'Models', 'Fig. 4, 7', FIXED),
    Flag('plan_horizon', Whole(1, 1000), 12,
         'agent steps that are planned', 'PlaNet'),
    Flag('plan_candidates', Whole(2, 10**6), 1000,
         'plans in each iteration', 'PlaNet'),
    Flag('plan_best', Whole(2, 10**6), 100,
         'best plans, to which the Gaussian is refit', 'PlaNet'),
    Flag('plan_iterations', Whole(1, 1000), 10, 'refits of a plan', 'PlaNet'),
    Flag('controller_inputs', Choice('z,h', 'z'), 'z,h',
         'what a linear controller sees: stochastic and deterministic state',
         'World Models', FIXED),
    Flag('evolve', Choice('imagination', 'environment'), 'imagination',
         'where controllers earn their returns: V_R, or real episodes'),
    Flag('evolve_population', Whole(4, 10**5), 32,
         'controllers in a generation', 'World Models: 64', FIXED),
    Flag('evolve_std', Number(1e-6, 1e3), 0.1,
         'standard deviation of their weights at the start', 'World Models',
         FIXED),
    Flag('evolve_episodes', POSITIVE, 16,
         'of each controller of a generation, with --evolve environment',
         'World Models'),
    Flag('temperature', Number(0, 100), 1.0,
         'factor of the variance of the latent noise, where --behavior '
         'evolution imagines', 'World Models'),
    Flag('discount', Number(0, 1, above=True), 0.99,
         'gamma, for each agent step', 'App. A'),
    Flag('disclam', Number(0, 1), 0.95, 'lambda of Eq. 6', 'App. A'),
    Flag('horizon', Whole(2, 1000), 15,
         'H, agent steps of imagination', 'App. A'),
    Flag('imag_starts', Whole(), 0,
         'states of a batch that imagination starts from, drawn anew; 0: all',
         'section 3: all'),
    Flag('slow_value', RATE, 0.0,
         'rate of a moving average of the value model, whose values Eq. 6 then '
         'uses (a target network); 0: none',
         'DreamerV3: 0.02', FIXED),
    Flag('actor_entropy', Number(0, 100), 0.0,
         "weight of the action model's entropy (in nats), added to Eq. 7",
         'DreamerV2'),
    Flag('action_dist', ACTION_DIST, 'auto',
         'action model; auto: by the action space', 'Eq. 3', FIXED),
    Flag('action_init_std', Number(1e-3, 50), 5.0,
         'before tanh, at the start', 'release', FIXED),
    Flag('collect_action', Choice('sample', 'mode'), 'sample',
         'action that exploration noise is added to (paper: mode)', 'release'),
    Flag('expl', EXPL, 'auto',
         'kind; auto: additive_gaussian, for discrete actions epsilon_greedy',
         'App. A'),
    Flag('expl_amount', AMOUNT, 0.3,
         'standard deviation, or epsilon', 'App. A'),
    Flag('expl_decay', Number(0, 1e15), 0.0,
         'environment steps that halve it; 0: none', 'release'),
    Flag('expl_ramp', Whole(), 0,
         'updates over which it falls linearly to --expl_min; 0: none',
         'App. A'),
    Flag('expl_min', AMOUNT, 0.0, 'least amount', 'release'),
  ],
}
# fmt: on


RESOLVED = ('action_dist', 'expl')  # auto stands for one by `resolve_actions`


def all_flags():
  """{name: Flag}."""
  return {flag.name: flag for flags in FLAGS.values() for flag in flags}


PRESETS = {
  'paper': dict(
    num_units=300,
    reward_layers=3,
    pcont_layers=3,
    value_layers=3,
    actor_layers=3,
    collect_action='mode',
  ),
  # For machines without a GPU: small networks and batches, by a search
  # (docs/results.md has the reason for each value).
  'cpu': dict(
    batch_size=16,
    batch_length=32,
    cnn_depth=8,
    num_units=200,
    free_nats=1.0,
    kl_balance=0.83,
    imag_starts=64,
    slow_value=0.02,
    actor_entropy=0.01,
    reward_scale=10.0,
    decode_images=128,
    train_steps=200,
    pretrain=500,
    model_lr=1e-3,
    value_lr=3e-4,
    actor_lr=1e-4,
  ),
  # A whole run in about a minute, to see that everything works.
  'debug': dict(
    steps=800,
    eval_every=400,
    log_every=200,
    log_images_every=400,
    time_limit=100,
    prefill=400,
    deter_size=16,
    stoch_size=4,
    num_units=16,
    cnn_depth=4,
    batch_size=4,
    batch_length=10,
    train_every=100,
    train_steps=5,
    pretrain=5,
    horizon=5,
  ),
}


# Where no image is among the inputs. Vectors hold few nats: the posterior must
# not be held to the prior as for images, while the prior must follow it
# (docs/experiments.md).
STATE = dict(free_nats=1.0, kl_scale=0.6, kl_balance=0.83, actor_entropy=0.01)
# What presets are there instead.
STATE_PRESETS = {
  'cpu': dict(
    PRESETS['cpu'],
    horizon=10,
    reward_scale=1.0,
    decode_images=0,
    precision='32',
  ),
}


def method_name(config):
  """What a run is called: dreamer, dreamer-contrastive, planet-state, ..."""
  methods = BEHAVIORS[config.behavior], REPRESENTATIONS[config.representation]
  parts = [method.name for method in methods]
  if config.get('offline'):
    parts.append('offline')
  if config.get('learner') == 'free':
    parts.append('free')
  if config.inputs != 'image':
    parts.append(re.sub(r'[^\w.]+', '-', config.inputs))
  return '-'.join(filter(None, parts))


def methods():
  """Methods that differ from Dreamer in one arm: {name: flags}."""
  found = {method_name(DREAMER): ()}
  choices = dict(behavior=BEHAVIORS, representation=REPRESENTATIONS)
  for flag, names in choices.items():
    for name in names:
      if name != DREAMER[flag]:
        method = method_name(AttrDict(DREAMER, **{flag: name}))
        found[method] = f'--{flag}', name
  return found


START = ('task', 'preset', 'inputs')  # what defaults depend on


def define_config(task='dmc_walker_walk', preset='release', inputs='image'):
  """Defaults of task, preset and inputs: `AttrDict` from flag to value."""
  config = AttrDict({k: flag.default for k, flag in all_flags().items()})
  config.update(suites.defaults(task))
  presets = PRESETS
  if not spaces.names_image(inputs):
    config.update(STATE)
    presets = {**PRESETS, **STATE_PRESETS}
  config.update(presets.get(preset, {}))
  config.update(task=task, preset=preset, inputs=inputs)
  return config


def steps_of(config, updates):
  """Environment steps in which a run that collects has as many updates."""
  return updates * config.train_every // config.train_steps


def updates_of(config, steps):
  """Updates that a run makes in as many environment steps, rounded up."""
  return math.ceil(steps * config.train_steps / config.train_every)


def last_step(config):
  """Environment step at which a run ends."""
  return steps_of(config, config.updates) if config.updates else config.steps


def resolve_actions(config, actspace):
  """Sets what is `auto` by the action space; UserError where flags misfit."""
  discrete = getattr(actspace, 'discrete', False)
  kind, dist, expl = 'continuous', 'tanh_normal', 'additive_gaussian'
  if discrete:
    kind, dist, expl = 'discrete', 'onehot', 'epsilon_greedy'
  if discrete and BEHAVIORS[config.behavior].continuous:
    others = [name for name, x in BEHAVIORS.items() if not x.continuous]
    raise UserError(
      f'{config.task} has discrete actions, and --behavior {config.behavior} '
      f'needs continuous ones; choose {" or ".join(others)}'
    )
  if config.action_dist not in ('auto', dist):
    raise UserError(
      f'{config.task} has {kind} actions: --action_dist is {dist} there, '
      f'not {config.action_dist}'
    )
  if discrete and config.expl == 'additive_gaussian':
    raise UserError(
      f'{config.task} has discrete actions: --expl is epsilon_greedy there'
    )
  config.action_dist = dist
  config.expl = expl if config.expl == 'auto' else config.expl
