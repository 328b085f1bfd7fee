"""The agent as a library: acting, imagining, training, a SavedModel."""

import functools
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import cloudpickle
import gym
import gymnasium
import numpy as np
import pytest
import tensorflow as tf

import cli
import dreamer
import environments
import evaluate
import runfile
import saved_model
import workers
from gym_env import GymEnv
from worker_calls import TaskError

pytestmark = pytest.mark.slow
# As functions of a script are: workers do not import this, and TensorFlow.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROOT = pathlib.Path(__file__).parents[1]
SMALL = dict(preset='debug', precision='32', steps=500, batch_length=5)
SOFT = dict(SMALL, action_init_std=0.3)  # tanh does not hide differences


def cartpole():
  return gymnasium.make('CartPole-v1')


def words(logdir, **flags):
  flags = {**SOFT, 'logdir': logdir, **flags}
  return [f'--{k}={v}' for k, v in flags.items()]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """{name: logdir} of small runs, made when they are asked for."""
  folder = tmp_path_factory.mktemp('runs')

  @functools.cache
  def make(name):
    flags = dict(
      reach=dict(task='toy_reach', inputs='image,state'),
      catch=dict(task='toy_catch'),
      planet=dict(
        task='toy_reach', inputs='state', behavior='planning', plan_horizon=3
      ),
    )[name]
    assert dreamer.main(words(folder / name, **flags)) == 0
    return folder / name

  return make


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
  """A run on an environment of our own: vectors and discrete actions."""
  logdir = tmp_path_factory.mktemp('mine') / 'run'
  dreamer.train(cartpole, logdir, inputs='state', **SMALL)
  return logdir


@functools.cache
def load(logdir):
  return dreamer.load(logdir)


def observations(agent, count, envs=None):
  """Random observations as `act` takes them, one for each step."""
  rng = np.random.default_rng(0)
  batch = [] if envs is None else [envs]
  found = []
  for _ in range(count):
    obs = {}
    for name, shape in agent.inputs.items():
      if name == 'image':
        obs[name] = rng.integers(0, 256, [*batch, *shape], np.uint8)
      else:
        obs[name] = rng.normal(size=[*batch, *shape]).astype(np.float32)
    found.append(obs)
  return found


# --- Acting -----------------------------------------------------------------


def test_acts_as_the_agent_does_with_the_same_noise(runs):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  inner = agent._policy.agent
  memory = inner.world.dynamics.initial(1), tf.zeros([1, 2])
  seed = agent._policy.start(1, tf.constant(agent._seed))['seed']
  for time, obs in enumerate(observations(agent, 3)):
    seeds = tf.random.experimental.stateless_split(seed, 3)
    latent = inner.observe(
      {k: v[None] for k, v in obs.items()}, *memory, seeds[0]
    )
    feat = inner.world.dynamics.get_feat(latent)
    expected = inner.behavior.actor(feat).mode(seed=seeds[1])
    action = agent.act(obs, reset=time == 0)
    assert action.shape == (2,) and action.dtype == np.float32
    np.testing.assert_allclose(action, expected[0], atol=1e-5)
    memory, seed = (latent, expected), seeds[2]


def test_rows_of_a_batch_begin_and_go_on_alone(runs):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  first, second = observations(agent, 2, envs=3)

  def last(*resets):
    agent.reset(seed=5)
    agent.act(first, resets[0])
    action = agent.act(second, resets[1])
    return np.concatenate([action, agent._state['deter']], 1)

  both = last(True, [False, True, False])
  kept, begun = last(True, False), last(True, True)
  assert (kept != begun).any(1).all()
  np.testing.assert_array_equal(both[[0, 2]], kept[[0, 2]])
  np.testing.assert_array_equal(both[1], begun[1])
  # The first needs no reset; and nothing of another episode is left by it.
  np.testing.assert_array_equal(last(False, False), kept)


def test_sampling_draws_and_the_same_seed_repeats(runs):
  agent = load(runs('catch'))
  (obs,) = observations(agent, 1, envs=300)

  def act(seed, sample):
    agent.reset(seed)
    return agent.act(obs, sample=sample)

  drawn, mode = act(3, True), act(3, False)
  latent = {
    k: v for k, v in agent._state.items() if k not in ('action', 'seed')
  }
  inner = agent._policy.agent
  dist = inner.behavior.actor(inner.world.dynamics.get_feat(latent))
  chances = np.exp([dist.log_prob(np.tile(x, (300, 1))) for x in np.eye(3)])
  np.testing.assert_array_equal(mode.argmax(1), chances.argmax(0))
  np.testing.assert_allclose(drawn.mean(0), chances.mean(1), atol=0.12)
  assert drawn.mean(0).min() > 0.1  # the mode alone would not do
  np.testing.assert_array_equal(act(3, True), drawn)
  assert (act(4, True) != drawn).any()


