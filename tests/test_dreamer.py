"""The agent: its losses by hand, what moves what, whole runs."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
import dreamer  # noqa: I001 (it imports TensorFlow, quietly)
import compare
import configs
import gym
import keras
import models
import numpy as np
import reference
import spaces
import tensorflow as tf
import tools
import wrappers

ROOT = pathlib.Path(dreamer.__file__).parent
SMALL = {
  'deter_size': 8,
  'stoch_size': 3,
  'num_units': 8,
  'cnn_depth': 2,
  'batch_size': 2,
  'batch_length': 5,
  'horizon': 4,
}


def test_checkpoint_holds_every_variable_of_every_network(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  path = tools.Checkpoints(tmp_path / 'saved', **agent.trackable()).save(1)
  reader = tf.train.load_checkpoint(path)
  names = reader.get_variable_to_shape_map()
  for network in agent._networks:
    variables = getattr(agent, network).weights
    assert variables
    for index, variable in enumerate(variables):
      name = f'{network.strip("_")}/{index}/.ATTRIBUTES/VARIABLE_VALUE'
      assert name in names
      np.testing.assert_array_equal(reader.get_tensor(name), variable.numpy())


@pytest.fixture
def precision():
  """Sets a precision for one test."""
  before = keras.config.dtype_policy()
  yield dreamer.setup_precision
  keras.config.set_dtype_policy(before)


def random_episode(rng, rows=12, size=2):
  return {
    'image': rng.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8),
    'action': rng.uniform(-1, 1, (rows, size)).astype(np.float32),
    'reward': rng.uniform(0, 1, rows).astype(np.float32),
    'discount': np.ones(rows, np.float32),
  }


def make_agent(folder, size=2, **changes):
  """A small agent with three episodes to learn from."""
  keras.utils.set_random_seed(0)
  config = dreamer.define_config()
  config.update(SMALL, logdir=pathlib.Path(folder), **changes)
  datadir = config.logdir / 'episodes'
  rng = np.random.default_rng(0)
  tools.save_episodes(datadir, [random_episode(rng, 12, size) for _ in '123'])
  space = gym.spaces.Box(-1, 1, (size,), np.float32)
  return dreamer.Dreamer(config, datadir, space)


def batch_of(agent):
  return next(dreamer.load_dataset(agent._datadir, agent._c))


def weights(opt):
  return [v.numpy().copy() for v in opt.variables]


def moved(opt, before):
  return any((a != b).any() for a, b in zip(weights(opt), before, strict=True))


def zero_weights(agent):
  for net in agent._networks:
    for variable in getattr(agent, net).variables:
      variable.assign(tf.zeros_like(variable))


def set_bias(head, value):
  bias = head._out.bias
  bias.assign(tf.fill(bias.shape, tf.cast(value, bias.dtype)))


def test_parameter_counts_of_walker(tmp_path):
  config = dreamer.define_config('dmc_walker_walk')
  space = gym.spaces.Box(-1, 1, (6,), np.float32)
  agent = dreamer.Dreamer(config, tmp_path, space)
  assert agent.count_parameters() == {
    'model': 5296820,
    'actor': 578412,
    'value': 413601,
  }


# --- Losses with an answer worked out on paper ------------------------------


def test_model_loss_by_hand(tmp_path):
  """With zero weights every prediction is 0 and posterior equals prior."""
  agent = make_agent(tmp_path, free_nats=1.5, kl_scale=2.0)
  zero_weights(agent)
  batch = batch_of(agent)
  loss, _, metrics = agent._model_loss(dreamer.preprocess(batch, agent._c))
  image = batch['image'].astype(np.float64) / 255 - 0.5
  norm = 0.5 * np.log(2 * np.pi)
  image_loss = (0.5 * image**2 + norm).sum((2, 3, 4)).mean()
  reward = batch['reward'].astype(np.float64)
  reward_loss = (0.5 * reward**2 + norm).mean()
  assert np.isclose(metrics['image_loss'], image_loss, rtol=1e-5)
  assert np.isclose(metrics['reward_loss'], reward_loss, rtol=1e-5)
  assert np.isclose(metrics['div'], 0.0, atol=1e-6)
  # The KL of 0 is raised to the free nats, then scaled.
  assert np.isclose(loss, image_loss + reward_loss + 2.0 * 1.5, rtol=1e-5)


def test_free_nats_clip_the_mean_and_not_each_element(tmp_path):
  """One state far away, others equal: the mean KL counts, not the parts."""
  agent = make_agent(tmp_path, free_nats=0.5)
  zero_weights(agent)
  bias = agent._dynamics._obs2.bias  # moves the posterior mean by 1
  bias.assign(tf.constant([1.0, 0, 0, 0, 0, 0]))
  batch = dreamer.preprocess(batch_of(agent), agent._c)
  loss, _, metrics = agent._model_loss(batch)
  std = np.log(2.0) + 0.1
  kl = 0.5 / std**2
  assert np.isclose(metrics['div'], kl, rtol=1e-5)
  rest = metrics['image_loss'] + metrics['reward_loss']
  assert np.isclose(loss - rest, kl, rtol=1e-3)


def test_pcont_loss_by_hand(tmp_path):
  agent = make_agent(tmp_path, pcont=True)
  zero_weights(agent)
  set_bias(agent._pcont, 0.7)
  batch = batch_of(agent)
  batch['discount'][0, -1] = 0.0
  _, _, metrics = agent._model_loss(dreamer.preprocess(batch, agent._c))
  prob = 1 / (1 + np.exp(-0.7))
  target = 0.99 * batch['discount']  # soft labels 0 and gamma
  like = target * np.log(prob) + (1 - target) * np.log(1 - prob)
  assert np.isclose(metrics['pcont_loss'], -10 * like.mean(), rtol=1e-5)


def constant_agent(folder, reward, value, **changes):
  """Reward and value models that say the same everywhere."""
  agent = make_agent(folder, **changes)
  zero_weights(agent)
  set_bias(agent._reward, reward)
  set_bias(agent._value, value)
  return agent


def test_actor_and_value_loss_by_hand(tmp_path):
  agent = constant_agent(tmp_path, 1.0, 10.0, discount=0.9, disclam=0.5)
  post = agent._model_loss(dreamer.preprocess(batch_of(agent), agent._c))[1]
  loss, imag, _ = agent._actor_loss(post)
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
  value_loss, _ = agent._value_loss(**imag)
  error = 0.5 * (returns - 10) ** 2 + 0.5 * np.log(2 * np.pi)  # Eq. 8
  assert np.isclose(value_loss, (discounts * error).mean(), rtol=1e-5)


def test_pcont_weights_and_starts(tmp_path):
  agent = constant_agent(tmp_path, 1.0, 2.0, pcont=True, disclam=1.0)
  set_bias(agent._pcont, np.log(0.8 / 0.2))
  post = agent._model_loss(dreamer.preprocess(batch_of(agent), agent._c))[1]
  _, imag, _ = agent._actor_loss(post)
  # The last state of each sequence may be terminal: 4 of 5 are starts.
  assert imag['value'].shape == (3, 2 * 4)
  assert np.allclose(imag['weights'][:, 0], [1.0, 0.8, 0.64], rtol=1e-5)
  first = 1 + 0.8 * (1 + 0.8 * (1 + 0.8 * 2))
  assert np.allclose(imag['returns'][0], first, rtol=1e-5)


def test_imagination_leaves_the_start_state_out(tmp_path):
  """The first imagined feature is one transition away from the posterior."""
  agent = make_agent(tmp_path)
  post = agent._model_loss(dreamer.preprocess(batch_of(agent), agent._c))[1]
  feat, _ = agent._imagine(post)
  deter = feat[..., agent._c.stoch_size :]
  start = tf.reshape(post['deter'], [-1, 8])
  assert not np.allclose(deter[0], start)
  assert not np.allclose(deter[1], deter[0])


def test_actor_gradient_is_that_of_a_finite_difference(tmp_path):
  """Through reward, value and dynamics, with the noise held fixed.

  No gradient flows through what the policy sees, so here it is blind: its
  output is its last bias alone, and finite differences must agree.
  """
  agent = make_agent(tmp_path, action_init_std=1.0)
  kernel, bias = agent._actor._out.kernel, agent._actor._out.bias
  kernel.assign(tf.zeros_like(kernel))
  post = agent._model_loss(dreamer.preprocess(batch_of(agent), agent._c))[1]

  def loss():
    return agent._actor_loss(post)[0]

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
  c, dynamics = agent._c, agent._dynamics
  post = agent._model_loss(dreamer.preprocess(batch_of(agent), c))[1]

  def plain(stop=tf.stop_gradient):
    seeds = agent._seeds(2 * c.horizon, 1)
    latent = {k: tf.reshape(v, [-1, v.shape[-1]]) for k, v in post.items()}
    feats = []
    for t in range(c.horizon):
      dist = agent._actor(stop(dynamics.get_feat(latent)))
      action = dist.sample(seed=seeds[2 * t])
      latent = dynamics.img_step(latent, action, seeds[2 * t + 1])
      feats.append(dynamics.get_feat(latent))
    rewards = [agent._reward(x).mean() for x in feats]
    values = [agent._value(x).mean() for x in feats]
    actor, value, target = 0.0, 0.0, values[-1]
    for t in reversed(range(c.horizon - 1)):
      following = (1 - c.disclam) * values[t + 1] + c.disclam * target
      target = rewards[t] + c.discount * following
      weight = c.discount**t / (c.horizon - 1)
      actor -= weight * tf.reduce_mean(target)
      like = agent._value(feats[t]).log_prob(tf.stop_gradient(target))
      value -= weight * tf.reduce_mean(like)
    return actor, value

  def real():
    loss, imag, _ = agent._actor_loss(post)
    return loss, agent._value_loss(**imag)[0]

  def gradients(losses):
    with tf.GradientTape(persistent=True) as tape:
      results = losses()
    opts = (agent._opts['actor'], agent._opts['value'])
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
  grads, post, metrics = agent._model_gradients(data)
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
    drawn += [agent._seeds(4, stream).numpy() for stream in (0, 1)]
    agent._updates.assign_add(1)
  assert len(np.unique(np.concatenate(drawn))) == 3 * 2 * 4 * 2
  other = make_agent(tmp_path, seed=1)._seeds(4, 0).numpy()
  assert not (other == drawn[0]).any()
  again = make_agent(tmp_path)._seeds(4, 0).numpy()
  np.testing.assert_array_equal(again, drawn[0])


def test_devices_are_set_up_before_tensorflow_computes(tmp_path):
  """Memory growth, like virtual devices, cannot be set afterwards."""
  code = """
    import sys
    import dreamer
    import tensorflow as tf
    def make_team(*args):
      cpu = tf.config.list_physical_devices('CPU')[0]
      halves = [tf.config.LogicalDeviceConfiguration()] * 2
      tf.config.set_logical_device_configuration(cpu, halves)
      raise dreamer.tools.UserError('early enough')
    dreamer.distribute.make_team = make_team
    sys.exit(dreamer.main(['--logdir', sys.argv[1], '--task', 'toy_reach']))
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), str(tmp_path / 'run')],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert (done.returncode, done.stderr) == (
    2,
    'dreamer.py: error: early enough\n',
  )


