"""What users bring: environments as people write them, and their modules.

Real environments of Gymnasium, and of Gym where the two differ, most of them
in real workers.
"""

import functools
import importlib
import os
import sys

import gymnasium
import numpy as np
import pytest

import cli
import episode_files
import gym_env
import gym_make
import processes
import suites
import wrappers
from spaces import gym
from user_envs import (
  PIXELS,
  Base,
  S,
  Telling,
  innermost,
  make,
  register,
  variant,
)
from worker_calls import RenderError, TaskError

pytestmark = pytest.mark.slow


# --- Optional methods -------------------------------------------------------


class NoSeed(Base):
  def reset(self):
    self.time = 0
    return self.obs(), {}


class OldNoSeed(gym.Env):
  """Crafter's interface: no seed, four values, nothing more."""

  observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
  action_space = gym.spaces.Discrete(2)

  def reset(self):
    self.time = 0
    return np.zeros((64, 64, 3), np.uint8)

  def step(self, action):
    self.time += 1
    return np.zeros((64, 64, 3), np.uint8), 1.0, self.time == 9, {}


class TakesAll(gymnasium.Wrapper):
  """Hands everything on, so that its signature says nothing."""

  def reset(self, **kwargs):
    return self.env.reset(**kwargs)


@pytest.mark.parametrize(
  'kind, library',
  [
    (NoSeed, gymnasium),
    (OldNoSeed, gym),
    (lambda **kwargs: TakesAll(NoSeed(**kwargs)), gymnasium),
  ],
)
def test_what_cannot_be_seeded_runs_and_says_so(kind, library):
  name = 'Wrapped' if kind.__name__ == '<lambda>' else None
  task = register(kind, name, library)
  env = suites.make_task(task, 1, 100, seed=3)
  for _ in range(2):
    assert env.reset()['image'][0, 0, 0] == 0
    done = False
    while not done:
      action = np.eye(2)[0] if library is gym else np.zeros(2)
      _, _, done, _ = env.step(action.astype(np.float32))
  assert sum('cannot be seeded' in line for line in env.about) == 1
  assert not any('seeded' in x for x in make(Base, seed=3).about)


class PlainRender(Base):
  observation_space = S.Box(-1, 1, (5,), np.float32)

  def __init__(self):
    super().__init__()


class NoCamera(PlainRender):
  def render(self):
    raise RuntimeError('no camera is attached')


class NoFrames(PlainRender):
  def render(self):
    return []


@pytest.mark.parametrize(
  'kind, why', [(NoCamera, 'no camera is att'), (NoFrames, 'list index out')]
)
def test_what_cannot_draw_has_no_images_and_says_what_to_do(kind, why):
  words = f'has no images.*cannot be used: {why}.*--inputs state .*rgb_array'
  with pytest.raises(TaskError, match=words):
    make(kind)
  assert make(kind, inputs='state').reset()['state'].shape == (5,)


class OldRender(PlainRender):
  def render(self, mode='human'):
    return super().render() if mode == 'rgb_array' else None


class ModernRender(Base):
  observation_space = S.Box(-1, 1, (5,), np.float32)

  def render(self):
    return super().render() if self.render_mode == 'rgb_array' else None


@pytest.mark.parametrize('kind', [PlainRender, OldRender, ModernRender])
def test_rendering_of_all_versions(kind):
  env = make(kind)
  assert (env.reset()['image'] == 200).all()
  assert 'what the environment renders' in env.about[0]
  assert env.about[1] == 'Not used: the observation (float32 [5]).'


# --- Wrappers and rewards ---------------------------------------------------


class Endless(Base):
  length = 10**9


class OldEndless(gym.Env):
  observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
  action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

  def reset(self, seed=None, options=None):
    super().reset(seed=seed)
    return np.zeros((64, 64, 3), np.uint8), {}

  def step(self, action):
    return np.zeros((64, 64, 3), np.uint8), 1.0, False, False, {}