def test_sampling_draws_though_the_run_collected_with_the_mode(runs, tmp_path):
  logdir = shutil.copytree(runs('catch'), tmp_path / 'run')
  record = json.loads((logdir / 'config.json').read_text())
  record['config']['collect_action'] = 'mode'
  (logdir / 'config.json').write_text(json.dumps(record))
  agent = dreamer.load(logdir)
  assert agent.config.collect_action == 'mode'  # a flag of the run
  (obs,) = observations(agent, 1, envs=100)

  def act(sample):
    agent.reset(seed=3)
    return agent.act(obs, sample=sample)

  assert (act(True) != act(False)).any()


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda obs: {'image': obs['image']}, 'the observation lacks state'),
    (lambda obs: obs['image'], 'The agent sees image, state: give all'),
    (lambda obs: {**obs, 'image': obs['image'] / 255}, 'images are uint8'),
    (lambda obs: {**obs, 'state': np.zeros(5)}, r'not \(4,\) or \(E, 4\)'),
    (lambda obs: {**obs, 'state': np.zeros((2, 4))}, 'Only some observations'),
    (lambda obs: {**obs, 'state': [0, 0, np.nan, 0]}, 'that are not finite'),
  ],
)
def test_wrong_observations(runs, change, message):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  (obs,) = observations(agent, 1)
  with pytest.raises(ValueError, match=message):
    agent.act(change(obs))


@pytest.mark.parametrize('reset', [None, 2, np.nan, [True, False]])
def test_a_reset_that_is_no_bool(runs, reset):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  (obs,) = observations(agent, 1)
  agent.act(obs, reset=True)
  with pytest.raises(ValueError, match='reset is a bool, or one for each'):
    agent.act(obs, reset=reset)


@pytest.mark.parametrize(
  'name, actions, message',
  [
    ('reach', np.full([3, 2], 1.1), r'within \[-1, 1\]'),
    ('reach', np.full([3, 2], np.nan), r'within \[-1, 1\]'),
    ('catch', np.ones([3, 3]), 'one-hot'),
    ('catch', np.eye(3) * 0.5, 'one-hot'),
  ],
)
def test_wrong_actions_to_imagine(runs, name, actions, message):
  agent = load(runs(name))
  agent.reset(seed=0)
  with pytest.raises(ValueError, match=message):
    agent.imagine(observations(agent, 1)[0], actions)


def test_home_folder(runs, monkeypatch):
  logdir = runs('reach')
  monkeypatch.setenv('HOME', str(logdir.parent))
  assert dreamer.load(f'~/{logdir.name}').config.logdir == logdir


def test_another_number_of_environments_needs_a_reset(runs):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  agent.act(observations(agent, 1, envs=2)[0])
  (obs,) = observations(agent, 1, envs=3)
  with pytest.raises(ValueError, match='There were 2 environments, not 3'):
    agent.act(obs)
  agent.reset()
  assert agent.act(obs).shape == (3, 2)


# --- Imagining --------------------------------------------------------------


