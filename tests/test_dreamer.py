"""The agent: its losses by hand, what moves what, whole runs."""

import contextlib
import pathlib

import gym
import keras
import numpy as np
import pytest
import tensorflow as tf

import checkpoints
import configs
import dreamer
import exploration
import layers
import models
import reference
import run_setup
import spaces
import tools
import training
from agents import (
  SMALL,
  batch_of,
  eagerly,
  make_agent,
  model_losses,
  moved,
  random_episode,
  weights,
)

ROOT = pathlib.Path(dreamer.__file__).parent


def test_checkpoint_holds_every_variable_of_every_network(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  saver = checkpoints.Checkpoints(tmp_path / 'saved', **agent.trackable())
  path = saver.save(1)
  reader = tf.train.load_checkpoint(path)
  names = reader.get_variable_to_shape_map()
  for network, layer in agent.networks().items():
    assert layer.weights
    for index, variable in enumerate(layer.weights):
      name = f'{network}/{index}/.ATTRIBUTES/VARIABLE_VALUE'
      assert name in names
      np.testing.assert_array_equal(reader.get_tensor(name), variable.numpy())


@pytest.fixture
def precision():
  """Sets a precision for one test."""
  before = keras.config.dtype_policy()
  yield run_setup.setup_precision
  keras.config.set_dtype_policy(before)


def dream_seeds(agent):
  return agent.seeds(2 * agent._c.horizon, 1)


def all_weights(agent):
  return [w for opt in agent.optimizers.values() for w in weights(opt)]


def zero_weights(agent):
  for layer in agent.networks().values():
    for variable in layer.variables:
      variable.assign(tf.zeros_like(variable))


def set_bias(head, value):
  bias = head._out.bias
  bias.assign(tf.fill(bias.shape, tf.cast(value, bias.dtype)))


def test_parameter_counts_of_walker(tmp_path):
  config = dreamer.define_config('dmc_walker_walk')
  space = gym.spaces.Box(-1, 1, (6,), np.float32)
  agent = dreamer.Dreamer(config, space)
  assert agent.count_parameters() == {
    'model': 5296820,
    'actor': 578412,
    'value': 413601,
  }


# --- Losses with an answer worked out on paper ------------------------------


@pytest.mark.parametrize('scale', [1.0, 10.0])
def test_model_loss_by_hand(tmp_path, scale):
  """With zero weights every prediction is 0 and posterior equals prior."""
  agent = make_agent(tmp_path, free_nats=1.5, kl_scale=2.0, reward_scale=scale)
  zero_weights(agent)
  batch = batch_of(agent)
  loss, metrics, _ = model_losses(agent, batch)
  image = batch['image'].astype(np.float64) / 255 - 0.5
  norm = 0.5 * np.log(2 * np.pi)
  image_loss = (0.5 * image**2 + norm).sum((2, 3, 4)).mean()
  reward = batch['reward'].astype(np.float64)
  reward_loss = scale * (0.5 * reward**2 + norm).mean()
  assert np.isclose(metrics['image_loss'], image_loss, rtol=1e-5)
  assert np.isclose(metrics['reward_loss'], reward_loss, rtol=1e-5)
  assert np.isclose(metrics['div'], 0.0, atol=1e-6)
  # The KL of 0 is raised to the free nats, then scaled.
  assert np.isclose(loss, image_loss + reward_loss + 2.0 * 1.5, rtol=1e-5)


def test_free_nats_clip_the_mean_and_not_each_element(tmp_path):
  """One state far away, others equal: the mean KL counts, not the parts."""
  agent = make_agent(tmp_path, free_nats=0.5)
  zero_weights(agent)
  bias = agent.world.dynamics._obs2.bias  # moves the posterior mean by 1
  bias.assign(tf.constant([1.0, 0, 0, 0, 0, 0]))
  loss, metrics, _ = model_losses(agent)
  std = np.log(2.0) + 0.1
  kl = 0.5 / std**2
  assert np.isclose(metrics['div'], kl, rtol=1e-5)
  rest = metrics['image_loss'] + metrics['reward_loss']
  assert np.isclose(loss - rest, kl, rtol=1e-3)


def test_pcont_loss_by_hand(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  zero_weights(agent)
  set_bias(agent.world.pcont, 0.7)
  batch = batch_of(agent)
  batch['discount'][0, -1] = 0.0
  _, metrics, _ = model_losses(agent, batch)
  prob = 1 / (1 + np.exp(-0.7))
  target = 0.99 * batch['discount']  # soft labels 0 and gamma
  like = target * np.log(prob) + (1 - target) * np.log(1 - prob)
  assert np.isclose(metrics['pcont_loss'], -10 * like.mean(), rtol=1e-5)


def test_pcont_loss_counts_by_its_scale(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  batch, rest = batch_of(agent), []
  for scale in (1.0, 3.0):
    agent._c.pcont_scale = scale
    loss, metrics, _ = model_losses(agent, batch)
    rest.append(loss - metrics['pcont_loss'])
    rest.append(metrics['pcont_loss'] / scale)
  np.testing.assert_allclose(rest[2:], rest[:2], rtol=1e-5)


def constant_agent(folder, reward, value, **changes):
  """Reward and value models that say the same everywhere."""
  agent = make_agent(folder, **changes)
  zero_weights(agent)
  set_bias(agent.world.reward, reward)
  set_bias(agent.behavior.value, value)
  return agent


def test_actor_and_value_loss_by_hand(tmp_path):
  agent = constant_agent(tmp_path, 1.0, 10.0, discount=0.9, disclam=0.5)
  _, _, post = model_losses(agent)
  loss, imag, _ = agent.behavior.actor_loss(post, dream_seeds(agent))
  # Horizon 4: rewards 1, bootstrap 10; backwards by Eq. 6:
  third = 1 + 0.9 * (0.5 * 10 + 0.5 * 10)  # 10
  second = 1 + 0.9 * (0.5 * 10 + 0.5 * third)
  first = 1 + 0.9 * (0.5 * 10 + 0.5 * second)
  returns = np.array([first, second, third])
  discounts = np.array([1.0, 0.9, 0.81])
  assert np.allclose(imag['returns'], returns[:, None], rtol=1e-5)
  assert np.allclose(imag['weights'], discounts[:, None], rtol=1e-5)
  assert np.isclose(loss, -(discounts * returns).mean(), rtol=1e-5)
  assert imag['value'].shape == (3, 2 * 5)
  value_loss, _ = agent.behavior.value_loss(**imag)
  error = 0.5 * (returns - 10) ** 2 + 0.5 * np.log(2 * np.pi)  # Eq. 8
  assert np.isclose(value_loss, (discounts * error).mean(), rtol=1e-5)


def test_values_of_the_slow_copy_are_those_in_eq_6(tmp_path):
  changes = dict(discount=0.9, disclam=0.5, slow_value=0.1)
  agent = constant_agent(tmp_path, 1.0, 10.0, **changes)
  behavior = agent.behavior
  _, _, post = model_losses(agent)

  def check(value, slow):
    """Values are the model's, and all in the targets the target network's."""
    _, imag, _ = behavior.actor_loss(post, dream_seeds(agent))
    np.testing.assert_allclose(imag['value'], value, rtol=1e-5)
    third = 1 + 0.9 * slow
    second = 1 + 0.9 * (0.5 * slow + 0.5 * third)
    first = 1 + 0.9 * (0.5 * slow + 0.5 * second)
    returns = np.array([first, second, third])[:, None]
    np.testing.assert_allclose(imag['returns'] / returns, 1, rtol=1e-5)

  behavior.before_update(False)  # the first update: the copy is a copy
  check(10, slow=10)
  set_bias(behavior.value, 20.0)
  behavior.before_update(False)
  check(20, slow=10)
  behavior.after_update({})
  check(20, slow=11)
  behavior.after_update({})
  check(20, slow=11.9)
  # A checkpoint has it, and who only acts needs none.
  assert len(agent.trackable()['slow_value']) == len(behavior.value.weights)
  assert 'slow_value' not in agent.knowledge()
  assert all('slow' not in w.path for w in agent.optimizers['value'].variables)


def test_logged_numbers_by_hand(tmp_path):
  """Entropies of prior and posterior, and what is imagined."""
  agent = constant_agent(tmp_path, 1.0, 20.0, discount=0.9, disclam=0.5)
  for layer, raw in (('_img3', 2.0), ('_obs2', -1.0)):
    bias = getattr(agent.world.dynamics, layer).bias
    bias.assign([0, 0, 0, raw, raw, raw])
  _, metrics, post = model_losses(agent)
  for name, raw in (('prior_ent', 2.0), ('post_ent', -1.0)):
    std = np.log1p(np.exp(raw)) + 0.1
    entropy = 3 * 0.5 * np.log(2 * np.pi * np.e * std**2)
    assert np.isclose(metrics[name], entropy, rtol=1e-5), name
  _, metrics = agent.behavior.losses(post, dream_seeds(agent))
  assert np.isclose(metrics['imag_reward'], 1.0)
  assert np.isclose(metrics['imag_value'], 20.0)
  third = 1 + 0.9 * 20
  second = 1 + 0.9 * (0.5 * 20 + 0.5 * third)
  first = 1 + 0.9 * (0.5 * 20 + 0.5 * second)
  assert np.isclose(metrics['imag_return'], (first + second + third) / 3)
  each = metrics['action_ent'] / 2
  assert np.isclose(metrics['action_ent_each'], each)


def test_predicted_chances_are_at_most_one(tmp_path):
  """Though a head of discounts may put out more than the discount."""
  agent = make_agent(tmp_path, pcont=True, behavior='actor')
  agent.world.pcont._out.bias.assign([9.0])
  feat = agent.world.dynamics.get_feat(agent.world.dynamics.initial(2))
  np.testing.assert_array_equal(agent.world.continuation(feat), [1, 1])
  pcont = agent.world.pcont(feat).mean()
  assert (pcont.numpy() > agent._c.discount).all()
  feat, ones = feat[None], tf.ones([3, 2])
  returns, _ = agent.behavior.returns(feat, ones, pcont[None] * ones)
  np.testing.assert_array_equal(returns[:, 0], [3, 2, 1])


def test_pcont_weights_and_starts(tmp_path):
  agent = constant_agent(tmp_path, 1.0, 2.0, pcont=True, disclam=1.0)
  set_bias(agent.world.pcont, np.log(0.8 / 0.2))
  _, _, post = model_losses(agent)
  _, imag, _ = agent.behavior.actor_loss(post, dream_seeds(agent))
  # The last state of each sequence may be terminal: 4 of 5 are starts.
  assert imag['value'].shape == (3, 2 * 4)
  assert np.allclose(imag['weights'][:, 0], [1.0, 0.8, 0.64], rtol=1e-5)
  first = 1 + 0.8 * (1 + 0.8 * (1 + 0.8 * 2))
  assert np.allclose(imag['returns'][0], first, rtol=1e-5)


def test_no_imagination_starts_where_an_episode_may_have_ended(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  _, _, post = model_losses(agent)
  starts = agent.behavior.starts(post, tf.constant([0, 1]))
  for name, value in post.items():
    expected = tf.reshape(value[:, :-1], [2 * 4, -1])
    np.testing.assert_array_equal(starts[name], expected)


def test_chance_to_get_there_is_no_way_to_a_larger_objective(tmp_path):
  """The weights of Eq. 7 have no gradient, though they are predicted."""
  agent = make_agent(
    tmp_path, pcont=True, horizon=3, disclam=1.0, action_init_std=1.0
  )
  for head, value in ((agent.world.reward, 1.0), (agent.behavior.value, 0.0)):
    for variable in head.variables:
      variable.assign(tf.zeros_like(variable))
    set_bias(head, value)
  _, _, post = model_losses(agent)
  seeds = dream_seeds(agent)

  def plain():
    """V_2 = 1 and V_1 = 1 + g_1; both count half, V_2 times g_1 as given."""
    feat, _ = agent.behavior.imagine(post, seeds)
    return -0.5 * tf.reduce_mean(agent.world.pcont(feat[0]).mean())

  variables = [v.value for v in agent.optimizers['actor'].variables]
  grads = []
  for function in (plain, lambda: agent.behavior.actor_loss(post, seeds)[0]):
    with tf.GradientTape() as tape:
      loss = function()
    grad = tape.gradient(loss, variables)
    grads.append(np.concatenate([np.ravel(x) for x in grad]))
  scale = np.abs(grads[0]).max()
  assert scale > 0
  np.testing.assert_allclose(grads[1] / scale, grads[0] / scale, atol=1e-3)


def test_imagination_leaves_the_start_state_out(tmp_path):
  """The first imagined feature is one transition away from the posterior."""
  agent = make_agent(tmp_path)
  _, _, post = model_losses(agent)
  seeds = dream_seeds(agent)
  feat, _ = agent.behavior.imagine(post, seeds)
  dynamics, actor = agent.world.dynamics, agent.behavior.actor
  start = {k: tf.reshape(v, [-1, v.shape[-1]]) for k, v in post.items()}
  of_action, of_state = tf.reshape(seeds, [-1, 2, 2])[0]
  outputs = actor.outputs(dynamics.get_feat(start))
  action, _ = actor.draw(outputs, of_action)
  state = dynamics.img_step(start, action, of_state)
  np.testing.assert_allclose(feat[0], dynamics.get_feat(state), rtol=1e-5)
  deter = feat[..., agent._c.stoch_size :]
  assert not np.allclose(deter[0], start['deter'])
  assert not np.allclose(deter[1], deter[0])


def test_actor_gradient_is_that_of_a_finite_difference(tmp_path):
  """Through reward, value and dynamics, with the noise held fixed.

  No gradient flows through what the policy sees, so here it is blind: its
  output is its last bias alone, and finite differences must agree.
  """
  agent = make_agent(tmp_path, action_init_std=1.0)
  out = agent.behavior.actor._out
  kernel, bias = out.kernel, out.bias
  kernel.assign(tf.zeros_like(kernel))
  _, _, post = model_losses(agent)

  def loss():
    return agent.behavior.actor_loss(post, dream_seeds(agent))[0]

  with tf.GradientTape() as tape:
    value = loss()
  grad = tape.gradient(value, bias.value).numpy()
  base, numeric = bias.numpy(), np.zeros_like(grad)
  for i in range(len(base)):
    for sign in (1, -1):
      changed = base.copy()
      changed[i] += sign * 2e-2
      bias.assign(changed)
      numeric[i] += sign * float(loss()) / 4e-2
  scale = np.abs(grad).max()
  assert scale > 1e-3
  np.testing.assert_allclose(grad / scale, numeric / scale, atol=0.01)


def test_behavior_gradients_beside_a_plain_loop(tmp_path):
  """Eq. 6, 7 and 8 step by step; the policy's input carries no gradient."""
  agent = make_agent(tmp_path, action_init_std=1.0)
  c, dynamics = agent._c, agent.world.dynamics
  _, _, post = model_losses(agent)

  def plain(stop=tf.stop_gradient):
    seeds = agent.seeds(2 * c.horizon, 1)
    latent = {k: tf.reshape(v, [-1, v.shape[-1]]) for k, v in post.items()}
    feats = []
    for t in range(c.horizon):
      dist = agent.behavior.actor(stop(dynamics.get_feat(latent)))
      action = dist.sample(seed=seeds[2 * t])
      latent = dynamics.img_step(latent, action, seeds[2 * t + 1])
      feats.append(dynamics.get_feat(latent))
    rewards = [agent.world.reward(x).mean() for x in feats]
    values = [agent.behavior.value(x).mean() for x in feats]
    actor, value, target = 0.0, 0.0, values[-1]
    for t in reversed(range(c.horizon - 1)):
      following = (1 - c.disclam) * values[t + 1] + c.disclam * target
      target = rewards[t] + c.discount * following
      weight = c.discount**t / (c.horizon - 1)
      actor -= weight * tf.reduce_mean(target)
      like = agent.behavior.value(feats[t]).log_prob(tf.stop_gradient(target))
      value -= weight * tf.reduce_mean(like)
    return actor, value

  def real():
    loss, imag, _ = agent.behavior.actor_loss(post, dream_seeds(agent))
    return loss, agent.behavior.value_loss(**imag)[0]

  def gradients(losses):
    with tf.GradientTape(persistent=True) as tape:
      results = losses()
    opts = (agent.optimizers['actor'], agent.optimizers['value'])
    for loss, opt in zip(results, opts, strict=True):
      grads = tape.gradient(loss, [v.value for v in opt.variables])
      yield tf.concat([tf.reshape(g, [-1]) for g in grads], 0).numpy()

  for grad, expected in zip(gradients(real), gradients(plain), strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(grad / scale, expected / scale, atol=1e-4)
  grad, through = (
    next(gradients(real)),
    next(gradients(lambda: plain(tf.identity))),
  )
  assert np.abs(grad - through).max() > 1e-2 * np.abs(grad).max()


@pytest.mark.parametrize('size', [8, 4])
def test_update_beside_stock_layers(tmp_path, size):
  """Losses and gradients of a whole update, as tests/reference.py has them.

  With the small state, the decoder takes a shorter way.
  """
  changes = dict(deter_size=size, cnn_depth=8, free_nats=0.0)
  changes['action_init_std'] = 1.0
  agent = make_agent(tmp_path, **changes)
  data = dreamer.preprocess(batch_of(agent), agent._c)
  losses, expected, _ = reference.Reference(agent).gradients(data)
  with layers.Tapes(agent.optimizers['model'].variables) as tapes:
    model, metrics, post = agent.world.losses(data, agent.seeds(5, 0))
  grads = agent._gradients(tapes, model)
  behavior = agent._behavior_gradients(post)
  grads.update(behavior[0])
  metrics.update(behavior[1])
  for name, loss in losses.items():
    np.testing.assert_allclose(metrics[f'{name}_loss'], loss, rtol=1e-5)
    for grad, target in zip(grads[name], expected[name], strict=True):
      error = np.abs(grad - target).max()
      assert error <= 1e-3 * np.abs(target).max(), name


def test_noise_is_new_in_every_update(tmp_path):
  agent = make_agent(tmp_path)
  drawn = []
  for _ in range(3):
    drawn += [agent.seeds(4, stream).numpy() for stream in (0, 1)]
    agent.updates.assign_add(1)
  assert len(np.unique(np.concatenate(drawn))) == 3 * 2 * 4 * 2
  other = make_agent(tmp_path, seed=1).seeds(4, 0).numpy()
  assert not (other == drawn[0]).any()
  again = make_agent(tmp_path).seeds(4, 0).numpy()
  np.testing.assert_array_equal(again, drawn[0])


# --- What moves what --------------------------------------------------------


@pytest.mark.slow
def test_xla_computes_the_same(tmp_path, monkeypatch):
  """With hardly any noise, which XLA draws by an algorithm of its own."""
  monkeypatch.setattr(models, '_sample', lambda stats, seed: stats['mean'])
  results = []
  for jit in ('False', 'True'):
    agent = make_agent(tmp_path / jit, jit=jit, action_init_std=1e-4)
    batch = batch_of(agent)
    obs = {'image': batch['image'][0, :1]}
    start = agent.world.dynamics.initial(1), tf.zeros([1, 2])
    args = (obs, np.array([True]), start, np.float32(0), True)
    with eagerly() if jit == 'False' else contextlib.nullcontext():
      metrics = agent.train(batch)
      results.append(dict(metrics, action=agent.policy(*args)[0]))
  plain, compiled = results
  noisy = {'action_ent', 'action_ent_each'}
  for key in plain.keys() - noisy:
    np.testing.assert_allclose(
      compiled[key], plain[key], rtol=2e-3, atol=1e-3, err_msg=key
    )


def test_each_loss_moves_its_own_networks(tmp_path):
  agent = make_agent(tmp_path)
  batch = batch_of(agent)
  opts = agent.optimizers
  rates = {k: float(o.optimizer.learning_rate) for k, o in opts.items()}
  for opt in opts.values():
    opt.optimizer.learning_rate = 0.0
  still = agent.train(batch)
  for name in opts:
    for other, opt in opts.items():
      opt.optimizer.learning_rate = rates[other] if other == name else 0.0
    before = {k: weights(o) for k, o in opts.items()}
    metrics = agent.train(batch)
    if name == 'model':  # all losses are computed before it moves
      for key in ('model_loss', 'actor_loss', 'value_loss'):
        np.testing.assert_allclose(metrics[key], still[key], rtol=1e-6)
    assert {k for k in opts if moved(opts[k], before[k])} == {name}
    assert float(metrics[f'{name}_grad_norm']) > 0
  assert agent.train.experimental_get_tracing_count() == 1


def test_networks_and_optimizers_are_as_the_flags_say(tmp_path):
  """Layers, activations; of each optimizer rate, clipping, epsilon, decay."""
  rates = dict(model_lr=1e-2, value_lr=3e-2, actor_lr=1e-1)
  changes = dict(
    pcont=True, pcont_layers=1, dense_act='relu', cnn_act='tanh', **rates
  )
  agent = make_agent(tmp_path, grad_clip=0.5, opt_eps=0.1, **changes)
  networks = agent.networks()
  layers = {k: len(networks[k].weights) // 2 for k in ('reward', 'pcont')}
  assert layers == dict(reward=2 + 1, pcont=1 + 1)
  found = {
    name: {x.activation.__name__ for x in network._flatten_layers()
           if hasattr(x, 'activation')}
    for name, network in networks.items()
  }  # fmt: skip
  dense = {'relu', 'linear'}
  assert all(found[k] == dense for k in ('actor', 'value', 'reward', 'pcont'))
  assert found['dynamics'] == {*dense, 'tanh'}  # that of the GRU
  assert found['encode'] == {'tanh'} and found['decode'] == {'tanh', 'linear'}
  agent.set_learning_rates()
  for name, opt in agent.optimizers.items():
    before = weights(opt)
    opt.apply([tf.ones_like(v) for v in before])
    size = 0.5 / sum(v.size for v in before) ** 0.5  # clipped to a norm of 0.5
    mean, root = 0.1 * size, 0.001**0.5 * size
    step = rates[f'{name}_lr'] * 0.001**0.5 / 0.1 * mean / (root + 0.1)
    for new, old in zip(weights(opt), before, strict=True):
      np.testing.assert_allclose(old - new, step, rtol=0.02, atol=1e-7)
  for name in rates:  # as of a run that resumes with other flags
    agent._c[name] = 0.5
  agent.set_learning_rates()
  for opt in agent.optimizers.values():
    assert float(opt.optimizer.learning_rate) == 0.5
  decay = dict(weight_decay=0.1, weight_decay_pattern='h1/kernel')
  agent = make_agent(tmp_path, **decay)
  opt = agent.optimizers['value']
  for variable in opt.variables:
    variable.assign(tf.ones_like(variable))
  opt.apply([tf.zeros_like(v) for v in opt.variables])
  decayed = {v.path for v in opt.variables if (v.numpy() < 1).all()}
  assert decayed == {'value/h1/kernel'}


def test_the_mode_is_collected_where_that_is_asked(tmp_path):
  agent = make_agent(tmp_path, action_init_std=1.0)
  latent = agent.world.dynamics.initial(3)
  seed = tf.constant([1, 2])

  def act(training):
    return agent.behavior.act(latent, seed, training).numpy()

  assert (act(True) != act(False)).all()
  agent._c.collect_action = 'mode'
  np.testing.assert_array_equal(act(True), act(False))


@pytest.mark.parametrize('training', [False, True])
def test_acting_and_evaluating_move_nothing(tmp_path, training):
  agent = make_agent(tmp_path)
  before = all_weights(agent)
  image = np.zeros((2, 64, 64, 3), np.uint8)
  reset = np.array([True, True])
  state = None
  for _ in range(3):
    action, state = agent({'image': image}, reset, state, training=training)
    reset = np.array([False, True])
  assert action.shape == (2, 2)
  assert (np.abs(action) <= 1).all()
  assert agent.step == 0
  assert agent.updates == 0
  after = all_weights(agent)
  assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_policy_draws_from_the_saved_generator(tmp_path):
  agent = make_agent(tmp_path)
  saved = agent._random.state.numpy()
  obs = {'image': np.zeros((1, 64, 64, 3), np.uint8)}
  start = agent.world.dynamics.initial(1), tf.zeros([1, 2])
  args = (obs, np.array([True]), start, np.float32(0.3), True)
  first = agent.policy(*args)[0].numpy()
  assert (agent.policy(*args)[0].numpy() != first).any()
  agent._random.state.assign(saved)
  np.testing.assert_array_equal(agent.policy(*args)[0].numpy(), first)


def test_the_model_is_told_the_action_that_was_taken(tmp_path):
  """With the noise of sampling and of exploration, which are independent."""
  changes = dict(action_init_std=0.1, expl_amount=0.1)
  agents = [make_agent(tmp_path, seed=seed, **changes) for seed in (0, 1)]
  first, other = (agent._random.state.numpy() for agent in agents)
  assert (first != other).any()
  zero_weights(agents[0])
  obs = {'image': np.zeros((400, 64, 64, 3), np.uint8)}
  action, (_, told) = agents[0](obs, np.ones(400, bool))
  np.testing.assert_array_equal(told, action)
  assert abs(action.std() - 0.1 * 2**0.5) < 0.015


def test_evaluations_change_nothing_of_training(tmp_path):
  """Nor do those of the same weights differ by what came before."""
  agent = make_agent(tmp_path)
  obs, yes, no = {'image': np.zeros((1, 64, 64, 3), np.uint8)}, [True], [False]

  def evaluate():
    state, reset = None, yes
    for _ in range(3):
      action, state = agent(obs, np.array(reset), state, training=False)
      reset = no
    return action

  _, state = agent(obs, np.array(yes))
  saved, actions, told = agent._random.state.numpy(), [], []
  for between in (False, True):
    agent._random.state.assign(saved)
    told += [evaluate()] if between else []
    action, after = agent(obs, np.array(no), state)
    told += [evaluate()] if between else []
    actions.append([action, agent(obs, np.array(no), after)[0]])
  np.testing.assert_array_equal(*actions)
  np.testing.assert_array_equal(*told)
  agent.step.assign(1000)
  assert (evaluate() != told[0]).any()
  agent.step.assign(0)
  agent._c.seed = 1
  assert (evaluate() != told[0]).any()


def test_reset_forgets_the_state(tmp_path):
  """After a reset an environment acts as if it had just begun."""
  agent = make_agent(tmp_path)
  image = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3))
  obs = {'image': image.astype(np.uint8)}
  zero = np.float32(0)
  start = agent.world.dynamics.initial(1), tf.zeros([1, 2])
  used = tf.nest.map_structure(lambda x: x + 1.0, start)
  deters = [
    agent.policy(obs, np.array([flag]), state, zero, False)[1][0]['deter']
    for flag, state in [(True, used), (False, start), (False, used)]
  ]
  assert np.allclose(deters[0], deters[1])
  assert not np.allclose(deters[0], deters[2])


def test_exploration_noise(tmp_path):
  assert {'auto', *exploration.KINDS} == set(configs.EXPL.words)
  agent = make_agent(tmp_path)
  seed = tf.constant([1, 2])
  action = tf.zeros([20000, 2])
  noisy = agent.explore(action, np.float32(0.3), seed).numpy()
  assert abs(noisy.std() - 0.3) < 0.01
  assert abs(np.corrcoef(noisy.T)[0, 1]) < 0.03
  assert (agent.explore(action, np.float32(0), seed).numpy() == 0).all()
  clipped = agent.explore(action + 0.9, np.float32(0.3), seed).numpy()
  assert clipped.max() == 1 and clipped.min() < 0.5
  assert (agent.noise(True), agent.noise(False)) == (np.float32(0.3), 0)
  agent._c.update(eval_noise=0.1)
  assert agent.noise(False) == np.float32(0.1)
  agent._c.update(expl='epsilon_greedy', action_dist='onehot')
  agent._choices = (2,)
  greedy = tf.one_hot(tf.zeros(20000, tf.int32), 2)
  mixed = agent.explore(greedy, np.float32(0.4), seed).numpy()
  assert set(np.unique(mixed)) == {0.0, 1.0}
  assert (mixed.sum(-1) == 1).all()
  assert abs(mixed[:, 1].mean() - 0.2) < 0.02  # half of random is the same
  agent._c.update(expl_decay=100.0, expl_min=0.1)
  agent.step.assign(100)
  assert np.isclose(agent.noise(True), 0.15)
  agent.step.assign(1000)
  assert np.isclose(agent.noise(True), 0.1)
  agent._c.update(expl_decay=0.0, expl_amount=0.0)
  assert np.isclose(agent.noise(True), 0.1)


def test_random_actions_are_uniform_and_none_without_an_amount():
  action, seed = tf.fill([20000, 2], 0.5), tf.constant([1, 2])
  explore = exploration.completely_random
  fair = explore(action, np.float32(0.1), seed).numpy()
  assert -1 <= fair.min() < -0.99 and 0.99 < fair.max() <= 1
  assert np.abs(fair.mean(0)).max() < 0.02
  np.testing.assert_allclose(fair.var(0), 1 / 3, atol=0.01)
  assert abs(np.corrcoef(fair.T)[0, 1]) < 0.03
  np.testing.assert_array_equal(explore(action, np.float32(0), seed), action)


@pytest.mark.slow
@eagerly()
def test_same_seed_same_updates(tmp_path):
  results = []
  for name in ('a', 'b'):
    agent = make_agent(tmp_path / name)
    folder = tmp_path / 'a' / 'episodes'
    for number in range(2):
      data = dreamer.load_dataset(folder, agent._c, number)
      metrics = agent.train(next(data))
    results.append(float(metrics['actor_loss']))
  assert results[0] == results[1]
  agent._c.seed = 5
  other = batch_of(agent)
  agent._c.seed = 0
  assert (other['action'] != batch_of(agent)['action']).any()


def test_float32_is_not_tf32(precision):
  tf.config.experimental.enable_tensor_float_32_execution(True)
  precision('16')
  assert not tf.config.experimental.tensor_float_32_execution_enabled()


@pytest.mark.parametrize(
  'hardware, share, policy',
  [
    (True, 0.5, 'mixed_bfloat16'),  # of float32's time, as on an AMD EPYC
    (True, 0.9, 'float32'),  # gains nothing worth its rounding
    (True, 1.8, 'float32'),  # as on an Intel Xeon without AMX
    (False, 0.5, 'float32'),
  ],
)
def test_bfloat16_where_it_is_faster(
  precision, monkeypatch, hardware, share, policy
):
  """On a CPU, by products that are measured, the least of several."""
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
  monkeypatch.setattr(run_setup, '_has_bfloat16', lambda: hardware)
  measure, calls = run_setup._product_seconds, []

  def seconds(matrix):
    assert measure(matrix) > 0
    calls.append(matrix.dtype)
    other_job = len(calls) % 3  # it takes all but every third product's time
    return (1 if matrix.dtype == tf.float32 else share) + 5 * other_job

  monkeypatch.setattr(run_setup, '_product_seconds', seconds)
  assert precision('auto') == policy == keras.config.dtype_policy().name
  assert set(calls) == ({tf.float32, tf.bfloat16} if hardware else set())
  assert precision('bfloat16') == 'mixed_bfloat16'  # whatever was measured


@pytest.mark.slow
@pytest.mark.parametrize('name', ['16', 'bfloat16'])
def test_reduced_precision_learns_finitely(tmp_path, precision, name):
  reference = make_agent(tmp_path / '32')
  batch = batch_of(reference)
  feat = np.random.default_rng(0).normal(size=[5, 11]).astype(np.float32)

  def images(agent):
    decoder = agent.world.representation.decoders['image']
    return decoder(tf.constant(feat)).mean().numpy()

  decoded = images(reference)
  with eagerly():
    expected = reference.train(batch)
  policy = precision(name)
  agent = make_agent(tmp_path / name)
  error = np.linalg.norm(images(agent) - decoded) / np.linalg.norm(decoded)
  assert 0 < error < 0.05
  metrics = agent.train(batch)
  encoder = agent.world.encoders['image']
  assert encoder._convs[0].compute_dtype == policy.split('_')[1]
  for key, value in metrics.items():
    assert value.dtype == tf.float32
    if not key.endswith('_norm'):
      assert np.isfinite(value), key
  for key in ('reward_loss', 'div', 'image_loss'):
    assert float(metrics[key]) == pytest.approx(float(expected[key]), 0.02)
  assert ('model_loss_scale' in metrics) == (name == '16')
  before = weights(agent.optimizers['model'])
  for _ in range(20):  # the loss scale comes down until a step is taken
    agent.train(batch)
  assert moved(agent.optimizers['model'], before)


@pytest.mark.slow
def test_resume_in_another_precision(tmp_path, precision):
  """float16 to float16 keeps the loss scale; to and from float32 works."""

  def restored(name, folder):
    precision(name)
    agent = make_agent(tmp_path / 'agent')
    saver = checkpoints.Checkpoints(tmp_path / folder, **agent.trackable())
    assert saver.restore()
    return agent, saver

  precision('16')
  first = make_agent(tmp_path / 'agent')
  batch = batch_of(first)
  for _ in range(20):
    scale = first.train(batch)['model_loss_scale']
  assert scale < 2**15  # not the initial one
  last = first.optimizers['model'].optimizer.dynamic_scale.numpy()
  checkpoints.Checkpoints(tmp_path / '16', **first.trackable()).save(1)
  same, _ = restored('16', '16')
  with eagerly():
    assert same.train(batch)['model_loss_scale'] == last
  plain, saver = restored('32', '16')
  for a, b in zip(
    first.trackable().values(), plain.trackable().values(), strict=True
  ):
    lists = (
      x if isinstance(x, list) else getattr(x, 'variables', []) for x in (a, b)
    )
    for x, y in zip(*lists, strict=True):
      np.testing.assert_array_equal(x.numpy(), y.numpy())
  before = weights(plain.optimizers['model'])
  with eagerly():
    assert 'model_loss_scale' not in plain.train(batch)
  assert moved(plain.optimizers['model'], before)
  saver.save(2)
  back, _ = restored('16', '16')
  with eagerly():
    assert np.isfinite(float(back.train(batch)['model_loss']))


def test_open_loop_keeps_the_truth_and_the_context(tmp_path):
  agent = make_agent(tmp_path, batch_length=8)
  batch = batch_of(agent)
  video = agent.world.open_loop(batch).numpy()
  assert video.shape == (2, 8, 192, 64, 3)
  np.testing.assert_allclose(
    video[:, :, :64], batch['image'] / 255.0, atol=1e-6
  )
  error = (video[:, :, 64:128] - video[:, :, :64] + 1) / 2
  np.testing.assert_allclose(video[:, :, 128:], error, atol=1e-6)
  # The model sees 5 images: with means that drown the noise of the states, it
  # follows the last of these, and not the next.
  kernel = agent.world.dynamics._obs2.kernel
  mean, std = np.split(kernel.numpy(), 2, -1)
  kernel.assign(np.concatenate([3000 * mean, 0 * std], -1))
  model = agent.world.open_loop(batch).numpy()[:, :, 64:128]
  change = []
  for t in (4, 5):
    image = batch['image'].copy()
    image[:, t] = 255 - image[:, t] // 4
    other = agent.world.open_loop({**batch, 'image': image}).numpy()
    change.append(np.abs(other[:, :, 64:128] - model)[:, t].mean())
  assert change[0] > 10 * change[1]


def test_open_loop_is_by_the_action_of_the_same_row(tmp_path):
  agent = make_agent(tmp_path, batch_length=8)
  batch = batch_of(agent)

  def predict(row=None):
    action = batch['action'].copy()
    if row is not None:
      action[:, row] = -action[:, row]
    tf.random.set_seed(0)  # the same noise
    data = agent.world.preprocess({**batch, 'action': action})
    return agent.world._predict(data).numpy()

  for row in (4, 5, 7):  # the last with an image, the next, the last of all
    changed = (predict(row) != predict()).any((0, 2))
    assert changed.tolist() == [t >= row for t in range(8)]


def test_epsilon_goes_from_04_to_01_in_200000_updates(tmp_path):
  """Appendix A; the release's halving by steps goes before it."""
  config = dreamer.define_config('atari_pong')
  agent = make_agent(tmp_path)
  names = ('expl_amount', 'expl_decay', 'expl_ramp', 'expl_min')
  agent._c.update({name: config[name] for name in names})
  amounts = []
  for updates in (0, 100_000, 200_000, 900_000):
    agent.updates.assign(updates)
    amounts.append(float(agent.noise(True)))
  np.testing.assert_allclose(amounts, [0.4, 0.25, 0.1, 0.1], rtol=1e-6)
  assert agent.noise(False) == 0
  agent._c.update(expl_decay=100.0)
  agent.step.assign(100)
  assert np.isclose(agent.noise(True), 0.2)


@eagerly()
def test_several_choices_are_acted_explored_and_learned(tmp_path):
  """Of 3 and 2: each action has one of each, in all three ways to explore."""
  config = dreamer.define_config('gym_Some-v0')
  config.update(SMALL, logdir=tmp_path)
  space = spaces.OneHotBox([3, 2])
  rng = np.random.default_rng(0)
  episode = random_episode(rng, 12, 5)
  episode['action'] = space.encode(rng.integers([3, 2], size=(12, 2)))
  tools.save_episodes(tmp_path / 'episodes', [episode])
  agent = dreamer.Dreamer(config, space)
  obs = dict(image=np.zeros((600, 64, 64, 3), np.uint8))
  reset, counts = np.ones(600, bool), {}
  state = agent.world.dynamics.initial(600), tf.zeros([600, 5])
  bias = agent.behavior.actor._out.bias
  bias.assign([9, 0, 0, 0, 9])
  for expl in ('epsilon_greedy', 'completely_random'):
    agent._c.expl = expl
    agent.policy = tf.function(type(agent).policy.__get__(agent))
    action, _ = agent.policy(obs, reset, state, np.float32(0.5), False)
    assert all(map(space.contains, action.numpy()))
    counts[expl] = action.numpy().mean(0)
  uniform = np.array([1, 1, 1, 1.5, 1.5]) / 3
  chosen = np.array([1, 0, 0, 0, 1])
  expected = (uniform + chosen) / 2
  np.testing.assert_allclose(counts['epsilon_greedy'], expected, atol=0.07)
  np.testing.assert_allclose(counts['completely_random'], uniform, atol=0.07)
  act = training.random_agent(space, 0)
  drawn = [act(None, np.ones(50, bool))[0] for _ in range(20)]
  assert all(map(space.contains, np.concatenate(drawn)))
  np.testing.assert_allclose(np.concatenate(drawn).mean(0), uniform, atol=0.07)
  before = weights(agent.optimizers['actor'])
  batches = dreamer.load_dataset(tmp_path / 'episodes', config)
  metrics = agent.train(next(batches))
  assert moved(agent.optimizers['actor'], before)
  each = metrics['action_ent'] / 2
  assert np.isclose(metrics['action_ent_each'], each)


def test_epsilon_is_drawn_for_each_environment(tmp_path):
  agent = make_agent(tmp_path, expl='epsilon_greedy')
  greedy = tf.one_hot(tf.zeros(8, tf.int32), 2)
  agent._choices = (2,)
  differs = np.stack(
    [
      (agent.explore(greedy, np.float32(0.5), seed) != greedy).numpy().any(-1)
      for seed in tools.make_seeds(500)
    ]
  )
  np.testing.assert_allclose(differs.mean(0), 0.25, atol=0.08)
  assert abs(np.corrcoef(differs.T) - np.eye(8)).max() < 0.2
