"""What a run is: its flags (Appendix A), and the config.json that keeps them.

A flag's value is that of the command line, else of the preset, else of the
task, else its default.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import re
import sys

import numpy as np

import distribute
import tools
import wrappers

# --- Flags ------------------------------------------------------------------


def define_flags():
  """All flags: {group: [(name, default, unit and meaning, source)]}.

  A tuple in place of a default lists the choices, the default first.
  """
  return {
    'Run': [
      (
        'logdir',
        pathlib.Path(),
        'folder of the run; resumes what is there',
        '',
      ),
      ('task', 'dmc_walker_walk', 'name of the task', ''),
      ('preset', ('release', *PRESETS), 'a set of defaults', ''),
      ('seed', 0, 'of networks, noise, replay and environments', ''),
      ('steps', 5_000_000, 'environment steps of the whole run', 'App. G'),
      (
        'eval_every',
        10_000,
        'environment steps between evaluations',
        'release',
      ),
      ('log_every', 1000, 'environment steps between log lines', 'release'),
      ('log_scalars', True, 'log losses and norms', 'release'),
      ('log_images', True, 'log open-loop predictions', 'release'),
      ('gpu_growth', True, 'take GPU memory as needed', 'release'),
      (
        'precision',
        ('auto', '16', 'bfloat16', '32'),
        'of layers; auto: 16 on a GPU, bfloat16 on a CPU that has it, or 32',
        'release: 16',
      ),
      (
        'jit',
        ('auto', 'True', 'False'),
        'compile with XLA; auto: on a GPU, as a CPU gets slower by it',
        '',
      ),
      (
        'strategy',
        distribute.STRATEGIES,
        'devices: one, all GPUs here, or the processes of TF_CONFIG',
        'release: mirrored',
      ),
      ('save_every', 10.0, 'minutes between checkpoints, at most', ''),
      (
        'deterministic',
        False,
        'wait for updates before acting, and use exact kernels; slower',
        '',
      ),
    ],
    'Environment': [
      ('envs', 1, 'environments that run at the same time', 'release'),
      (
        'parallel',
        ('process', 'thread', 'none', 'ray'),
        'how environments run; ray: on the hosts of RAY_ADDRESS, or on this',
        'release: none',
      ),
      (
        'worker_timeout',
        60.0,
        'seconds without an answer until a worker is replaced; 0: none',
        '',
      ),
      ('action_repeat', 2, 'environment steps for each action', 'App. A'),
      ('time_limit', 1000, 'environment steps of an episode', 'section 6'),
      ('prefill', 5000, 'environment steps of random actions', 'App. A'),
      ('eval_noise', 0.0, 'exploration amount in evaluations', 'release'),
      ('clip_rewards', ('none', 'tanh'), 'bound of rewards', 'App. A'),
    ],
    'World model': [
      (
        'representation',
        ('reconstruction', 'contrastive', 'reward'),
        'what states are learned from, besides rewards',
        'section 4',
      ),
      (
        'contrast',
        ('batch', 'time', 'window'),
        'images to tell apart: of the batch, the sequence, or near in time',
        'Eq. 12: batch',
      ),
      ('contrast_window', 5, 'agent steps to both sides that are near', ''),
      ('deter_size', 200, 'units of the GRU', 'release'),
      ('stoch_size', 30, 'dimensions of the latent Gaussian', 'App. A'),
      ('num_units', 400, 'units of dense layers (paper: 300)', 'release'),
      ('reward_layers', 2, 'hidden layers (paper: 3)', 'release'),
      ('pcont_layers', 3, 'hidden layers', 'App. A'),
      ('value_layers', 3, 'hidden layers', 'App. A'),
      ('actor_layers', 4, 'hidden layers (paper: 3)', 'release'),
      ('dense_act', 'elu', 'Keras activation of dense layers', 'App. A'),
      ('cnn_act', 'relu', 'Keras activation of convolutions', 'release'),
      ('cnn_depth', 32, 'channels of the first convolution', 'release'),
      ('pcont', False, 'predict discounts, for early termination', 'App. A'),
      ('free_nats', 3.0, 'nats of KL that cost nothing', 'App. A'),
      ('kl_scale', 1.0, 'beta of Eq. 10', 'App. A'),
      ('pcont_scale', 10.0, 'weight of the discount loss', 'release'),
      ('weight_decay', 0.0, 'decoupled, for each update and rate', 'release'),
      (
        'weight_decay_pattern',
        r'.*',
        'regular expression of decaying variables',
        'release',
      ),
    ],
    'Training': [
      ('batch_size', 50, 'sequences in a batch', 'App. A'),
      ('batch_length', 50, 'agent steps in a sequence', 'App. A'),
      ('train_every', 1000, 'environment steps between trainings', 'App. A'),
      ('train_steps', 100, 'updates in a training', 'App. A'),
      ('pretrain', 100, 'updates in the first training', 'release'),
      ('model_lr', 6e-4, 'learning rate of the world model', 'App. A'),
      ('value_lr', 8e-5, 'learning rate of the value model', 'App. A'),
      ('actor_lr', 8e-5, 'learning rate of the action model', 'App. A'),
      (
        'actor_delay',
        0,
        'updates before the action model begins to learn',
        '',
      ),
      ('grad_clip', 100.0, 'largest gradient norm', 'App. A'),
      ('opt_eps', 1e-7, 'epsilon of Adam (2019 code: 1e-4)', 'release'),
      ('dataset_balance', False, 'draw ends of episodes more', 'release'),
      ('replay_capacity', 0, 'environment steps to draw from; 0: all', ''),
    ],
    'Behavior': [
      (
        'behavior',
        ('actor_critic', 'actor', 'planning'),
        'how actions are found: Eq. 7 and 8, Eq. 7 with V_R, or PlaNet',
        'Fig. 4, 7',
      ),
      ('plan_horizon', 12, 'agent steps that are planned', 'PlaNet'),
      ('plan_candidates', 1000, 'plans in each iteration', 'PlaNet'),
      ('plan_best', 100, 'plans that the next are drawn after', 'PlaNet'),
      ('plan_iterations', 10, 'iterations', 'PlaNet'),
      ('discount', 0.99, 'gamma, for each agent step', 'App. A'),
      ('disclam', 0.95, 'lambda of Eq. 6', 'App. A'),
      ('horizon', 15, 'H, agent steps of imagination', 'App. A'),
      (
        'action_dist',
        ('auto', 'tanh_normal', 'onehot'),
        'action model; auto: by the action space',
        'Eq. 3',
      ),
      ('action_init_std', 5.0, 'before tanh, at the start', 'release'),
      (
        'collect_action',
        ('sample', 'mode'),
        'action that exploration noise is added to (paper: mode)',
        'release',
      ),
      (
        'expl',
        ('auto', 'additive_gaussian', 'epsilon_greedy', 'completely_random'),
        'exploration; auto: the first, or the second for discrete actions',
        'App. A',
      ),
      ('expl_amount', 0.3, 'standard deviation, or epsilon', 'App. A'),
      (
        'expl_decay',
        0.0,
        'environment steps that halve it; 0: none',
        'release',
      ),
      (
        'expl_ramp',
        0,
        'updates in which it goes to the least linearly; 0: none',
        'App. A',
      ),
      ('expl_min', 0.0, 'least amount', 'release'),
    ],
  }


PRESETS = {
  'paper': dict(
    num_units=300,
    reward_layers=3,
    pcont_layers=3,
    value_layers=3,
    actor_layers=3,
    collect_action='mode',
  ),
  # For machines without a GPU: small networks and batches. These see too
  # little to bring the KL above 3 nats, below which `free_nats` takes away the
  # transition model's gradient: so none, and a small beta. The action model
  # waits until there is a world model to learn from.
  'cpu': dict(
    batch_size=16,
    batch_length=16,
    cnn_depth=8,
    num_units=200,
    free_nats=0.0,
    kl_scale=0.03,
    prefill=10_000,
    pretrain=1500,
    actor_delay=1500,
    model_lr=1e-3,
    value_lr=3e-4,
    actor_lr=1e-4,
    eval_every=5000,
  ),
  # A whole run in about a minute, to see that everything works.
  'debug': dict(
    steps=800,
    eval_every=400,
    log_every=200,
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

# A whole run in a few minutes: small networks and batches, and an imagination
# that does not look further than these tasks need.
TOY = dict(
  action_repeat=1,
  time_limit=50,
  steps=10_000,
  eval_every=1000,
  log_every=500,
  prefill=2500,
  deter_size=64,
  stoch_size=16,
  num_units=64,
  cnn_depth=8,
  free_nats=0.0,
  batch_size=16,
  batch_length=8,
  train_every=100,
  train_steps=20,
  model_lr=3e-3,
  value_lr=3e-4,
  actor_lr=3e-4,
  horizon=8,
  discount=0.9,
)

# "Discrete control" (Appendix A): Atari and DeepMind Lab.
DISCRETE = dict(
  action_repeat=4,
  time_limit=108_000,
  clip_rewards='tanh',
  pcont=True,
  kl_scale=0.1,
  horizon=10,
  expl_amount=0.4,
  expl_min=0.1,
  expl_ramp=200_000,
)

# Defaults by task, or by the beginning of its name.
TASKS = {
  'toy_reach': TOY,
  'toy_catch': dict(
    TOY,
    pcont=True,
    kl_scale=0.1,
    batch_length=16,
    train_steps=40,
    pretrain=1000,
    actor_delay=1000,
    horizon=10,
    discount=0.97,
  ),
  'atari': DISCRETE,
  'dmlab': DISCRETE,
  'gym': dict(action_repeat=1, pcont=True),
}


def method_name(config):
  """What a run is called: dreamer, dreamer-contrastive, planet, ..."""
  behavior = dict(actor_critic='dreamer', actor='dreamer-actor')
  name = behavior.get(config.behavior, 'planet')
  if config.representation != 'reconstruction':
    name += f'-{config.representation}'
  return name


def define_config(task='dmc_walker_walk', preset='release'):
  """Defaults of a task and preset: `AttrDict` from flag to value."""
  config = tools.AttrDict()
  for flags in define_flags().values():
    for name, default, _, _ in flags:
      config[name] = default[0] if isinstance(default, tuple) else default
  config.update(TASKS.get(task) or TASKS.get(task.partition('_')[0], {}))
  config.update(PRESETS.get(preset, {}))
  config.update(task=task, preset=preset)
  return config


def _parse_value(default, text):
  """Reads `text` as the type of `default`; whole numbers may be 1e6."""
  if isinstance(default, bool):
    return {'True': True, 'False': False}[text]
  if isinstance(default, int):
    if float(text) != int(float(text)):
      raise ValueError(text)
    return int(float(text))
  value = type(default)(text)
  if isinstance(default, float) and not np.isfinite(value):
    raise ValueError(text)
  return value


class Parser(argparse.ArgumentParser):
  """Prints one line for an error, and exits with code 2."""

  def error(self, message):
    raise tools.UserError(message)


def parse_flags(argv):
  """Resolves the command line: defaults < task < preset < given flags.

  Raises:
    UserError: unknown flag, task or choice, wrong type, impossible value.
  """
  parser = Parser(
    description='Dreamer: learns to act from images by latent imagination.',
    epilog='The same command again resumes the run in its logdir.',
    allow_abbrev=False,
  )
  known = {}
  for group, flags in define_flags().items():
    section = parser.add_argument_group(group)
    for name, default, text, source in flags:
      choices = default if isinstance(default, tuple) else None
      default = known[name] = default[0] if choices else default
      shown = '' if name == 'logdir' else f'{default}; '
      section.add_argument(
        f'--{name}',
        metavar='|'.join(choices) if choices else type(default).__name__,
        help=f'{text} ({shown}{source})'.replace('; )', ')').replace(' ()', ''),
        required=name == 'logdir',
      )
  given, unknown = parser.parse_known_args(argv)
  for word in unknown:
    names = [f'--{name}' for name in known]
    hint = tools.nearest(word.split('=')[0], names) or '; --help lists all'
    raise tools.UserError(f'unknown argument {word}{hint}')
  given = {k: v for k, v in vars(given).items() if v is not None}
  values = {k: _read_flag(k, v) for k, v in given.items()}
  task = values.get('task', known['task'])
  config = define_config(task, values.get('preset', known['preset']))
  config.update(values)
  _check_config(config)
  return config


def _read_flag(name, text):
  flags = {f[0]: f[1] for group in define_flags().values() for f in group}
  default = flags[name]
  if isinstance(default, tuple):
    if text not in default:
      raise tools.UserError(
        f'--{name} is one of {", ".join(default)}, not {text!r}'
        + tools.nearest(text, default)
      )
    return text
  try:
    return _parse_value(default, text)
  except (ValueError, KeyError, OverflowError):
    kind = {bool: 'True or False', int: 'a whole number', float: 'a number'}
    raise tools.UserError(
      f'--{name} takes {kind[type(default)]}, not {text!r}'
    ) from None


def _check_config(config):
  """Refuses what would fail later, with the flag's name."""
  wrappers.check_task(config.task)
  wrappers.check_parallel(config.task, config.parallel)
  least = dict.fromkeys(
    ('envs', 'action_repeat', 'batch_size', 'train_every', 'eval_every'), 1
  )
  least.update(dict.fromkeys(('deter_size', 'stoch_size', 'num_units'), 1))
  least.update(cnn_depth=1, batch_length=2, horizon=2, prefill=0, steps=0)
  least.update(plan_horizon=1, plan_iterations=1, plan_best=2)
  least.update(plan_candidates=config.plan_best, contrast_window=1)
  for name, value in least.items():
    if config[name] < value:
      raise tools.UserError(f'--{name} is at least {value}, not {config[name]}')
  rows = config.time_limit // config.action_repeat + 1
  if config.batch_length > rows:
    raise tools.UserError(
      f'--batch_length {config.batch_length} is longer than any episode: '
      f'{config.time_limit} environment steps with action repeat '
      f'{config.action_repeat} make {rows} rows. Choose {rows} or less.'
    )