# --- What moves what --------------------------------------------------------


def test_xla_computes_the_same(tmp_path, monkeypatch):
  """With hardly any noise, which XLA draws by an algorithm of its own."""
  monkeypatch.setattr(models, '_sample', lambda stats, seed: stats['mean'])
  results = []
  for jit in ('False', 'True'):
    agent = make_agent(tmp_path / jit, jit=jit, action_init_std=1e-4)
    batch = batch_of(agent)
    metrics = agent.train(batch)
    obs = {'image': batch['image'][0, :1]}
    start = agent._dynamics.initial(1), tf.zeros([1, 2])
    args = (obs, np.array([True]), start, np.float32(0), True)
    results.append(dict(metrics, action=agent.policy(*args)[0]))
  plain, compiled = results
  for key in plain.keys() - {'action_ent'}:  # that is of the noise
    np.testing.assert_allclose(
      compiled[key], plain[key], rtol=2e-3, atol=1e-3, err_msg=key
    )


def test_each_loss_moves_its_own_networks(tmp_path):
  agent = make_agent(tmp_path)
  batch = batch_of(agent)
  opts = {'model': agent._opts['model'], 'actor': agent._opts['actor']}
  opts['value'] = agent._opts['value']
  rates = {k: float(o.optimizer.learning_rate) for k, o in opts.items()}
  for name in opts:
    for other, opt in opts.items():
      opt.optimizer.learning_rate = rates[other] if other == name else 0.0
    before = {k: weights(o) for k, o in opts.items()}
    metrics = agent.train(batch)
    assert {k for k in opts if moved(opts[k], before[k])} == {name}
    assert float(metrics[f'{name}_grad_norm']) > 0
  assert agent.train.experimental_get_tracing_count() == 1


