"""What tasks there are: one registry of suites, and environments by name.

A task is called <suite>_<name>, such as dmc_walker_walk. What follows from its
suite (its defaults, whether it renders) is read from here and said nowhere
else. No TensorFlow.
"""

import dataclasses
import typing

import atari_env
import dmc_env
import lab_env
import opengl
import spaces
import toys
import wrappers
from cli import nearest
from gym_env import GymEnv
from gym_make import right_form
from spaces import gym
from worker_calls import TaskError

# --- Defaults of flags ------------------------------------------------------

# A whole run in a few minutes: small networks and batches, and an imagination
# that does not look further than these tasks need.
TOY = dict(
  action_repeat=1,
  time_limit=50,
  steps=10_000,
  eval_every=1000,
  log_every=500,
  log_images_every=2500,
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
CATCH = dict(
  TOY,
  pcont=True,
  kl_scale=0.1,
  batch_length=16,
  train_steps=40,
  pretrain=1000,
  actor_delay=1000,
  horizon=10,
  discount=0.97,
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


# --- The registry -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
  """How an environment is made; see `make_task`."""

  action_repeat: int = 2
  time_limit: int = 1000
  seed: int | None = None
  test: bool = False
  args: dict | None = None
  inputs: str = 'image'
  record: str = ''
  cameras: tuple = ()
  detail: str = 'auto'
  function: typing.Callable | None = None
  log_info: str = ''


class Suite(typing.NamedTuple):
  """A family of tasks.

  Attributes:
    make: function (name, `Options`) of an environment that repeats actions.
    form: how its tasks are written.
    names: function without arguments that lists the tasks, without the suite's
      name; None if only the suite itself knows them.
    defaults: flags that differ from those of the control suite; by the task's
      name, '' for all.
    renders: whether it may use OpenGL.
    informs: whether it takes `log_info`.
    require: function of a task's name that raises TaskError where the suite
      is not installed.
  """

  make: typing.Callable
  form: str
  names: typing.Callable | None = None
  defaults: dict = {}  # noqa: RUF012 (never changed)
  renders: bool = False
  informs: bool = False
  require: typing.Callable = lambda name: None


def _dmc(name, opts):
  record = f'{opts.record},state' if opts.record else 'state'
  env = dmc_env.DeepMindControl(
    name,
    cameras=opts.cameras,
    seed=opts.seed,
    inputs=opts.inputs,
    record=record,
    detail=opts.detail,
  )
  return wrappers.ActionRepeat(env, opts.action_repeat)


def _atari(name, opts):
  return atari_env.Atari(
    name,
    opts.action_repeat,
    life_done=not opts.test,
    seed=opts.seed,
    inputs=opts.inputs,
    record=opts.record,
  )


def _lab(name, opts):
  return lab_env.DeepMindLab(
    name,
    opts.action_repeat,
    seed=opts.seed,
    test=opts.test,
    inputs=opts.inputs,
    record=opts.record,
  )


def _gym(name, opts):
  with opengl.graphics_errors():
    env = GymEnv(
      name,
      seed=opts.seed,
      args=opts.args,
      inputs=opts.inputs,
      record=opts.record,
      function=opts.function,
      log_info=opts.log_info,
    )
  if isinstance(env.longest, int) and env.longest > opts.time_limit:
    cut = f'Episodes are cut after {opts.time_limit} of {env.longest} steps'
    env.about = [*env.about, f'{cut} (--time_limit).']
  return wrappers.ActionRepeat(env, opts.action_repeat)


def _toy(name, opts):
  env = toys.TOYS[name](opts.seed, opts.inputs, opts.record)
  return wrappers.ActionRepeat(env, opts.action_repeat)


# Gym marks the ends of episodes, so that they can be predicted.
GYM = dict(action_repeat=1, pcont=True)
# As World Models (Ha and Schmidhuber, 2018) did: each of 1,000 frames is acted
# in, from the first on, and ends are not predicted.
CAR_RACING = dict(GYM, time_limit=1000, pcont=False)

SUITES = dict(
  dmc=Suite(
    _dmc,
    'dmc_<domain>_<task>',
    names=lambda: list(dmc_env.DMC_TASKS),
    renders=True,
  ),
  atari=Suite(
    _atari,
    'atari_<game>',
    names=atari_env.atari_games,
    defaults={'': DISCRETE},
  ),
  dmlab=Suite(
    _lab,
    'dmlab_<level>',
    defaults={'': DISCRETE},
    renders=True,
    require=lab_env.require_lab,
  ),
  gym=Suite(
    _gym,
    'gym_<id>',
    defaults={'': GYM, 'CarRacing-v3': CAR_RACING},
    renders=True,
    informs=True,
  ),
  custom=Suite(
    _gym,
    'custom_<name> (of dreamer.train)',
    defaults={'': GYM},
    renders=True,
    informs=True,
  ),
  toy=Suite(
    _toy,
    'toy_reach, toy_catch, toy_robot',
    names=lambda: list(toys.TOYS),
    defaults=dict(reach=TOY, catch=CATCH, robot=TOY),
  ),
)


def find(task):
  """(suite, name of the task in it); (None, '') for no name of a task."""
  family, _, name = task.partition('_')
  suite = SUITES.get(family) if name else None
  return suite, name if suite else ''


def defaults(task):
  """Flags of a task that differ from those of the control suite."""
  suite, name = find(task)
  if not suite:
    return {}
  return {**suite.defaults.get('', {}), **suite.defaults.get(name, {})}


def task_names():
  """Names of all tasks that can be listed (not of Gym, Lab)."""
  return [
    f'{family}_{name}'
    for family, suite in SUITES.items()
    for name in (suite.names or list)()
  ]


def check_task(task):
  """Raises TaskError, with the nearest names, unless `task` is a real one.

  Names of Gym and of DeepMind Lab are only known to these, when they load.
  """
  suite, name = find(task)
  if suite and not suite.names:
    suite.require(name)
    return
  names = task_names()
  if task in names:
    return
  form = right_form(task)
  hint = f'; here it is written {form}' if form else nearest(task, names)
  if not hint:
    forms = ', '.join(suite.form for suite in SUITES.values())
    hint = f'; there are {forms}'
  raise TaskError(f'There is no task {task!r}{hint}')


def check_function(task, function):
  """Raises TaskError unless custom tasks, and no others, have a function."""
  custom = task.startswith('custom_')
  if custom and not function:
    raise TaskError(
      f'{task} is made by a function: train it with dreamer.train(make_env, '
      'logdir), and load it with dreamer.load(logdir) (docs/library.md)'
    )
  if function and not custom:
    raise TaskError(
      f'{task} has an environment of its own: give None for make_env, or '
      'leave the task out'
    )


def check_parallel(task, strategy, inputs='image'):
  """Raises TaskError where `strategy` would crash for `task`.

  Tasks that render (those of `inputs` without an image do not) cannot share a
  process with TensorFlow, so 'thread' and 'none' are refused for them in a
  process that has imported it. 'ray' is refused where it is not installed.
  """
  if strategy == 'ray':
    import ray_cluster  # optional

    ray_cluster.require_ray()
  suite, _ = find(task)
  renders = suite.renders and spaces.names_image(inputs)
  if strategy in ('thread', 'none') and renders:
    opengl.refuse_tensorflow(task)


# --- Environments by name ---------------------------------------------------


def make_task(task, *args, **kwargs):
  """Makes the environment of a task, with the wrappers that it needs.

  Args:
    task: a name from `task_names()`, gym_<id> or dmlab_<level>.
    action_repeat: environment steps per agent step.
    time_limit: longest episode in environment steps.
    seed: int; the same seed gives the same trajectory. None: a fresh one.
    test: for evaluation: whole games of Atari, held-out levels of Lab.
    args: arguments of the constructor of a gym_<id>, by name.
    inputs: observations that the agent sees, names with commas between them;
      `state` stands for all vectors.
    record: observations to be stored besides, likewise; '' for none.
    cameras: of the control suite: indices, in the order of the images.
    detail: of images of the control suite: auto, full or low.
    function: makes the environment of a custom_<name>.
    log_info: numbers of a gym_<id> or custom_<name> to be told, likewise; see
      `GymEnv`.

  Returns:
    An environment with actions in [-1, 1], or one-hot where they are discrete,
    and observations: those, 'reward', and in the control suite all vectors. It
    has `about`, a list of sentences on what of it the agent sees.

  Raises:
    TaskError: there is no such task, or no such observation in it.
    RenderError: the task renders, and OpenGL does not work.
  """
  check_task(task)
  suite, name = find(task)
  opts = Options(*args, **kwargs)
  check_function(task, opts.function)
  env = suite.make(name, opts)
  discrete = gym.spaces.Discrete, gym.spaces.MultiDiscrete
  if isinstance(env.action_space, discrete):
    env = wrappers.OneHotAction(env)
  else:
    env = wrappers.NormalizeActions(env)
  env = wrappers.TimeLimit(env, opts.time_limit // opts.action_repeat)
  env = wrappers.RewardObs(wrappers.CheckFinite(env, task))
  return env if opts.seed is None else wrappers.EpisodeSeeds(env, opts.seed)