def resolve_actions(config, actspace):
  """Sets what is `auto` by the action space; UserError where flags misfit."""
  discrete = getattr(actspace, 'discrete', False)
  kind, dist, expl = 'continuous', 'tanh_normal', 'additive_gaussian'
  if discrete:
    kind, dist, expl = 'discrete', 'onehot', 'epsilon_greedy'
  if discrete and config.behavior == 'planning':
    raise tools.UserError(
      f'{config.task} has discrete actions, and --behavior planning needs '
      'continuous ones; choose actor_critic or actor'
    )
  if config.action_dist not in ('auto', dist):
    raise tools.UserError(
      f'{config.task} has {kind} actions: --action_dist is {dist} there, '
      f'not {config.action_dist}'
    )
  if discrete and config.expl == 'additive_gaussian':
    raise tools.UserError(
      f'{config.task} has discrete actions: --expl is epsilon_greedy there'
    )
  config.action_dist = dist
  config.expl = expl if config.expl == 'auto' else config.expl


# --- The file ---------------------------------------------------------------

FORMAT = 1  # of logdirs: older code refuses those of newer

# What may not change when a run resumes: it shapes weights or the replay.
FIXED = (
  *('task', 'action_repeat', 'deter_size', 'stoch_size', 'num_units'),
  *('reward_layers', 'pcont_layers', 'value_layers', 'actor_layers'),
  *('cnn_depth', 'pcont', 'action_dist', 'representation', 'behavior'),
)