@pytest.mark.parametrize(
  'library, base', [(gymnasium, Endless), (gym, OldEndless)]
)
def test_the_users_own_wrappers_stay(library, base):
  """What the entry point puts around counts, as does the registration."""

  def limited():
    return library.wrappers.TimeLimit(base(), 7)

  name = f'Limited{base.__name__}-v0'
  library.register(name, entry_point=limited, max_episode_steps=50)
  env = suites.make_task(f'gym_{name}', 1, 100)
  env.reset()
  ends = [env.step(np.zeros(2, np.float32)) for _ in range(7)]
  assert [end[2] for end in ends] == [False] * 6 + [True]
  assert ends[-1][3]['discount'] == 1
  kept = innermost(env)
  assert type(kept).__name__ == 'TimeLimit' and isinstance(kept.env, base)
  name = f'Registered{base.__name__}-v0'
  library.register(name, entry_point=base, max_episode_steps=5)
  env = suites.make_task(f'gym_{name}', 1, 100)
  for _ in range(2):
    env.reset()
    ends = [env.step(np.zeros(2, np.float32)) for _ in range(5)]
    assert [end[2] for end in ends] == [False] * 4 + [True]
  assert type(innermost(env)) is base


@pytest.mark.parametrize(
  'reward', [1, True, np.float32(1), np.array(1.0), np.array([[1]], np.int8)]
)
def test_rewards_of_one_element(reward):
  env = make(variant(reward=lambda self: reward))
  env.reset()
  assert env.step(np.zeros(2, np.float32))[1] == 1.0


@pytest.mark.parametrize(
  'reward, words',
  [
    (np.zeros(3), r'reward of shape \(3,\)'),
    (np.zeros(0), r'reward of shape \(0,\)'),
    (None, 'reward None'),
    ('much', "reward 'much'"),
  ],
)
def test_other_rewards_name_task_and_shape(reward, words):
  kind = variant(reward=lambda self: reward)
  env = make(kind)
  env.reset()
  with pytest.raises(ValueError, match=f'{kind.__name__}.*{words}'):
    env.step(np.zeros(2, np.float32))  # of one episode, which is dropped


# --- Arguments and names ----------------------------------------------------


class Map(Base):
  def __init__(self, map_name, render_mode=None):
    super().__init__(render_mode)
    self.map_name = map_name


def test_arguments_of_the_constructor():
  env = make(Map, args={'map_name': '4x4'})
  assert innermost(env).map_name == '4x4'
  for args, words in (
    ({}, "no --env_args: .*'map_name'"),
    ({'map': 1}, """--env_args '{"map": 1}': .*'map'"""),
    ({'map_name': 1, 'size': 2}, "--env_args .*'size'"),
  ):
    with pytest.raises(TaskError, match=words):
      make(Map, args=args)


class NoMode(Base):
  """Does not know how to render."""

  def __init__(self, size=3):
    super().__init__()


def test_a_wrong_argument_is_named_where_there_is_no_render_mode():
  assert make(NoMode, args={'size': 4}).reset()['image'].shape == (64, 64, 3)
  with pytest.raises(TaskError, match="argument 'sise'"):
    make(NoMode, args={'sise': 4})


@pytest.mark.parametrize('steps', [5, 20])
def test_another_limit_than_the_registered_one(steps):
  task = f'gym_{Endless.__name__}Limited-v0'
  if task[4:] not in gymnasium.registry:
    gymnasium.register(task[4:], entry_point=Endless, max_episode_steps=10)
  for args, expected in (({}, 10), ({'max_episode_steps': steps}, steps)):
    env = suites.make_task(task, 1, 100, args=args)
    env.reset()
    ends = [env.step(np.zeros(2, np.float32))[2:] for _ in range(expected)]
    assert [done for done, _ in ends] == [False] * (expected - 1) + [True]
    assert ends[-1][1]['discount'] == 1
    assert not any('cut after' in line for line in env.about)
    short = suites.make_task(task, 1, 3, args=args).about
    assert (
      f'Episodes are cut after 3 of {expected} steps (--time_limit).' in short
    )


class Broken(Base):
  def __init__(self, render_mode=None):
    raise TypeError('unsupported operand')


def test_an_error_within_a_constructor_is_its_own():
  with pytest.raises(TypeError, match='operand'):
    make(Broken)