def test_imagines_step_by_step_what_the_model_predicts(runs):
  agent = load(runs('reach'))
  agent.reset(seed=0)
  first, second = observations(agent, 2)
  agent.act(first, reset=True)
  before = {k: np.array(v) for k, v in agent._state.items()}
  actions = np.random.default_rng(1).uniform(-1, 1, (4, 2)).astype(np.float32)
  told = agent.imagine(second, actions)
  shapes = {k: (v.shape, v.dtype.name) for k, v in told.items()}
  assert shapes == dict(
    reward=((4,), 'float32'),
    image=((4, 64, 64, 3), 'uint8'),
    state=((4, 4), 'float32'),
  )
  for name, value in before.items():  # it remembers what it did
    np.testing.assert_array_equal(value, agent._state[name])
  # The same, a step at a time.
  world, seed = agent._policy.agent.world, before.pop('seed')
  seeds = tf.random.experimental.stateless_split(seed, 2)
  steps = tf.random.experimental.stateless_split(seeds[1], 4)
  action = before.pop('action')
  second = {k: v[None] for k, v in second.items()}
  latent = agent._policy.agent.observe(second, before, action, seeds[0])
  for time in range(4):
    latent = world.dynamics.img_step(latent, actions[None, time], steps[time])
    feat = world.dynamics.get_feat(latent)
    reward = world.reward(feat).mean()[0]
    np.testing.assert_allclose(told['reward'][time], reward, atol=1e-5)
    vector = world.vector(feat).mean()[0].numpy()
    vector = np.sign(vector) * (np.exp(np.abs(vector)) - 1)
    np.testing.assert_allclose(told['state'][time], vector, atol=1e-4)
    image = world.representation.decoders['image'](feat).mean()[0] + 0.5
    image = np.clip(255 * image.numpy(), 0, 255)
    assert np.abs(told['image'][time] - image).max() < 0.51


def test_imagining_where_an_episode_begins(runs):
  """Of several environments some go on from what they have seen."""
  agent = load(runs('reach'))
  agent.reset(agent.config.seed)
  obs = {k: np.stack([v, v]) for k, v in observations(agent, 1)[0].items()}
  actions = np.full((2, 3, 2), 0.5, np.float32)
  for _ in range(3):
    agent.act(obs)
  told = agent.imagine(obs, actions, reset=[False, True])['state']
  agent.reset()  # but the stream of noise is the same
  fresh = agent.imagine(obs, actions)['state']
  np.testing.assert_allclose(told[1], fresh[1], atol=1e-6)
  assert np.abs(told[0] - fresh[0]).max() > 1e-3
  agent.act(obs)
  with pytest.raises(ValueError, match='give its first observation'):
    agent.imagine(None, actions, reset=[False, True])


def test_imagining_needs_an_observation_and_actions_of_its_size(mine):
  agent = load(mine)
  agent.reset(seed=0)
  with pytest.raises(ValueError, match='There is no observation yet'):
    agent.imagine(None, np.eye(2))
  with pytest.raises(ValueError, match=r'Actions are \[H, 2\]'):
    agent.imagine(np.zeros(4), np.zeros((3, 1)))
  noops = np.tile(np.eye(2)[0], (3, 5, 1))
  with pytest.raises(ValueError, match='of 1 environments, actions are of 3'):
    agent.imagine(np.zeros(4), noops)
  told = agent.imagine(np.zeros(4), np.eye(2))
  assert set(told) == {'reward', 'discount', 'state'}
  batch = agent.imagine(np.zeros((3, 4)), noops)
  assert batch['discount'].shape == (3, 5)
  assert (batch['discount'] >= 0).all() and (batch['discount'] <= 1).all()


# --- Loading and training ---------------------------------------------------


def test_a_run_of_older_code_asks_its_environment(runs, tmp_path):
  logdir = shutil.copytree(runs('reach'), tmp_path / 'old')
  path = logdir / 'config.json'
  record = json.loads(path.read_text())
  del record['observations'], record['actions']
  path.write_text(json.dumps(record))
  agent, other = dreamer.load(logdir), load(runs('reach'))
  assert (agent.inputs, agent.step) == (other.inputs, other.step)
  (obs,) = observations(agent, 1)
  other.reset(seed=0)
  np.testing.assert_array_equal(agent.act(obs), other.act(obs))


def test_trains_on_a_function_and_resumes(mine, tmp_path, capsys):
  logdir = shutil.copytree(mine, tmp_path / 'run')
  agent = dreamer.load(logdir)
  assert agent.config.task == 'custom_cartpole'
  assert agent.inputs == dict(state=(4,)) and agent.step >= 500
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  flags = dict(SMALL, steps=agent.step + 100)
  later = dreamer.train(cartpole, logdir, inputs='state', **flags)
  assert f'Resumed at step {agent.step}' in capsys.readouterr().out
  assert later.step >= agent.step + 100 and later.updates > agent.updates
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ]
  env = later.make_env(seed=3, function=cartpole)
  try:
    obs = env.reset()
    obs, reward, done, info = env.step(later.act(obs, reset=True))
    assert (reward, done, float(info['discount'])) == (1.0, False, 1.0)
  finally:
    env.close()