class UnreadableError(tools.UserError):
  """A config.json that was cut short or is not one."""


def check_logdir(config):
  """UserError if the run in it, or what else is there, is not this run."""
  logdir, path = config.logdir, config.logdir / 'config.json'
  if path.exists():
    try:
      _check_resume(config, _read_config(path)['config'])
    except UnreadableError:
      path.rename(path.with_suffix('.json.broken'))
      tools.warn(
        f'{path} is not readable and is now {path.name}.broken; going on with '
        'the flags given'
      )
    return
  names = {p.name for p in logdir.iterdir()}
  if 'config.json.broken' in names:
    return
  # What a run leaves that was killed at its very start.
  own = r'episodes|lock(-\d+)?|writable(-\d+)?|.*\.tmp'
  others = sorted(n for n in names if not re.fullmatch(own, n))
  if others:
    raise tools.UserError(
      f'--logdir {logdir} holds something else ({", ".join(others[:3])}) and '
      'no config.json; choose a new folder'
    )


def _read_config(path):
  """What `write_config` wrote; UserError if broken or of newer code."""
  try:
    record = json.loads(path.read_text())
    record = dict(record, config=dict(record['config']))
  except (ValueError, KeyError, TypeError):
    raise UnreadableError(
      f'{path} is not readable as the configuration of a run'
    ) from None
  unknown = set(record['config']) - set(define_config())
  if record.get('format', FORMAT) != FORMAT or unknown:
    what = f'flags {", ".join(sorted(unknown))}' if unknown else 'format'
    raise tools.UserError(
      f'{path} is of another version of this code ({what}); use that version'
    )
  return record


