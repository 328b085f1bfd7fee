"""Representations and behaviors: what the paper compares (Figures 4, 7, 8)."""

import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import agents
import behaviors
import cli
import commandline
import configs
import dreamer
import logger
import representations
import run_setup
import spaces
import tools
from agents import batch_of, run_here

SMALL = dict(batch_length=6, plan_horizon=5, plan_candidates=20, plan_best=4)
SMALL.update(plan_iterations=3)


def make_agent(folder, **changes):
  return agents.make_agent(folder, **{**SMALL, **changes})


# --- Contrastive objective ----------------------------------------------------


def random_contrast(count=7, size=4, seed=0):
  rng = np.random.default_rng(seed)
  state = rng.normal(size=(count, size))
  mean = state + 0.5 * rng.normal(size=(count, size))
  std = rng.uniform(0.3, 2, (count, size))
  return state, mean, std


def contrast_by_loops(state, mean, std, mask=None):
  results = []
  for i in range(len(state)):
    scores = []
    for j in range(len(state)):
      if mask is None or mask[i, j]:
        score = scipy.stats.norm.logpdf(state[i], mean[j], std[j]).sum()
        scores.append(score)
      if i == j:
        own = score
    bound = own - scipy.special.logsumexp(scores) + np.log(len(scores))
    results.append(bound)
  return np.array(results)


def single(*arrays):
  return [tf.constant(x, tf.float32) for x in arrays]


@pytest.mark.parametrize('masked', [False, True])
def test_contrast_beside_a_double_loop(masked):
  arrays = random_contrast()
  mask = None
  if masked:
    mask = np.eye(7, dtype=bool)
    mask[2, 5] = mask[0, 1] = mask[0, 6] = True
  expected = contrast_by_loops(*arrays, mask)
  state, *gaussian = single(*arrays)
  actual = representations.contrast(state, *gaussian, mask)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  if mask is None:  # the states of one replica, the images of all
    part = representations.contrast(state[2:5], *gaussian, first=2)
    np.testing.assert_allclose(part, expected[2:5], rtol=1e-4, atol=1e-4)


def test_contrast_gradient_by_finite_differences():
  arrays = random_contrast(5, 3)
  tensors = single(*arrays)
  with tf.GradientTape() as tape:
    tape.watch(tensors)
    loss = tf.reduce_mean(representations.contrast(*tensors))
  for number, grad in enumerate(tape.gradient(loss, tensors)):
    numeric = np.zeros(grad.shape)
    for index in np.ndindex(*grad.shape):
      for sign in (1, -1):
        changed = [x.copy() for x in arrays]
        changed[number][index] += sign * 1e-5
        numeric[index] += sign * contrast_by_loops(*changed).mean() / 2e-5
    np.testing.assert_allclose(grad, numeric, atol=1e-3)


def test_contrast_without_information_and_with_all():
  state, mean, std = random_contrast(50, 3)
  same = np.zeros_like(mean), np.ones_like(std)
  np.testing.assert_allclose(
    representations.contrast(*single(state, *same)), 0, atol=1e-5
  )
  independent = np.random.default_rng(1).normal(size=mean.shape)
  unrelated = representations.contrast(*single(state, independent, std))
  assert tf.reduce_mean(unrelated) <= 0
  apart = 100.0 * np.arange(50)[:, None] + np.zeros((50, 3))
  known = representations.contrast(*single(apart, apart, np.ones_like(std)))
  np.testing.assert_allclose(known, np.log(50), rtol=1e-5)


def test_negatives(tmp_path):
  agent = make_agent(tmp_path, representation='contrastive')
  negatives = agent.world.representation._negatives
  assert negatives(2, 3) is None
  agent._c.contrast = 'time'
  block = np.kron(np.eye(2), np.ones((3, 3))).astype(bool)
  assert (negatives(2, 3) == block).all()
  agent._c.update(contrast='window', contrast_window=1)
  near = np.abs(np.subtract.outer(np.arange(3), np.arange(3))) <= 1
  assert (negatives(2, 3) == np.kron(np.eye(2), near)).all()


# --- Representations ----------------------------------------------------------


def test_the_contrastive_term_moves_states_and_encoder(tmp_path):
  agent = make_agent(tmp_path, representation='contrastive')
  given = [tf.random.stateless_normal([2, 5, n], [0, n]) for n in (11, 64)]
  with tf.GradientTape() as tape:
    tape.watch(given)
    likes = agent.world.representation.likes(*given, None, None)
    like = tf.reduce_mean(likes['state'])
  assert all(np.any(grad, -1).all() for grad in tape.gradient(like, given))