@pytest.mark.parametrize(
  'task, form',
  [
    ('crafter_reward', 'gym_crafter:CrafterReward-v1'),
    ('CrafterReward-v1', 'gym_crafter:CrafterReward-v1'),
    ('metaworld_reach-v3', 'gym_metaworld:'),
    ('metaworld_door_open', '--env_args'),
    ('minigrid_empty', 'gym_minigrid:MiniGrid-Empty-8x8-v0'),
    ('MiniGrid-Empty-5x5-v0', 'gym_minigrid:MiniGrid-Empty-5x5-v0'),
    ('ALE/Pong-v5', 'gym_ale_py:ALE/Pong-v5'),
    ('CartPole-v1', 'gym_CartPole-v1'),
    ('Gym_CartPole-v1', 'written gym_CartPole-v1'),
    ('gymnasium_CartPole-v1', 'written gym_CartPole-v1'),
    ('gym/CartPole-v1', 'written gym_CartPole-v1'),
    ('dmc_walker_wlak', 'dmc_walker_walk'),
  ],
)
def test_names_of_other_suites_get_the_right_form(task, form):
  with pytest.raises(cli.UserError) as error:
    suites.check_task(task)
  assert form in str(error.value)


def test_an_id_without_its_package_gets_the_right_form():
  with pytest.raises(TaskError) as error:
    suites.make_task('gym_MiniGrid-Empty-5x5-v0')
  assert '--task gym_minigrid:MiniGrid-Empty-5x5-v0' in str(error.value)
  with pytest.raises(TaskError, match='pip install'):
    gym_make.make('metaworld:Meta-World/MT1', {})
  with pytest.raises(TaskError, match='current folder'):
    gym_make.make('no_such_module_of_mine:X-v0', {})


# --- What environments do to their own ---------------------------------------


class Reusing(Base):
  """Writes over the array that it gave, as many do."""

  observation_space = S.Box(-99, 99, (2,), np.float32)
  given = np.zeros(2, np.float32)

  def obs(self):
    self.given[:] = self.time
    return self.given


@pytest.mark.parametrize('strategy', ['none', 'thread', 'process'])
def test_an_array_that_is_used_again_is_copied(strategy):
  kind = functools.partial(suites.make_task, 'custom_reuse', 1, 5, 0)
  kind = functools.partial(kind, function=Reusing, inputs='state')
  env = wrappers.Collect(wrappers.Async(kind, strategy))
  env.reset()
  for _ in range(5):
    info = env.step(np.zeros(2, np.float32))[3]
  env.close()
  assert info['episode']['state'][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
  'keys, names',
  [
    (['/joint_states', 'a..b'], ['a.b', 'joint_states']),
    (['/'], ['state']),
    (['a/b', 'b', ('a', 'b')], ['a/b', 'a/b_', 'b']),
    (['a\0b', 'a\nb', ' c '], ['a b', 'a b_', 'c']),
    (['a\udcff', 'a?'], ['a?', 'a?_']),
    (['ä' * 40_000], ['ä' * 30_000]),
  ],
)
def test_any_key_is_the_name_of_an_array_in_a_file(tmp_path, keys, names):
  """Topics of ROS, for instance, begin with a slash."""
  parts = {}
  for key in keys:
    inner, key = (parts, key) if isinstance(key, str) else ({}, key)
    if isinstance(key, str):
      inner[key] = S.Box(-1, 1, (2,), np.float32)
    else:
      parts[key[0]] = S.Dict({key[1]: S.Box(-1, 1, (2,), np.float32)})
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = wrappers.Collect(
    suites.make_task('custom_keys', 1, 5, 0, function=kind, inputs='state'),
    [lambda episode: episode_files.save_episodes(tmp_path, [episode])],
  )
  env.reset()
  for _ in range(5):
    env.step(np.zeros(2, np.float32))
  assert sorted(env.observation_space.spaces) == sorted([*names, 'reward'])
  (path,) = tmp_path.glob('*.npz')
  rows = episode_files.EpisodeFile(path).read(0, 6)
  assert {*names, 'action', 'reward', 'discount'} == set(rows)