def load_config(logdir):
  """The configuration of a run, as `define_config` gives it.

  Raises:
    UserError: the folder does not hold a run that this code can read.
  """
  path = pathlib.Path(logdir) / 'config.json'
  if not path.exists():
    raise tools.UserError(
      f'--logdir {logdir} is not the logdir of a run: there is no config.json'
    )
  saved = _read_config(path)['config']
  if not {'task', 'preset'} <= set(saved):
    raise UnreadableError(f'{path} does not say its task and preset')
  config = define_config(saved['task'], saved['preset'])
  config.update(saved, logdir=pathlib.Path(logdir))
  return config


def write_config(config):
  """Writes config.json: flags, versions, and when the run first started."""
  path = config.logdir / 'config.json'
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  record = _read_config(path) if path.exists() else dict(started=now)
  record.update(method=method_name(config), format=FORMAT)
  record['config'] = {k: _plain(v) for k, v in config.items()}
  record['versions'] = versions()
  with tools.atomic_write(path) as file:
    file.write((json.dumps(record, indent=2) + '\n').encode())


def _plain(value):
  return str(value) if isinstance(value, pathlib.Path) else value


def versions():
  """Of the packages that matter, by name."""
  packages = (
    *('tensorflow', 'keras', 'tensorflow-probability', 'dm-control'),
    *('mujoco', 'gym', 'numpy'),
  )
  versions = {p: importlib.metadata.version(p) for p in packages}
  return dict(versions, python=sys.version.split()[0])


def _check_resume(config, saved):
  for name in FIXED:
    if name not in saved or 'auto' in (saved[name], config[name]):
      continue
    if saved[name] != config[name]:
      raise tools.UserError(
        f'--logdir {config.logdir} holds a run with --{name} {saved[name]}, '
        f'not {config[name]}. Resume it with the flags that it was started '
        f'with (see {config.logdir / "config.json"}) or choose a new folder.'
      )