def test_acting_and_evaluating_move_nothing(tmp_path):
  agent = make_agent(tmp_path)
  before = weights(agent._opts['model']) + weights(agent._opts['actor'])
  image = np.zeros((2, 64, 64, 3), np.uint8)
  reset = np.array([True, True])
  state = None
  for _ in range(3):
    action, state = agent({'image': image}, reset, state, training=False)
    reset = np.array([False, True])
  assert action.shape == (2, 2)
  assert (np.abs(action) <= 1).all()
  assert agent.step == 0
  assert agent.updates == 0
  after = weights(agent._opts['model']) + weights(agent._opts['actor'])
  assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_acting_counts_environment_steps_and_learns(tmp_path):
  agent = make_agent(tmp_path, pretrain=2, action_repeat=3)
  image = np.zeros((2, 64, 64, 3), np.uint8)
  agent({'image': image}, np.array([True, True]))
  assert agent.step == 2 * 3  # environments times repeat
  assert agent.updates == 2


def act_once(agent):
  image = np.zeros((1, 64, 64, 3), np.uint8)
  agent({'image': image}, np.array([False]))


@pytest.mark.parametrize('deterministic', [False, True])
def test_updates_keep_their_ratio_to_steps(tmp_path, deterministic):
  """Whether they overlap with acting or not."""
  agent = make_agent(
    tmp_path,
    deterministic=deterministic,
    **dict(pretrain=3, train_every=10, train_steps=4, action_repeat=2),
  )
  for _ in range(16):  # at steps 0, 2, ..., 30: due at 0, 10, 20, 30
    act_once(agent)
  agent.catch_up()
  assert agent.step == 32
  assert agent.updates == 3 + 3 * 4