def test_lambdas_reach_the_workers():
  kind = 'CartPole-v1'
  env = workers.Async(
    lambda: GymEnv('x', inputs='state', function=lambda: gymnasium.make(kind))
  )
  try:
    assert env.reset()['state'].shape == (4,)
  finally:
    env.close()


ONE = gymnasium.make('CartPole-v1')


def the_one():
  return ONE


@pytest.mark.parametrize('flags', [dict(envs=2, eval_episodes=0), dict(envs=1)])
@pytest.mark.parametrize('parallel', ['none', 'thread'])
def test_one_environment_is_not_given_twice(tmp_path, flags, parallel):
  flags = dict(SMALL, inputs='state', parallel=parallel, **flags)
  with pytest.raises(cli.UserError, match='gave one environment twice'):
    dreamer.train(the_one, tmp_path / 'run', **flags)
  assert not list(tmp_path.glob('run/episodes/*'))


def test_one_environment_in_new_wrappers_is_one():
  make_env = environments.Distinct(lambda: gymnasium.Wrapper(ONE), 2)
  assert make_env().unwrapped is ONE.unwrapped
  with pytest.raises(TaskError, match='gave one environment twice'):
    make_env()


def test_the_one_environment_is_given_again_where_it_failed():
  make_env = environments.Distinct(the_one, 1)
  assert make_env() is make_env() is ONE


@pytest.mark.parametrize(
  'make_env, flags, message',
  [
    (lambda: 3, {}, 'gave a int without observation_space, action_space'),
    (cartpole, dict(inputs='image'), 'custom_cartpole has no images'),
    (cartpole, dict(inputs='pose'), '--inputs pose: custom_cartpole has no'),
    (cartpole, dict(inputs=['pose', 'state']), '--inputs pose: custom_cart'),
    (cartpole, dict(prest='cpu'), 'did you mean --preset'),
    (
      cartpole,
      dict(env_args=dict(a=np.int64(3))),
      'env_args cannot be written',
    ),
    (cartpole, dict(logdir=b'/tmp/x'), 'logdir is a path, not a bytes'),
    (cartpole, dict(steps=-3), '--steps takes a whole number'),
    (None, dict(task='custom_x'), 'custom_x is made by a function'),
    ('CartPole-v1', {}, 'make_env is a function that makes an environment'),
    (cartpole, dict(record=None, init_from=None, steps=-3), '--steps takes a'),
    (cartpole, dict(task='toy_reach'), 'toy_reach has an environment of its'),
  ],
)
def test_bad_input(tmp_path, make_env, flags, message):
  flags = {'inputs': 'state', 'logdir': tmp_path / 'run', **SMALL, **flags}
  with pytest.raises(cli.UserError, match=re.escape(message)):
    dreamer.train(make_env, **flags)


def test_a_logdir_is_needed():
  with pytest.raises(cli.UserError, match='--logdir'):
    dreamer.train(cartpole, None, inputs='state', **SMALL)


class Pole(gymnasium.Wrapper):
  """Asks the program that trains on it to end."""

  def __init__(self, when):
    super().__init__(cartpole())
    self.left = when

  def step(self, action):
    self.left -= 1
    if not self.left:
      os.kill(os.getpid(), signal.SIGINT)
    return super().step(action)


@pytest.mark.parametrize('when', [30, 450])  # in the prefill, and later
def test_ctrl_c_ends_the_program_as_well(tmp_path, when):
  flags = dict(SMALL, inputs='state', task='custom_pole', parallel='none')
  with pytest.raises(KeyboardInterrupt):
    dreamer.train(lambda: Pole(when), tmp_path, **flags)
  agent = dreamer.train(lambda: Pole(0), tmp_path, **flags)
  assert agent.step >= 500


class Other(gymnasium.Wrapper):
  """Shows what it is told to."""

  def __init__(self, keys):
    super().__init__(cartpole())
    part = self.env.observation_space
    self.keys = keys
    self.observation_space = gymnasium.spaces.Dict(dict.fromkeys(keys, part))

  def reset(self, **kwargs):
    obs, info = self.env.reset(**kwargs)
    return dict.fromkeys(self.keys, obs), info

  def step(self, action):
    obs, *others = self.env.step(action)
    return dict.fromkeys(self.keys, obs), *others