def test_an_observation_without_entries_is_no_hindrance():
  parts = dict(none=S.Box(-1, 1, (0,)), some=S.Box(-1, 1, (2,)))
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = suites.make_task('custom_none', function=kind)
  assert env.observation_space['image'].shape == (64, 64, 3)
  env = suites.make_task('custom_none', function=kind, inputs='state')
  assert env.observation_space['some'].shape == (2,)
  with pytest.raises(TaskError, match='no number.*among image, some'):
    suites.make_task('custom_none', function=kind, inputs='none')
  with pytest.raises(TaskError, match='--inputs state: there is no n'):
    kind = variant(observation_space=parts['none'])
    suites.make_task('custom_none', function=kind, inputs='state')


def test_too_many_choices_are_no_input():
  parts = dict(
    large=S.Discrete(2**31 - 1),
    several=S.MultiDiscrete([9_000, 9_000]),
    small=S.Discrete(3),
  )
  space = S.Dict(parts)
  kind = variant(observation_space=space, obs=lambda self: space.sample())
  env = suites.make_task('custom_large', function=kind, inputs='state')
  assert sorted(env.observation_space.spaces) == ['reward', 'small']
  words = r'large: .* has no such.*cannot be used: .*large. \(one of 2147'
  with pytest.raises(TaskError, match=words):
    suites.make_task('custom_large', function=kind, inputs='large')


@pytest.mark.parametrize('choice', [-1, 3])
def test_a_choice_that_there_is_not_is_an_error(choice):
  kind = variant(observation_space=S.Discrete(3), obs=lambda self: choice)
  env = make(kind, inputs='state')
  words = rf'the observation \(one of 3\): {choice} is none of the choices'
  with pytest.raises(ValueError, match=words):
    env.reset()


@pytest.mark.parametrize(
  'space', [S.Discrete(3, start=5), S.MultiDiscrete([3], start=[5])]
)
@pytest.mark.parametrize('choice', [np.nan, np.inf, 5.5, [5, 6]])
def test_what_is_no_number_of_a_choice_is_an_error(space, choice):
  kind = variant(observation_space=space, obs=lambda self: choice)
  env = make(kind, inputs='state')
  with pytest.raises(ValueError, match='choices'):
    env.reset()


@pytest.mark.parametrize('choice', [6, 6.0, np.uint8(6), [6], np.array([[6]])])
def test_choices_of_all_types(choice):
  space = S.Discrete(3, start=5)
  kind = variant(observation_space=space, obs=lambda self: choice)
  assert make(kind, inputs='state').reset()['state'].tolist() == [0, 1, 0]