def test_acting_goes_on_while_learning(tmp_path):
  agent = make_agent(tmp_path, pretrain=1, train_every=2, train_steps=50)
  act_once(agent)  # waits for the first update, which traces
  assert agent.updates == 1
  act_once(agent)
  assert agent.step == 4
  assert agent.updates < 51  # 50 are due, under way in the background
  agent.catch_up()
  assert agent.updates == 51
  agent = make_agent(
    tmp_path, pretrain=1, train_every=2, train_steps=20, deterministic=True
  )
  act_once(agent)
  act_once(agent)
  assert agent.updates == 21


def test_failure_of_learning_reaches_the_caller(tmp_path):
  agent = make_agent(tmp_path, pretrain=1, train_every=2, train_steps=5)
  act_once(agent)
  agent._reward._out.bias.assign([np.nan])
  act_once(agent)
  with pytest.raises(tools.NonFiniteError, match='_loss became nan'):
    act_once(agent)
  agent.halt()


def test_halt_ends_learning_and_what_is_due_is_remembered(tmp_path):
  agent = make_agent(tmp_path, pretrain=1, train_every=2, train_steps=50)
  act_once(agent)
  act_once(agent)
  agent.halt()
  assert agent.updates < 51
  assert agent.updates + int(agent._pending.numpy()) == 51
  other = make_agent(tmp_path)
  saver = tools.Checkpoints(tmp_path / 'saved', **agent.trackable())
  saver.save(1)
  tools.Checkpoints(tmp_path / 'saved', **other.trackable()).restore()
  other.catch_up()
  act_once(other)  # as after a resume, all that is due
  assert other.updates == 51


def test_actor_delay_holds_the_actor_alone(tmp_path):
  agent = make_agent(tmp_path, actor_delay=2)
  opts = agent._opts['model'], agent._opts['actor'], agent._opts['value']
  for delayed in (True, True, False):
    before = [weights(opt) for opt in opts]
    agent._update()
    after = [moved(o, b) for o, b in zip(opts, before, strict=True)]
    assert after == [True, not delayed, True]


def test_policy_draws_from_the_saved_generator(tmp_path):
  agent = make_agent(tmp_path)
  saved = agent._random.state.numpy()
  obs = {'image': np.zeros((1, 64, 64, 3), np.uint8)}
  start = agent._dynamics.initial(1), tf.zeros([1, 2])
  args = (obs, np.array([True]), start, np.float32(0.3), True)
  first = agent.policy(*args)[0].numpy()
  assert (agent.policy(*args)[0].numpy() != first).any()
  agent._random.state.assign(saved)
  np.testing.assert_array_equal(agent.policy(*args)[0].numpy(), first)


def test_reset_forgets_the_state(tmp_path):
  """After a reset an environment acts as if it had just begun."""
  agent = make_agent(tmp_path)
  image = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3))
  obs = {'image': image.astype(np.uint8)}
  zero = np.float32(0)
  start = agent._dynamics.initial(1), tf.zeros([1, 2])
  used = tf.nest.map_structure(lambda x: x + 1.0, start)
  deters = [
    agent.policy(obs, np.array([flag]), state, zero, False)[1][0]['deter']
    for flag, state in [(True, used), (False, start), (False, used)]
  ]
  assert np.allclose(deters[0], deters[1])
  assert not np.allclose(deters[0], deters[2])


def test_exploration_noise(tmp_path):
  agent = make_agent(tmp_path)
  seed = tf.constant([1, 2])
  action = tf.zeros([20000, 2])
  noisy = agent._explore(action, np.float32(0.3), seed).numpy()
  assert abs(noisy.std() - 0.3) < 0.01
  assert abs(np.corrcoef(noisy.T)[0, 1]) < 0.03
  assert (agent._explore(action, np.float32(0), seed).numpy() == 0).all()
  clipped = agent._explore(action + 0.9, np.float32(0.3), seed).numpy()
  assert clipped.max() == 1 and clipped.min() < 0.5
  assert (agent._noise(True), agent._noise(False)) == (np.float32(0.3), 0)
  agent._c.update(expl='epsilon_greedy', action_dist='onehot')
  agent._choices = (2,)
  greedy = tf.one_hot(tf.zeros(20000, tf.int32), 2)
  mixed = agent._explore(greedy, np.float32(0.4), seed).numpy()
  assert set(np.unique(mixed)) == {0.0, 1.0}
  assert (mixed.sum(-1) == 1).all()
  assert abs(mixed[:, 1].mean() - 0.2) < 0.02  # half of random is the same
  agent._c.update(expl_decay=100.0, expl_min=0.1)
  agent.step = 100
  assert np.isclose(agent._noise(True), 0.15)
  agent.step = 1000
  assert np.isclose(agent._noise(True), 0.1)