def test_an_environment_that_changed_is_refused(tmp_path):
  """Nothing is lost: the run goes on with the one that it was made with."""
  flags = dict(SMALL, inputs='state', task='custom_pole', steps=450)
  dreamer.train(lambda: Other(['place', 'speed']), tmp_path, **flags)
  before = {p: p.read_bytes() for p in tmp_path.rglob('*.npz')}
  about = runfile.load_spaces(tmp_path)[0]
  for keys in ['place'], ['place', 'speed', 'goal']:
    with pytest.raises(cli.UserError, match='environment has changed: it'):
      dreamer.train(lambda keys=keys: Other(keys), tmp_path, **flags)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*.npz*')} == before
    assert runfile.load_spaces(tmp_path)[0] == about
  flags.update(steps=500)
  dreamer.train(lambda: Other(['place', 'speed']), tmp_path, **flags)


@pytest.mark.parametrize(
  'seen, right',
  [
    (dict(image=[64, 64, 3], state=[4]), True),
    (dict(image=[64, 64]), False),
    (dict(state=[4], actions=dict(size=2.5)), False),
    (dict(state=[4], actions=dict(size='2')), False),
    (dict(state=[4], actions=dict(size=10**12)), False),
    (dict(state=[4], actions=dict(size=0)), False),
    (dict(state=[4], actions=dict(choices=[3, 0])), False),
    (dict(state=[4], actions=dict(choices=[])), False),
    (dict(state=[4], actions=dict(choices=[3, 2])), True),
    (dict(image_2=[84, 84, 3]), False),
    ({}, False),
  ],
)
def test_what_the_agent_sees_is_told_or_unknown(tmp_path, seen, right):
  actions = seen.pop('actions', dict(size=2))
  record = dict(config={}, observations=seen, actions=actions)
  (tmp_path / 'config.json').write_text(json.dumps(record))
  inputs, actions = runfile.load_spaces(tmp_path)
  assert (inputs is not None) == (actions is not None) == right


TRAINS_AND_RENDERS = """
import sys

import gymnasium
import numpy as np

import dreamer
from dreamer import Dreamer, train


class Agent(Dreamer):
  pass


class Pole(gymnasium.Env):
  observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
  action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

  def __init__(self):
    from dm_control import suite  # here all are in one process

    self.env = suite.load('cartpole', 'balance')

  def reset(self, seed=None, options=None):
    self.env.reset()
    image = self.env.physics.render(8, 8)
    return image, dict(loaded='tensorflow' in sys.modules)

  def step(self, action):
    train(None, 'nowhere')
"""


@pytest.mark.parametrize('strategy', ['process', 'ray'])
def test_a_module_that_trains_makes_environments(
  tmp_path, monkeypatch, strategy
):
  """Workers that import it have no TensorFlow, beside which OpenGL crashes."""
  name = f'trains_with_{strategy}'
  (tmp_path / f'{name}.py').write_text(TRAINS_AND_RENDERS)
  monkeypatch.syspath_prepend(str(tmp_path))
  module = importlib.import_module(name)
  assert module.dreamer is dreamer
  env = workers.Async(module.Pole, strategy)
  try:
    image, about = env.reset()
    assert image.std() > 0 and about == dict(loaded=False)
    with pytest.raises(workers.WorkerError, match=r'dreamer\.train is used in'):
      env.step(0)
  finally:
    env.close()


def test_exported_names_are_those_of_arguments(tmp_path):
  config = dreamer.define_config('toy_reach', 'debug', 'state')
  inputs = {'0': (2,), '_pose': (3,), 'ä b': (), 'self': (), 'from': (1,)}
  space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
  saved_model.export(dreamer.Dreamer(config, space, inputs=inputs), tmp_path)
  act = tf.saved_model.load(str(tmp_path)).signatures['act']
  names = {n for n in act.structured_input_signature[1] if n[:6] != 'memory'}
  assert names == {'obs_0', 'obs_pose', 'obs_b', 'obs_self', 'obs_from'}


def test_a_function_that_holds_what_cannot_be_sent(tmp_path):
  error = pytest.raises(cli.UserError, match='make_env cannot be sent')
  with (tmp_path / 'file').open('w') as file, error:
    dreamer.train(lambda: file, tmp_path / 'run', **SMALL)
  assert not (tmp_path / 'run').exists()


class Tee(io.StringIO):
  """What has no `isatty` but `write`, as some programs put over stdout."""

  isatty = property()