# Each with one of the behaviors, so that one update shows both.
METHODS = {
  'reconstruction': ('actor_critic', {'model', 'actor', 'value'}),
  'contrastive': ('actor', {'model', 'actor'}),
  'reward': ('planning', {'model'}),
}


@pytest.fixture(scope='module', params=METHODS)
def method(request, tmp_path_factory):
  """An agent, what it was before one update, and what that update said."""
  behavior, _ = METHODS[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  agent = make_agent(folder, representation=request.param, behavior=behavior)
  before = {
    name: [v.numpy().copy() for v in opt.variables]
    for name, opt in agent.optimizers.items()
  }
  encoder = [v.numpy().copy() for v in agent.world.encoders['image'].variables]
  metrics = agent.train(batch_of(agent))
  return request.param, agent, (before, encoder), metrics


@pytest.mark.slow
def test_representation(method):
  """Each has its terms and networks, trains, and shows its predictions."""
  name, agent, (_, encoder), metrics = method
  terms = dict(reconstruction={'image_loss'}, contrastive={'state_loss'})
  terms = terms.get(name, set()) | {'reward_loss'}
  losses = {'image_loss', 'state_loss', 'reward_loss'}
  assert losses & set(metrics) == terms
  total = sum(float(metrics[k]) for k in terms)
  assert np.isclose(metrics['model_loss'], total + max(metrics['div'], 3))
  after = [v.numpy() for v in agent.world.encoders['image'].variables]
  assert any((a != b).any() for a, b in zip(encoder, after, strict=True))
  own = dict(reconstruction={'decode'}, contrastive={'state'}).get(name, set())
  assert set(agent.networks()) & {'decode', 'state'} == own
  assert bool(agent.world.representation.decoders) == (name == 'reconstruction')
  if name != 'reconstruction':
    truth, model = agent.world.open_loop_curves(batch_of(agent))['reward']
    np.testing.assert_array_equal(truth, batch_of(agent)['reward'])
    assert model.shape == truth.shape
    picture = logger.plot_curves('reward', truth.numpy(), model.numpy(), 5)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert picture.std() > 5
    assert [agent.world.context(n) for n in (4, 50)] == [3, 5]


@pytest.mark.slow
def test_state_model_learns_to_tell_images_apart(tmp_path):
  agent = make_agent(
    tmp_path, representation='contrastive', kl_scale=0.0, model_lr=1e-2
  )
  agent.set_learning_rates()
  batch = batch_of(agent)
  bounds = [-float(agent.train(batch)['state_loss']) for _ in range(60)]
  assert bounds[0] < 0.5 and bounds[-1] > 1.5  # of ln 12 = 2.48


# --- Behaviors ----------------------------------------------------------------


def test_v_r_is_the_sum_of_rewards_to_the_horizon(tmp_path):
  agent = make_agent(tmp_path, behavior='actor')
  reward = tf.constant([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
  returns, value = agent.behavior.returns(None, reward, 0.99 * tf.ones([3, 2]))
  np.testing.assert_allclose(returns, [[11, 18], [10, 16], [7, 11]])
  assert value is None
  agent._c.pcont = True  # predicted discounts: the second state is the last
  pcont = 0.99 * tf.constant([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
  returns, _ = agent.behavior.returns(None, reward, pcont)
  np.testing.assert_allclose(returns, [[4, 18], [3, 16], [7, 11]], rtol=1e-6)


def test_entropy_of_choices_is_exact_as_a_bonus():
  """That of 3 and 2 choices, at states [H, N], whatever was drawn."""
  config = dreamer.define_config('gym_Some-v0')
  config.update(agents.SMALL, action_dist='onehot', actor_entropy=0.1)
  behavior = behaviors.ActorOnly(config, None, 5, (3, 2))
  outputs = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
  expected = sum(
    scipy.stats.entropy(scipy.special.softmax(part, -1), axis=-1)
    for part in np.split(outputs, [3], -1)
  )
  drawn = tf.tile(tf.constant([[[1.0, 0, 0, 1, 0]]]), [4, 6, 1])
  entropy = behavior._entropy(tf.constant(outputs), drawn)
  np.testing.assert_allclose(entropy, expected, rtol=1e-5)


@pytest.mark.slow
def test_behavior_trains_what_it_has(method):
  name, agent, (before, _), metrics = method
  _, opts = METHODS[name]
  assert set(agent.count_parameters()) == opts
  assert {k[: -len('_grad_norm')] for k in metrics if 'grad_norm' in k} == opts
  for name, opt in agent.optimizers.items():
    pairs = zip(opt.variables, before[name], strict=True)
    assert any((v.numpy() != old).any() for v, old in pairs), name
  obs = {'image': batch_of(agent)['image'][:, 0]}
  action, state = agent(obs, np.ones(2, bool), training=False)
  action, _ = agent(obs, np.zeros(2, bool), state, training=False)
  assert action.shape == (2, 2) and abs(action).max() <= 1
  assert agent.policy.experimental_get_tracing_count() == 1
  assert agent.train.experimental_get_tracing_count() == 1


def test_planning_beside_the_optimum_of_a_linear_quadratic_task():
  """x' = x + a / 2 from several starts; the optimum solves a linear system."""
  start = np.array([0.7, -0.4, 0.0], np.float32)
  horizon, cost = 6, 0.3
  reach = 0.5 * np.tril(np.ones((horizon, horizon)))
  hessian = reach.T @ reach + cost * np.eye(horizon)
  optimum = [-np.linalg.solve(hessian, reach.T.sum(1) * x) for x in start]
  assert np.abs(optimum).max() < 1  # the bounds do not matter

  def score(actions):
    x = start[:, None, None] + tf.cumsum(0.5 * actions[..., 0], -1)
    effort = tf.reduce_sum(actions[..., 0] ** 2, -1)
    return -tf.reduce_sum(x**2, -1) - cost * effort

  plan = behaviors.cross_entropy_method(
    score, [3, horizon, 1], 1000, 100, 10, tf.constant([1, 2])
  )
  np.testing.assert_allclose(plan[..., 0], optimum, atol=0.05)
  few = behaviors.cross_entropy_method(
    score, [3, horizon, 1], 1000, 100, 1, tf.constant([1, 2])
  )
  assert np.abs(few[..., 0] - optimum).max() > 0.1  # it takes iterations


def test_plans_stay_within_the_bounds_of_actions():
  """The more the better: of what is allowed, the bound is the best."""
  seen = []

  def score(actions):
    seen.append(abs(actions.numpy()).max())
    return tf.reduce_sum(actions, [-2, -1])

  plan = behaviors.cross_entropy_method(
    score, [2, 4, 3], 200, 20, 10, tf.constant([1, 2])
  )
  assert max(seen) <= 1 and plan.numpy().min() > 0.95


def test_plans_by_the_world_model(tmp_path):
  """Where the reward is the first action, planning finds its bound.

  Which one is told by the sign of each environment's state, and is the other
  after the first step.
  """
  agent = make_agent(
    tmp_path, behavior='planning', plan_candidates=200, plan_iterations=8
  )
  imagine = agent.world.dynamics.imagine
  signs = tf.constant([1.0, -1.0, 1.0])
  seen = []

  def imagine_actions(action, state, seed):
    seen.append(action.shape)
    assert len(np.unique(seed)) == 5 * 2  # other noise at each step
    result = imagine(action, state, seed)
    turned = tf.constant([1.0, -1, -1, -1, -1]) * state['stoch'][:, :1]
    stoch = tf.repeat(turned[..., None] * action[..., :1], 3, -1)
    return dict(result, stoch=stoch)

  agent.world.dynamics.imagine = imagine_actions
  agent.world.heads['reward'] = lambda feat: tfd.Normal(feat[..., 0], 1.0)
  start, seed = agent.world.dynamics.initial(3), tf.constant([3, 4])
  start['stoch'] = tf.repeat(signs[:, None], 3, 1)
  action = agent.behavior.act(start, seed, False)
  assert action.shape == (3, 2) and seen[0] == (600, 5, 2)
  assert (action.numpy()[:, 0] * signs.numpy() > 0.8).all()


def test_plans_are_worth_their_rewards_without_discount(tmp_path, monkeypatch):
  """Predicted discounts, gamma at most, tell only where an episode ends."""
  agent = make_agent(
    tmp_path, behavior='planning', plan_candidates=8, plan_best=2, pcont=True
  )
  gamma, scores = agent.world._c.discount, []

  def one(value):
    return lambda feat: tfd.Deterministic(value * tf.ones(feat.shape[:-1]))

  def plan(score, shape, candidates, *args):
    scores.append(score(tf.zeros([shape[0], candidates, *shape[1:]])).numpy())
    return tf.zeros(shape)

  monkeypatch.setattr(behaviors, 'cross_entropy_method', plan)
  start, seed = agent.world.dynamics.initial(1), tf.constant([3, 4])
  for going_on in (1.0, 0.5):
    agent.world.heads.update(reward=one(1.0), pcont=one(going_on * gamma))
    agent.behavior.act(start, seed, False)
  horizon = agent.world._c.plan_horizon
  np.testing.assert_allclose(scores[0], horizon, rtol=1e-6)
  np.testing.assert_allclose(scores[1], 2 - 0.5 ** (horizon - 1), rtol=1e-6)


@pytest.mark.parametrize('name', ['planning', 'shooting'])
def test_some_behaviors_need_continuous_actions(monkeypatch, name):
  shooting = configs.Method('behaviors.Planning', 'shooting', continuous=True)
  monkeypatch.setitem(configs.BEHAVIORS, 'shooting', shooting)
  config = dreamer.define_config('toy_catch')
  config.behavior = name
  message = f'{name} needs .* choose actor_critic or actor or evolution$'
  with pytest.raises(cli.UserError, match=message):
    configs.resolve_actions(config, spaces.OneHotBox(3))


@pytest.mark.parametrize('shape', [(5,), (4, 6), (3, 2, 2)])
def test_states_may_have_any_rank(shape):
  """Where imagination starts, and where an episode begins."""
  behavior = behaviors.Behavior(dreamer.define_config(), None, 2)
  seed = tf.constant([1, 2])
  post = dict(deter=tf.zeros([4, 6, 7]), stoch=tf.random.normal([4, 6, *shape]))
  start = behavior.starts(post, seed)
  assert start['deter'].shape == (24, 7)
  np.testing.assert_array_equal(
    start['stoch'], tf.reshape(post['stoch'], [24, *shape])
  )
  kept = tools.keep_rows((post['stoch'][:, 0], tf.ones([4, 2])), [1, 0, 1, 1])
  assert [np.all(x.numpy()[1] == 0) for x in kept] == [True, True]
  np.testing.assert_array_equal(kept[0][2:], post['stoch'][2:, 0])


@pytest.mark.parametrize(
  'flags, name',
  [
    ({}, 'dreamer'),
    ({'representation': 'contrastive'}, 'dreamer-contrastive'),
    ({'representation': 'reward'}, 'dreamer-reward'),
    ({'behavior': 'actor'}, 'dreamer-actor'),
    ({'behavior': 'planning'}, 'planet'),
    ({'behavior': 'evolution'}, 'world-models'),
    ({'behavior': 'planning', 'representation': 'reward'}, 'planet-reward'),
  ],
)
def test_runs_name_their_method(tmp_path, flags, name):
  config = dreamer.define_config()
  config.update(flags, logdir=tmp_path / 'run')
  run_setup.setup_logdir(config)
  record = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert record['method'] == name
  (tmp_path / 'run' / 'episodes' / 'a-b-3.npz').touch()
  config.update(representation='contrastive', behavior='actor')
  with pytest.raises(cli.UserError, match='--representation|--behavior'):
    run_setup.setup_logdir(config)


@pytest.mark.slow
def test_whole_run_without_decoder_and_value(tmp_path, capsys):
  """Runs, logs curves of rewards, and resumes."""
  logdir = tmp_path / 'run'
  words = [f'--logdir={logdir}', '--preset=debug', '--task=toy_reach']
  words += ['--behavior=actor', '--representation=contrastive']
  words += ['--precision=32', '--pretrain=1', '--train_steps=1']
  words += ['--time_limit=30', '--prefill=60', '--eval_every=60']
  words += ['--train_every=30', '--log_every=30', '--log_images_every=50']
  words += ['--eval_episodes=2']
  name = 'method dreamer-actor-contrastive'
  for steps, text in ((90, name), (180, 'Resumed')):
    assert run_here([*words, f'--steps={steps}']) == 0
    assert text in capsys.readouterr().out
  steps = {}
  for path in logdir.glob('events.*'):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        steps.setdefault(value.tag, []).append(event.step)
  assert 'agent/openl' not in steps
  assert {
    steps['test/return'].count(step) % 2 for step in steps['test/return']
  } == {0}
  # The first log entry of each process has one, and then none for 50 steps.
  assert sorted(steps['agent/openl_reward']) == [60, 90, 150]
  assert {60, 90, 120, 150} <= set(steps['run/updates'])


@pytest.mark.slow
def test_updates_are_recorded_for_the_profiler(tmp_path):
  logdir = tmp_path / 'run'
  words = [f'--logdir={logdir}', '--preset=debug', '--task=toy_reach']
  words += ['--inputs=state', '--precision=32', '--prefill=100']
  assert run_here([*words, '--steps=150', '--profile=2']) == 0
  (trace,) = logdir.glob('plugins/profile/*/*.xplane.pb')
  content = trace.read_bytes()
  assert b'update' in content and b'MatMul' in content


def test_bad_plans_are_refused(tmp_path):
  flags = [f'--logdir={tmp_path}', '--behavior=planning']
  with pytest.raises(cli.UserError, match='--plan_candidates is at least'):
    commandline.parse_flags([*flags, '--plan_candidates=50'])
  with pytest.raises(cli.UserError, match='--representation takes one of'):
    commandline.parse_flags([*flags, '--representation=contrast'])