def test_same_seed_same_updates(tmp_path):
  results = []
  for name in ('a', 'b'):
    agent = make_agent(tmp_path / name)
    episodes = sorted((tmp_path / 'a' / 'episodes').glob('*.npz'))
    agent._datadir = episodes[0].parent
    for number in range(2):
      data = dreamer.load_dataset(agent._datadir, agent._c, number)
      metrics = agent.train(next(data))
    results.append(float(metrics['actor_loss']))
  assert results[0] == results[1]
  agent._c.seed = 5
  other = batch_of(agent)
  agent._c.seed = 0
  assert (other['action'] != batch_of(agent)['action']).any()


@pytest.mark.parametrize('name', ['16', 'bfloat16'])
def test_reduced_precision_learns_finitely(tmp_path, precision, name):
  reference = make_agent(tmp_path / '32')
  batch = batch_of(reference)
  expected = reference.train(batch)
  policy = precision(name)
  agent = make_agent(tmp_path / name)
  metrics = agent.train(batch)
  assert agent._encode._convs[0].compute_dtype == policy.split('_')[1]
  for key, value in metrics.items():
    assert value.dtype == tf.float32
    if not key.endswith('_norm'):
      assert np.isfinite(value), key
  ratio = float(metrics['image_loss'] / expected['image_loss'])
  assert abs(ratio - 1) < 0.02
  assert ('model_loss_scale' in metrics) == (name == '16')
  before = weights(agent._opts['model'])
  for _ in range(20):  # the loss scale comes down until a step is taken
    agent.train(batch)
  assert moved(agent._opts['model'], before)


def test_resume_in_another_precision(tmp_path, precision):
  """float16 to float16 keeps the loss scale; to and from float32 works."""

  def restored(name, folder):
    precision(name)
    agent = make_agent(tmp_path / 'agent')
    saver = tools.Checkpoints(tmp_path / folder, **agent.trackable())
    assert saver.restore()
    return agent, saver

  precision('16')
  first = make_agent(tmp_path / 'agent')
  batch = batch_of(first)
  for _ in range(20):
    scale = first.train(batch)['model_loss_scale']
  assert scale < 2**15  # not the initial one
  last = first._opts['model'].optimizer.dynamic_scale.numpy()
  tools.Checkpoints(tmp_path / '16', **first.trackable()).save(1)
  same, _ = restored('16', '16')
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
  before = weights(plain._opts['model'])
  assert 'model_loss_scale' not in plain.train(batch)
  assert moved(plain._opts['model'], before)
  saver.save(2)
  back, _ = restored('16', '16')
  assert np.isfinite(float(back.train(batch)['model_loss']))


@pytest.mark.parametrize('deterministic', [False, True])
def test_non_finite_loss_stops_the_run(tmp_path, deterministic):
  agent = make_agent(tmp_path, deterministic=deterministic)
  agent._value._out.bias.assign([np.nan])
  with pytest.raises(tools.NonFiniteError, match='update 1.*nonfinite-1.json'):
    agent._update()
  record = json.loads((agent._datadir.parent / 'nonfinite-1.json').read_text())
  assert record['metrics']['value_loss'] == 'nan'
  # Which windows were in the batch: the same again, by their names.
  config = agent._c
  windows = next(dreamer.load_dataset(agent._datadir, config, source=True))
  assert record['windows'] == windows['source'].tolist()
  assert len(record['windows']) == config.batch_size
  name = record['windows'][0].partition(', row ')[0]
  assert (agent._datadir / name).exists()


def test_open_loop_keeps_the_truth_and_the_context(tmp_path):
  agent = make_agent(tmp_path, batch_length=8)
  batch = batch_of(agent)
  video = agent.open_loop(batch).numpy()
  assert video.shape == (2, 8, 192, 64, 3)
  np.testing.assert_allclose(
    video[:, :, :64], batch['image'] / 255.0, atol=1e-6
  )
  error = (video[:, :, 64:128] - video[:, :, :64] + 1) / 2
  np.testing.assert_allclose(video[:, :, 128:], error, atol=1e-6)
  # The model sees 5 images: with means that drown the noise of the states, it
  # follows the last of these, and not the next.
  kernel = agent._dynamics._obs2.kernel
  mean, std = np.split(kernel.numpy(), 2, -1)
  kernel.assign(np.concatenate([3000 * mean, 0 * std], -1))
  model = agent.open_loop(batch).numpy()[:, :, 64:128]
  change = []
  for t in (4, 5):
    image = batch['image'].copy()
    image[:, t] = 255 - image[:, t] // 4
    other = agent.open_loop({**batch, 'image': image}).numpy()[:, :, 64:128]
    change.append(np.abs(other - model)[:, t].mean())
  assert change[0] > 10 * change[1]