def test_what_is_not_sent_may_hold_anything(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', Tee())
  flags = dict(SMALL, inputs='state', parallel='none', eval_episodes=0)
  with (tmp_path / 'file').open('w') as file:

    def make_env():
      assert not file.closed
      return cartpole()

    dreamer.train(make_env, tmp_path / 'run', **flags)
  assert 'Finished at step' in sys.stdout.getvalue()


def test_an_environment_that_goes_elsewhere(tmp_path, monkeypatch):
  """A relative logdir is meant from where the run began."""
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path)

  class Walker(gymnasium.Wrapper):
    def reset(self, **kwargs):
      os.chdir(tmp_path / 'elsewhere')
      return super().reset(**kwargs)

  flags = dict(SMALL, inputs='state', parallel='none', eval_episodes=0)
  dreamer.train(lambda: Walker(cartpole()), 'run', **flags)
  assert not list((tmp_path / 'elsewhere').iterdir())
  assert list(tmp_path.glob('run/episodes/*.npz'))


def test_commands_say_what_custom_tasks_need(mine, capsys):
  flags = dict(task='custom_cartpole', inputs='state')
  assert dreamer.main(words(mine, **flags)) == 2
  assert 'dreamer.train(make_env' in capsys.readouterr().err
  assert evaluate.main([f'--logdir={mine}']) == 2
  assert 'dreamer.load(logdir)' in capsys.readouterr().err


def test_gym_is_understood_like_gymnasium(tmp_path):
  class Old(gym.Env):
    observation_space = gym.spaces.Dict(
      {'speed': gym.spaces.Box(-9, 9, (2,)), 'gear': gym.spaces.Discrete(3)}
    )
    action_space = gym.spaces.Box(-2, 2, (1,))

    def reset(self):
      self.time = 0
      return dict(speed=np.zeros(2, np.float32), gear=1)

    def step(self, action):
      self.time += 1
      obs = dict(speed=np.full(2, action[0], np.float32), gear=2)
      return obs, float(action[0]), self.time == 20, {}

  env = GymEnv('old', inputs='state', function=Old)
  assert env.about[0].startswith('The agent sees the observation')
  env.reset()
  obs, reward, _, _ = env.step(np.float32([0.5]))
  assert reward == 0.5 and obs['speed'].tolist() == [0.5, 0.5]
  assert obs['gear'].tolist() == [0.0, 0.0, 1.0]


# --- Export -----------------------------------------------------------------

USE = """
import json, sys
import numpy as np
import tensorflow as tf

model = tf.saved_model.load('exported')
reset, act = model.signatures['reset'], model.signatures['act']
data = dict(np.load('observations.npz'))
memory = reset(batch=tf.constant(2), seed=tf.constant([7, 0]))
actions = []
for time in range(4):
  obs = {k: tf.constant(v[time]) for k, v in data.items()}
  memory = dict(act(**obs, **memory))
  actions.append(memory.pop('action').numpy().tolist())
ours = {'dreamer', 'models', 'keras', 'tensorflow_probability'}
print(json.dumps([actions, sorted(ours & set(sys.modules))]))
"""


@pytest.mark.parametrize('name', ['reach', 'catch', 'planet'])
def test_a_saved_model_acts_alike_with_tensorflow_alone(runs, name, tmp_path):
  logdir, folder = runs(name), tmp_path / 'exported'
  assert evaluate.main([f'--logdir={logdir}', f'--export={folder}']) == 0
  agent = load(logdir)
  data = observations(agent, 4, envs=2)
  stacked = {k: np.stack([obs[k] for obs in data]) for k in agent.inputs}
  np.savez(tmp_path / 'observations.npz', **stacked)
  done = subprocess.run(
    [sys.executable, '-I', '-c', USE],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  actions, modules = json.loads(done.stdout.splitlines()[-1])
  assert not {'dreamer', 'models'} & set(modules)
  agent.reset(seed=7)
  for time, obs in enumerate(data):
    expected = agent.act(obs, reset=time == 0)
    np.testing.assert_allclose(actions[time], expected, atol=2e-5)
  about = json.loads((folder / 'agent.json').read_text())
  assert about['task'] == agent.config.task
  assert about['inputs'] == {k: [k, list(v)] for k, v in agent.inputs.items()}


def test_an_export_replaces_nothing_but_an_export(runs, tmp_path, capsys):
  for name in ('assets', 'variables'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'mine').write_text('mine')
  words = [f'--logdir={runs("catch")}', f'--export={tmp_path}']
  assert evaluate.main(words) == 2
  assert 'holds something else; choose' in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} == {'assets', 'variables'}
  for name in ('assets', 'variables'):
    assert (tmp_path / name / 'mine').read_text() == 'mine'


