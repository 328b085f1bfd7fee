"""The command line of a run: from flags to a configuration that can be run.

Precedence: flag > run in the logdir > preset > inputs > task > default. No
TensorFlow.
"""

import os
import re

import arguments
import runfile
import suites
from cli import UserError
from configs import FLAGS, START, define_config


def parse_flags(argv, resumes=True):
  """Parses and checks the command line; returns the configuration.

  Args:
    argv: list of words.
    resumes: whether a run in the logdir goes on, with its values of flags that
      are not given.

  Raises:
    UserError: unknown flag or task, a value that a flag does not take, values
      that do not go together.
  """
  parser = arguments.Parser(
    'Dreamer: learns to act from images by latent imagination.',
    epilog='The same command again resumes the run in its logdir.',
  )
  for group, flags in FLAGS.items():
    section = parser.add_argument_group(group)
    for name, kind, default, meaning, source, _ in flags:
      shown = '' if name == 'logdir' else str(default)
      about = '; '.join(filter(None, (shown, source)))
      parser.flag(
        f'--{name}',
        kind,
        default,
        f'{meaning} ({about})' if about else meaning,
        section,
        required=name == 'logdir',
      )
  given = parser.parse_given(argv)
  start = {k: given[k] for k in START if k in given}
  config = define_config(**start)
  kept = _kept(config, given) if resumes else {}
  defaults = dict(config)
  config.update({**kept, **given})
  try:
    _check_config(config)
    _check_free(config, given)
  except UserError as error:
    own = {k: v for k, v in kept.items() if k not in given and v != defaults[k]}
    named = set(re.findall(r'--(\w+)', str(error))) & own.keys()
    if not named:
      raise
    words = [f'--{name} {runfile.quoted(own[name])}' for name in sorted(named)]
    words = f'(the run in the logdir has {", ".join(words)})'
    raise UserError(f'{error} {words}') from None
  return config


def _kept(config, given):
  """Flags of the run in the logdir, if one goes on there.

  Of several processes (TF_CONFIG) only one may see that run; all are given
  all flags.
  """
  if os.environ.get('TF_CONFIG'):
    return {}
  start = {k: config[k] for k in START}
  kept = runfile.flags_of_run(given['logdir'], start, given.get('role'))
  if 'steps' in given and 'updates' not in given:  # which would go before it
    kept.pop('updates', None)
  return kept


def _check_config(config):
  """Refuses values that do not go together, with the flags' names."""
  seen = f'{config.inputs},{config.record}'
  suites.check_parallel(config.task, config.parallel, seen)
  if config.cameras and not config.task.startswith('dmc_'):
    raise UserError(
      f'--cameras are of the control suite; {config.task} has none to choose'
    )
  if config.render_detail != 'auto' and not config.task.startswith('dmc_'):
    raise UserError(
      f'--render_detail is of the control suite; {config.task} has none'
    )
  if config.init_only and not config.init_from:
    raise UserError('--init_only says what of --init_from is taken: give both')
  _check_offline(config)
  if config.env_args and not config.task.startswith('gym_'):
    raise UserError(
      f'--env_args is for gym_ tasks; {config.task} takes no arguments'
    )
  _check_log_info(config)
  if config.plan_candidates < config.plan_best:
    raise UserError(
      f'--plan_candidates is at least --plan_best, {config.plan_best}, not '
      f'{config.plan_candidates}'
    )
  rows = config.time_limit // config.action_repeat + 1
  if config.batch_length > rows and not config.offline:
    hint = f'Choose {rows} or less'
    if rows < 2:
      hint = 'Choose a larger --time_limit or a smaller --action_repeat'
    raise UserError(
      f'--batch_length {config.batch_length} is longer than any episode: '
      f'{config.time_limit} environment steps with action repeat '
      f'{config.action_repeat} make {rows} rows. {hint}.'
    )


def _check_log_info(config):
  names = config.log_info.split(',')
  if config.log_info and not suites.find(config.task)[0].informs:
    raise UserError(
      f'--log_info is for gym_ and custom_ tasks; {config.task} has no info'
    )
  for name in ('return', 'length'):
    if name in names:
      raise UserError(f'--log_info: {name} is logged of every episode anyway')


def _check_offline(config):
  """The number of updates of a run without collecting follows from flags."""
  if not config.offline:
    if config.updates:
      raise UserError(
        '--updates is for --offline; else updates follow from --steps, '
        '--train_every and --train_steps'
      )
    return
  if not os.path.isdir(config.offline):
    raise UserError(f'--offline {config.offline}: there is no such folder')
  if not config.train_steps:
    raise UserError('--offline needs --train_steps of 1 or more')
  if config.behavior == 'evolution' and config.evolve == 'environment':
    raise UserError(
      '--offline has no episodes for --evolve environment; choose imagination'
    )


def _check_free(config, given):
  """Refuses what acting and learning at paces of their own cannot have."""
  c = config
  if c.learner == 'scheduled':
    if c.role != 'both':
      raise UserError(
        f'--role {c.role} is of --learner free, where two processes act and '
        'learn at paces of their own: give both flags'
      )
    if c.max_ratio:
      raise UserError(
        '--max_ratio bounds the updates of --learner free; else they follow '
        'from --train_every and --train_steps'
      )
    return
  for name in ('train_every', 'train_steps'):
    if name in given:
      raise UserError(
        f'--{name} is of --learner scheduled; with --learner free updates go '
        f'on without end, or up to --max_ratio for each environment step'
      )
  if c.deterministic:
    raise UserError(
      '--learner free depends on the clock, and --deterministic True must '
      'not: choose one of them'
    )
  if c.offline:
    raise UserError(
      '--offline learns without acting, at full speed already: leave out '
      '--learner free'
    )
  if c.behavior == 'evolution' and c.evolve == 'environment':
    raise UserError(
      '--evolve environment gives each episode a controller, and --learner '
      'free changes what acts within it: choose --evolve imagination'
    )