def test_a_module_of_the_current_folder_without_a_worker(tmp_path, monkeypatch):
  (tmp_path / 'bare_module.py').write_text(
    'import gymnasium\n'
    "gymnasium.register('Bare-v0', entry_point=\n"
    "  'gymnasium.envs.classic_control:CartPoleEnv')\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  env = suites.make_task('gym_bare_module:Bare-v0', inputs='state')
  assert env.reset()['state'].shape == (4,)


def test_a_module_of_our_name_is_refused_without_a_worker(tmp_path):
  from processes import run_script

  (tmp_path / 'arguments.py').write_text(
    'import gymnasium\n'
    "gymnasium.register('Other-v0', entry_point=\n"
    "  'gymnasium.envs.classic_control:CartPoleEnv')\n"
  )
  code = """
    import functools
    import sys
    import suites
    import worker_calls
    import workers
    make = functools.partial(
      suites.make_task, 'gym_arguments:Other-v0', inputs='state')
    env = workers.Async(make, sys.argv[1])
    try:
      print(env.reset()['state'].shape)
    except worker_calls.TaskError as error:
      print(error)
    env.close()
  """
  env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
  done = run_script(code, 'thread', env=env)
  assert 'arguments is the name of one of this program' in done.stdout
  assert run_script(code, 'process', env=env).stdout == '(4,)\n'


@pytest.mark.parametrize('module', ['./mine', '../mine', '/mine', '.mine'])
def test_a_path_is_no_module(module):
  with pytest.raises(TaskError, match='is a path; the name of a'):
    suites.make_task(f'gym_{module}:Id-v0')


class Lengthening(Base):
  """A vector of another length than its space says, now and then."""

  observation_space = S.Box(-99, 99, (2,), np.float32)

  def obs(self):
    return np.zeros(2 + (self.time == 3), np.float32)


def test_a_vector_of_another_shape_than_announced_is_an_error():
  env = make(Lengthening, inputs='state')
  env.reset()
  with pytest.raises(ValueError, match=r'shape \(3,\); its space says \(2,\)'):
    for _ in range(3):
      env.step(np.zeros(2, np.float32))


def test_several_environments_in_one_are_refused():
  with pytest.raises(TaskError, match='gave several environments in'):
    suites.make_task(
      'custom_several',
      function=lambda: gymnasium.make_vec('CartPole-v1', num_envs=2),
      inputs='state',
    )


def test_numbers_of_an_episode_that_an_info_tells():
  """The last of them and the largest, of steps between actions, too."""
  register(Telling)
  env = suites.make_task(
    'gym_Telling-v0', 3, 100, log_info='success,left,name,gone'
  )
  for success in (1.0, 0.0):  # it was reset once when it was made
    env.reset()
    told = [env.step(np.zeros(2, np.float32))[3]['told'] for _ in range(4)]
    assert told[0] == dict(success=0, success_max=0, left=7, left_max=9)
    assert told[-1] == dict(success=0, success_max=success, left=0, left_max=9)
  env = suites.make_task('gym_Telling-v0', 1, 100)
  env.reset()
  assert 'told' not in env.step(np.zeros(2, np.float32))[3]


@pytest.mark.parametrize('number', [np.nan, np.inf, [1, 2], None, 'a', [[]]])
def test_what_is_no_number_of_an_info(number):
  register(Telling)
  env = suites.make_task('gym_Telling-v0', 1, 100, log_info='success,left')
  env.reset()
  inner = innermost(env)
  step = inner.step
  inner.step = lambda action: (*step(action)[:-1], dict(success=number, left=2))
  told = env.step(np.zeros(2, np.float32))[3]['told']
  assert told == dict(left=2.0, left_max=2.0)


@pytest.mark.parametrize('missed', [None, 'ball', 1.5])
def test_what_is_missed_may_be_something_else(missed):
  info = {'missed': missed}
  kind = variant(step=lambda self, action: (*Base.step(self, action)[:4], info))
  env = make(kind)
  env.reset()
  assert 'missed' not in env.step(np.zeros(2, np.float32))[3]


@pytest.mark.parametrize(
  'missed, taken', [(0, 0), (np.int8(3), 3), (True, None)]
)
def test_what_is_missed_is_a_whole_number(missed, taken):
  assert stepping(info={'missed': missed})[3].get('missed') == taken


def stepping(*, five=True, info=None, **changes):
  """What a step gives of an environment that says such things."""
  said = list({'terminated': False, 'truncated': False, **changes}.values())
  said = said if five else said[:1]
  kind = variant(step=lambda self, action: (self.obs(), 1.0, *said, info or {}))
  env = make(kind)
  env.reset()
  return env.step(np.zeros(2, np.float32))


def test_fewer_ticks_than_none_are_an_error():
  with pytest.raises(ValueError, match=r"Variant.* gave info\['missed'\] -1"):
    stepping(info={'missed': -1})


@pytest.mark.parametrize(
  'value, done', [(np.bool_(True), True), (1, True), (np.zeros(1), False)]
)
def test_what_says_that_an_episode_has_ended(value, done):
  assert stepping(terminated=value)[2] is done
  assert stepping(truncated=value)[2] is done
  cut = {'TimeLimit.truncated': value}
  assert stepping(five=False, info=cut, terminated=True)[3] == {
    'discount': float(done)
  }


@pytest.mark.parametrize('value', ['False', np.nan, 2, None, [1, 0]])
@pytest.mark.parametrize('name', ['terminated', 'truncated'])
def test_what_is_no_truth_is_an_error(name, value):
  with pytest.raises(ValueError, match=f'gave {name} .*; it is True or False'):
    stepping(**{name: value})


@pytest.mark.parametrize('result', [None, (1, 2.0, False), (PIXELS,) * 6])
def test_steps_of_other_numbers_of_values_are_errors(result):
  env = make(variant(step=lambda self, action: result))
  env.reset()
  with pytest.raises(ValueError, match=r'Variant.*step\(\) gave no tuple of f'):
    env.step(np.zeros(2, np.float32))


def test_no_info_is_an_empty_one():
  kind = variant(
    reset=lambda self, seed=None, options=None: (
      Base.reset(self, seed=seed)[0],
      None,
    ),
    step=lambda self, action: (*Base.step(self, action)[:4], None),
  )
  env = make(kind)
  assert env.reset()['image'].shape == (64, 64, 3)
  assert env.step(np.zeros(2, np.float32))[1] == 1.0


@pytest.mark.parametrize('info', [False, np.False_, 'none', 3])
def test_what_is_no_info_is_an_error(info):
  """As the last of four values that have `truncated` there."""
  env = make(
    variant(step=lambda self, action: (*Base.step(self, action)[:3], info))
  )
  env.reset()
  with pytest.raises(ValueError, match=r'Variant.*gave a \w+ for info'):
    env.step(np.zeros(2, np.float32))


@pytest.mark.parametrize(
  'obs, words',
  [
    (dict(pose=np.zeros(2)), "no 'goal', .*: it is a dict"),
    (None, "no '(pose|goal)', .*: it is a NoneType"),
    (np.zeros(4), "no '(pose|goal)', .*: it is a ndarray"),
  ],
)
def test_an_observation_without_a_part_is_an_error(obs, words):
  pair = S.Box(-1, 1, (2,), np.float32)
  kind = variant(
    observation_space=S.Dict(pose=pair, goal=pair), obs=lambda self: obs
  )
  with pytest.raises(ValueError, match=f'Variant.*the observation.*{words}'):
    make(kind, inputs='state').reset()


class OwnBox:
  """A space of the user's own, of which each is another."""

  dtype, shape = np.dtype(np.float32), (2,)

  def __init__(self, scale):
    self.low, self.high = np.full((2, 2), [[-scale], [scale]], np.float32)


OwnBox.__name__ = 'Box'


def test_bounds_and_spaces_may_be_made_anew():
  kind = variant(
    action_space=property(lambda self: OwnBox(1 + self.time)),
    step=lambda self, action: (self.obs(), 1.0, False, False, {}),
  )
  env = make(kind)
  for _ in range(2):
    env.reset()
    env.step(np.ones(2, np.float32))


def test_an_action_space_that_changes_is_an_error():
  def reset(self, seed=None, options=None):
    self.episodes = getattr(self, 'episodes', 0) + 1
    self.action_space = S.Discrete(3 if self.episodes < 3 else 2)
    return Base.reset(self, seed=seed)

  env = make(variant(reset=reset, action_space=S.Discrete(3)))
  env.reset()
  with pytest.raises(TaskError, match=r'Discrete\(2\) now, and took Discrete'):
    env.reset()


class Level(Base):
  """Draws its level once, by the seed of its first reset."""

  observation_space = S.Box(0, 1, (1,), np.float32)
  level = None

  def obs(self):
    if self.level is None:
      self.level = self.np_random.uniform()
    return np.array([self.level], np.float32)


def test_a_level_of_the_first_reset_is_that_of_the_seed():
  levels = [
    make(Level, inputs='state', seed=seed).reset()['state'].item()
    for seed in (7, 7, 8)
  ]
  assert levels[0] == levels[1] != levels[2]


class Numbered(Base):
  """Has a number of its own where Gym had a method."""

  def __init__(self, render_mode=None):
    super().__init__(render_mode)
    self.seed = 3

  def reset(self):
    self.time = 0
    return self.obs(), {}


def test_a_seed_that_is_no_method():
  env = make(Numbered, seed=1)
  assert env.reset()['image'].shape == (64, 64, 3)
  assert any('cannot be seeded' in line for line in env.about)


def test_a_reset_that_is_not_of_python():
  """Neither tells its arguments, nor takes any."""
  env = gym_env.GymEnv('x', seed=1, function=Base)
  env._env.reset = functools.partial(next, iter([(PIXELS.sample(), {})] * 9))
  assert gym_env._seeding(env._env) == 'reset'
  env._seeding = 'reset'
  assert env.reset()['image'].any() and env._seeding is None


class Strict(Base):
  """Draws nothing for programs, and checks what it is asked."""

  metadata = {'render_modes': ['human']}

  def __init__(self, render_mode=None):
    assert render_mode is None or render_mode in self.metadata['render_modes']
    super().__init__(render_mode)


def test_a_mode_of_rendering_that_is_refused_is_not_needed_for_images():
  assert make(Strict).reset()['image'].shape == (64, 64, 3)


class Pair(OldEndless):
  """An array and a dictionary, which is no info."""

  observation_space = gym.spaces.Tuple(
    [
      gym.spaces.Box(-1, 1, (3,), np.float32),
      gym.spaces.Dict(speed=gym.spaces.Box(-1, 1, (1,), np.float32)),
    ]
  )

  def reset(self):
    return np.ones(3, np.float32), dict(speed=np.zeros(1, np.float32))

  def step(self, action):
    return self.reset(), 1.0, False, {}


def test_a_pair_of_observations_is_not_taken_for_an_info():
  env = make(Pair, gym, inputs='0,1/speed')
  obs = env.reset()
  assert (obs['0'] == 1).all() and obs['1/speed'].shape == (1,)


class Fading(PlainRender):
  """Draws floats up to 255, some of them nearly black."""

  def render(self):
    value = (100.0, 1.0, 50.0)[self.time % 3]
    return np.full((64, 64, 3), value, np.float32)


def test_dark_frames_of_floats_are_dark():
  env = make(Fading)
  seen = [env.reset()['image'][0, 0, 0]]
  for _ in range(2):
    seen.append(env.step(np.zeros(2, np.float32))[0]['image'][0, 0, 0])
  assert seen == [100, 1, 50]


class NoFrame(PlainRender):
  """Draws no image in the second episode."""

  episodes = 0
  length = 3

  def reset(self, seed=None, options=None):
    NoFrame.episodes += 1
    return super().reset(seed=seed)

  def render(self):
    return super().render() if self.episodes != 3 else np.zeros(3)


def test_a_frame_that_is_none_drops_its_episode():
  """The first reset is of the constructor."""
  make_it = functools.partial(
    suites.make_task, 'custom_x', 1, 100, 0, function=NoFrame
  )
  errors = []
  env = wrappers.Collect(
    wrappers.Async(make_it), lost=errors.append, tolerant=True
  )
  env.number(0)
  try:
    for _ in range(3):
      env.reset()
      done = False
      while not done:
        _, _, done, _ = env.step(np.zeros(2, np.float32))
  finally:
    env.close()
  assert errors and 'shape (3,)' in str(errors[0])  # in each worker


class NoGraphics(Base):
  def __init__(self, render_mode=None):
    super().__init__(render_mode)
    from OpenGL import platform

    platform.fails_here()


def test_trouble_of_gymnasium_with_graphics_is_told_as_such(tmp_path):
  env = dict(os.environ, MUJOCO_GL='glfw')
  env.pop('DISPLAY', None)
  code = """
    import os
    import sys
    import suites
    import worker_calls
    os.chdir(sys.argv[1])  # where MuJoCo leaves a log
    try:
      suites.make_task('gym_HalfCheetah-v5', 1)
    except worker_calls.RenderError as error:
      print(error)
  """
  done = processes.run_script(code, str(tmp_path), env=env)
  assert 'OpenGL (MUJOCO_GL is glfw)' in done.stdout, done.stderr


def test_the_users_trouble_is_not_that_of_graphics(tmp_path, monkeypatch):
  """Whatever folders and files are called."""
  folder = tmp_path / 'my_OpenGL_render'
  folder.mkdir()
  (folder / 'gl_context_render.py').write_text('def go():\n  raise KeyError(7)')
  monkeypatch.syspath_prepend(folder)

  class Failing(Base):
    def __init__(self, render_mode=None):
      super().__init__(render_mode)
      importlib.import_module('gl_context_render').go()

  with pytest.raises(KeyError):
    make(Failing)


def test_trouble_with_graphics_is_told_as_such(monkeypatch):
  from OpenGL import platform

  code = compile(
    'def fails_here(): raise RuntimeError("no EGL")', platform.__file__, 'exec'
  )
  space = {}
  exec(code, space)
  monkeypatch.setattr(
    platform, 'fails_here', space['fails_here'], raising=False
  )
  with pytest.raises(RenderError, match='no EGL.*MUJOCO_GL=disabled'):
    make(NoGraphics)