# --- Whole runs -------------------------------------------------------------


def command(logdir, *flags):
  return [
    *(sys.executable, str(ROOT / 'dreamer.py'), '--logdir', str(logdir)),
    *flags,
  ]


def read_metrics(logdir):
  lines = (logdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_debug_run_is_stopped_killed_and_resumed(tmp_path):
  """On a real control suite task, in a folder with all that names may have."""
  logdir = tmp_path / 'a [1]*? ~ü:%s.zip'
  flags = ('--preset', 'debug', '--task', 'dmc_cartpole_balance')
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  # Killed without warning once it has saved.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  saved = 'checkpoints/ckpt-[1-9]*.index'
  wait_for(lambda: list(logdir.glob(saved)), process)
  process.kill()
  process.communicate()
  # Resumed, and stopped by SIGTERM.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('Episode'):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  lines = ''.join(lines) + out
  assert process.returncode == 0
  assert re.search(r'Resumed at step [1-9]\d*, [1-9]\d* updates', lines)
  assert 'The same command resumes' in lines
  assert err == ''
  stopped = int(re.search(r'Stopped at step \d+, (\d+) updates', lines)[1])
  # Resumed again, to its end.
  before = dreamer.count_steps(
    logdir / 'episodes', dreamer.define_config(preset='debug')
  )
  process = subprocess.run(
    command(logdir, *flags, '--steps', str(before + 300)),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ''
  assert f'Resumed at step {before}, {stopped} updates' in process.stdout
  assert 'Found' in process.stdout
  assert 'Finished' in process.stdout
  assert f'other flags: --steps {before + 300} (was 100000).' in process.stdout
  check_logdir(logdir)
  # Evaluated, with pictures there too, and compared.
  words = ['--logdir', logdir, '--episodes=1', '--outdir', logdir / 'videos']
  process = subprocess.run(
    [sys.executable, ROOT / 'evaluate.py', *words],
    capture_output=True,
    text=True,
  )
  assert (process.returncode, process.stderr) == (0, '')
  assert f'step {before + 300}, ' in process.stdout
  names = {path.name for path in (logdir / 'videos').iterdir()}
  assert {'behavior.gif', 'behavior.mp4', 'prediction.png'} <= names
  (run,) = compare.find_runs([logdir])
  assert run.steps[-1] >= before and len(run.scores) >= 2


def wait_for(condition, process, seconds=120):
  start = time.time()
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.time() < start + seconds
    time.sleep(0.1)


def check_logdir(logdir):
  assert not list(logdir.rglob('*.tmp'))
  config = json.loads((logdir / 'config.json').read_text())['config']
  assert config['task'] == 'dmc_cartpole_balance'
  for path in logdir.glob('episodes/*.npz'):
    with np.load(path, allow_pickle=False) as episode:
      assert set(episode.files) == {
        *('image', 'action', 'reward', 'discount', 'position', 'velocity')
      }
      assert episode['image'].dtype == np.uint8
      assert episode['image'].shape == (51, 64, 64, 3)
      assert (episode['action'][0] == 0).all()
      assert path.stem.endswith('-51')
  keys = {k for line in read_metrics(logdir) for k in line}
  assert {
    *('step', 'train/return', 'train/length', 'test/return', 'test/length'),
    *('episodes', 'model_loss', 'image_loss', 'reward_loss', 'div', 'fps'),
    *('actor_loss', 'value_loss', 'model_grad_norm', 'action_ent'),
  } <= keys
  images = set()
  for path in logdir.glob('events.*'):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        text = tools.METRICS[value.tag]  # all are in a group, and described
        assert value.metadata.summary_description == text
        if value.HasField('image'):
          images.add(value.tag)
          assert value.image.encoded_image_string[:6] == b'GIF89a'
  assert {'test/policy', 'agent/openl'} <= images


@pytest.fixture
def main(tmp_path, capsys):
  """Calls `dreamer.main` on a small run; returns exit code and output."""
  handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  tf.config.run_functions_eagerly(True)  # few updates: tracing takes longer

  def call(*flags, task='toy_reach'):
    words = ['--logdir', str(tmp_path / 'run'), f'--task={task}']
    words += ['--preset=debug', '--precision=32', *flags]
    words += ['--eval_every=1000', '--log_images=False']
    return dreamer.main(words), ''.join(capsys.readouterr())

  yield call
  tf.config.run_functions_eagerly(False)
  for number, handler in handlers.items():
    signal.signal(number, handler)


def test_learning_needs_episodes(main, tmp_path):
  code, text = main('--prefill=0')
  assert code == 2
  assert 'learning needs episodes' in text and '--prefill 0' in text
  assert 'Choose --batch_length' not in text


def test_a_replay_that_is_full_at_the_start_and_learning_from_it(
  main, tmp_path
):
  code, text = main('--steps=200', '--prefill=200')
  assert code == 0
  assert 'Finished at step 200, 0 updates. Nothing was learned' in text
  assert '--steps more than 200, and --pretrain' in text
  # As it says.
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0 and 'Finished at step 250, 2 updates.\n' in text
  assert 'other flags: --steps 250 (was 200), --pretrain 2 (was 5).' in text
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0
  assert 'Nothing was left to do; a larger --steps goes on.' in text
  assert 'other flags' not in text
  assert_never_begins_anew(main, tmp_path / 'run')


def assert_never_begins_anew(main, logdir):
  """Whatever is left of checkpoints: nothing is overwritten, exit code 2."""
  folder = logdir / 'checkpoints'
  shutil.copytree(folder, logdir.parent / 'good')
  for path in folder.glob('*.index'):
    path.write_bytes(path.read_bytes()[:-9])
  flags = ('--steps=300', '--prefill=200', '--pretrain=2')
  for _ in range(2):
    code, text = main(*flags)
    assert code == 2
    assert 'has learned, but no checkpoint with its weights' in text
  aside = {p.name for p in folder.glob('*.broken')}
  assert len(aside) == 4 and not list(folder.glob('*.index'))
  # From metrics.jsonl alone it is known, too.
  shutil.rmtree(folder)
  code, text = main(*flags)
  assert code == 2 and 'Put whole files ckpt-*' in text
  # As it says: files from elsewhere, or anew.
  shutil.copytree(logdir.parent / 'good', folder, dirs_exist_ok=True)
  code, text = main(*flags)
  assert code == 0 and 'Resumed at step 250, 2 updates' in text
  shutil.rmtree(folder)
  (logdir / 'metrics.jsonl').rename(logdir.parent / 'old.jsonl')
  code, text = main(*flags, '--steps=350')
  assert code == 0 and 'Resumed' not in text
  assert 'Finished at step 350, 2 updates' in text


def test_short_episodes_are_said_once(main, tmp_path):
  code, text = main(
    *('--steps=220', '--prefill=120', '--pretrain=1', '--train_steps=1'),
    task='gym_test_users:Changing-v0',
  )
  assert code == 0, text
  assert text.count('have fewer rows than --batch_length 10') == 1
  assert re.search(r'Warning: [1-9]\d* of [1-9]\d* episodes have', text)


def test_environment_that_cannot_start(tmp_path):
  """No OpenGL at all: one clear message, exit code 2, no traceback."""
  result = subprocess.run(
    command(tmp_path / 'run', '--preset', 'debug'),
    capture_output=True,
    text=True,
    env={**os.environ, 'MUJOCO_GL': 'nonsense'},
  )
  assert result.returncode == 2
  assert 'MUJOCO_GL' in result.stderr
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--task', 'gym_CartPol-v1'], 'the nearest are CartPole-v1'),
    (['--task', 'gym_no_such_module:X-v0'], "'no_such_module'"),
    (['--task', 'atari_pong', '--action_dist', 'tanh_normal'], 'is onehot'),
  ],
)
def test_what_only_the_environment_knows_is_a_clear_error(
  tmp_path, flags, words
):
  result = subprocess.run(
    command(tmp_path / 'run', '--preset', 'debug', *flags),
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2, result.stderr
  assert words in result.stderr and 'Traceback' not in result.stderr


def test_epsilon_goes_from_04_to_01_in_200000_updates(tmp_path):
  """Appendix A; the release's halving by steps goes before it."""
  config = dreamer.define_config('atari_pong')
  agent = make_agent(tmp_path)
  names = ('expl_amount', 'expl_decay', 'expl_ramp', 'expl_min')
  agent._c.update({name: config[name] for name in names})
  amounts = []
  for updates in (0, 100_000, 200_000, 900_000):
    agent._updates.assign(updates)
    amounts.append(float(agent._noise(True)))
  np.testing.assert_allclose(amounts, [0.4, 0.25, 0.1, 0.1], rtol=1e-6)
  assert agent._noise(False) == 0
  agent._c.update(expl_decay=100.0)
  agent.step = 100
  assert np.isclose(agent._noise(True), 0.2)


def test_several_choices_are_acted_explored_and_learned(tmp_path):
  """Of 3 and 2: each action has one of each, in all three ways to explore."""
  config = dreamer.define_config('gym_Some-v0')
  config.update(SMALL, logdir=tmp_path)
  space = spaces.OneHotBox([3, 2])
  rng = np.random.default_rng(0)
  episode = random_episode(rng, 12, 5)
  episode['action'] = space.encode(rng.integers([3, 2], size=(12, 2)))
  tools.save_episodes(tmp_path / 'episodes', [episode])
  agent = dreamer.Dreamer(config, tmp_path / 'episodes', space)
  obs = dict(image=np.zeros((600, 64, 64, 3), np.uint8))
  reset, counts = np.ones(600, bool), {}
  state = agent._dynamics.initial(600), tf.zeros([600, 5])
  bias = agent._actor._out.bias
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
  act = dreamer.random_agent(space, 0)
  drawn = [act(None, np.ones(50, bool))[0] for _ in range(20)]
  assert all(map(space.contains, np.concatenate(drawn)))
  np.testing.assert_allclose(np.concatenate(drawn).mean(0), uniform, atol=0.07)
  before = weights(agent._opts['actor'])
  agent.train(next(dreamer.load_dataset(tmp_path / 'episodes', config)))
  assert moved(agent._opts['actor'], before)


def test_epsilon_is_drawn_for_each_environment(tmp_path):
  agent = make_agent(tmp_path, expl='epsilon_greedy')
  greedy = tf.one_hot(tf.zeros(8, tf.int32), 2)
  agent._choices = (2,)
  differs = np.stack(
    [
      (agent._explore(greedy, np.float32(0.5), seed) != greedy).numpy().any(-1)
      for seed in tools.make_seeds(500)
    ]
  )
  np.testing.assert_allclose(differs.mean(0), 0.25, atol=0.08)
  assert abs(np.corrcoef(differs.T) - np.eye(8)).max() < 0.2


def test_true_score_is_logged_though_the_model_sees_tanh(tmp_path):
  rng = np.random.default_rng(0)
  episode = dict(random_episode(rng), reward=np.full(12, 5, np.float32))
  config = dreamer.define_config('atari_pong')
  config.update(log_images=False)
  logger = tools.Logger(tmp_path, 100, 0)
  dreamer.summarize_episode(episode, config, tmp_path, logger, 'test')
  logger.close()
  assert read_metrics(tmp_path)[-1]['test/return'] == 60
  seen = dreamer.preprocess(episode, config)['reward']
  np.testing.assert_allclose(seen, np.tanh(5), rtol=1e-6)


def train_toy(logdir, task, steps):
  """A whole run of a toy task in a process of its own."""
  process = subprocess.run(
    command(
      *(logdir, '--task', task, '--seed', '0', '--steps', str(steps)),
      *('--precision', '32', '--log_images', 'False'),
    ),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stderr


def test_learns_toy_catch(tmp_path):
  """One-hot actions, early ends and predicted discounts, all at once.

  A random policy catches a third of the balls (return -0.33); the best all.
  """
  logdir = tmp_path / 'run'
  train_toy(logdir, 'toy_catch', 5500)
  train = [
    x['train/return'] for x in read_metrics(logdir) if 'train/return' in x
  ]
  random, learned = np.mean(train[:150]), np.mean(train[-50:])
  print(f'random {random:.2f}, learned {learned:.2f}')
  assert -0.5 < random < -0.15
  assert learned > 0.3
  # Predicted discounts after training: low where an episode ends only.
  flags = ['--logdir', str(logdir), '--task', 'toy_catch', '--precision', '32']
  config = configs.parse_flags(flags)
  datadir = logdir / 'episodes'
  agent = dreamer.Dreamer(config, datadir, wrappers.OneHotBox(3))
  assert tools.Checkpoints(
    logdir / 'checkpoints', **agent.trackable()
  ).restore()
  paths = sorted(datadir.glob('*.npz'))[-50:]
  episodes = [dict(np.load(path)) for path in paths]
  data = {k: np.stack([x[k] for x in episodes]) for k in episodes[0]}
  data = dreamer.preprocess(data, config)
  post, _ = agent._dynamics.observe(agent._encode(data), data['action'])
  pcont = agent._pcont(agent._dynamics.get_feat(post)).mean().numpy()
  assert pcont.shape == (50, 17)
  print(f'discounts {pcont[:, -1].max():.2f} and {pcont[:, :-1].min():.2f}')
  assert pcont[:, -1].mean() < 0.3 and pcont[:, :-1].mean() > 0.9
  assert (pcont[:, -1] < 0.3).mean() > 0.9
  assert (pcont[:, :-1] > 0.9).mean() > 0.9


def test_learns_toy_reach(tmp_path):
  """Some 1,100 updates, a minute on an idle core, earn 4 times the random.

  Of 50 at most, a random policy gets 9, the best constant action 7, and the
  best policy 47. This run ended at 40 to 42 with seeds 0 to 3 (scores/).
  """
  logdir = tmp_path / 'run'
  train_toy(logdir, 'toy_reach', 8000)
  metrics = read_metrics(logdir)
  train = [x['train/return'] for x in metrics if 'train/return' in x]
  test = [x['test/return'] for x in metrics if 'test/return' in x]
  random, learned = np.mean(train[:50]), np.mean(train[-20:])
  print(f'random {random:.1f}, learned {learned:.1f} of 50')
  assert 5 < random < 12  # the prefill
  assert learned > 1.5 * random
  assert np.mean(test[-3:]) > 1.5 * random