def test_an_export_follows_one_that_was_killed(runs, tmp_path):
  words = [f'--logdir={runs("catch")}', f'--export={tmp_path}']
  # Moved already, and not yet.
  for half in ('saved_model.pb', saved_model.ABOUT):
    (tmp_path / f'{saved_model.PARTIAL}1').mkdir()
    (tmp_path / half).write_text('half')
    assert evaluate.main(words) == 0
    json.loads((tmp_path / saved_model.ABOUT).read_text())
    assert not list(tmp_path.glob(f'{saved_model.PARTIAL}*'))


def test_a_logdir_of_nobody():
  with pytest.raises(cli.UserError, match='no such user'):
    dreamer.load('~nobody-of-this-name/run')


@pytest.mark.parametrize(
  'name',
  ['behaviors', 'configs', 'distribute', 'evolution', 'layers', 'suites'],
)
def test_a_module_with_a_name_of_ours(name, tmp_path):
  (tmp_path / f'{name}.py').write_text('X = 1')
  (tmp_path / 'go.py').write_text('import dreamer')
  done = subprocess.run(
    [sys.executable, 'go.py'],
    cwd=tmp_path,
    env=dict(os.environ, PYTHONPATH=str(ROOT)),
    capture_output=True,
    text=True,
  )
  assert f'{name}.py has the name of a module of this library' in done.stderr


# --- The page ---------------------------------------------------------------


def test_the_page_runs_as_it_is(tmp_path):
  """Its blocks of Python are one script, with the command of export between."""
  text = (ROOT / 'docs/library.md').read_text()
  script = []
  for kind, block in re.findall(r'```(python|bash)\n(.*?)```', text, re.DOTALL):
    if kind == 'python':
      script.append(block)
    elif 'evaluate.py' in block:
      command = block.replace('python evaluate.py', f'{ROOT}/evaluate.py')
      script.append(
        'import subprocess, sys\n'
        f'subprocess.run([sys.executable, *{command.split()!r}], check=True)\n'
      )
  assert len(script) > 5
  path = tmp_path / 'page.py'
  path.write_text('\n'.join(script))
  done = subprocess.run(
    [sys.executable, str(path)],
    cwd=tmp_path,
    env={'PYTHONPATH': str(ROOT), 'PATH': ''},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'exported/saved_model.pb').exists()


# --- The trained agent of the repository --------------------------------------


def test_a_trained_agent_is_a_run_without_its_optimizers(mine, tmp_path):
  """As scores/trained/make.py makes it; and it is left as it is."""
  folder = tmp_path / 'trained'
  script = [sys.executable, str(ROOT / 'scores/trained/make.py')]
  words = [f'--logdir={mine}', f'--outdir={folder}']
  done = subprocess.run([*script, *words], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  size = {
    path: sum(p.stat().st_size for p in path.glob('checkpoints/ckpt-*.data*'))
    for path in (mine, folder)
  }
  assert size[folder] < size[mine] / 2
  agent, other = dreamer.load(folder), load(mine)
  other.reset(seed=0)
  (obs,) = observations(agent, 1)
  np.testing.assert_array_equal(agent.act(obs), other.act(obs))
  assert (agent.step, agent.updates) == (other.step, other.updates)


@pytest.mark.parametrize(
  'name, predictions',
  [
    ('walker_walk', {'prediction_reward.png', 'prediction_vector.png'}),
    ('cup_catch', {'prediction.png'}),
  ],
)
def test_trained_agents_act_and_dream(tmp_path, name, predictions):
  """From vectors and from images; and nothing in their folders changes."""
  folder = ROOT / 'scores/trained' / name
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  assert sum(p.stat().st_size for p in before) < 5e6
  words = [f'--logdir={folder}', '--episodes=1', f'--outdir={tmp_path}']
  assert evaluate.main([*words, f'--json={tmp_path / "figures.json"}']) == 0
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before
  figures = json.loads((tmp_path / 'figures.json').read_text())
  assert figures['mean'] > 750
  pictures = {'behavior.gif', *predictions}
  assert pictures <= {p.name for p in tmp_path.iterdir()}
