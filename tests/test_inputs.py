"""Losses and networks of vectors and images; balanced KL, entropy, starts."""

import pathlib

import gym
import keras
import numpy as np
import pytest
import tensorflow as tf

import cli
import distribute
import dreamer
import layers
import library
import saved_model
import spaces
import tools
import world_model

BOTH = dict(image=(64, 64, 3), height=(), pose=(2, 3), flags=(4,))
VECTORS = dict(height=(), pose=(2, 3), flags=(4,))
SMALL = dict(
  deter_size=8,
  stoch_size=3,
  num_units=8,
  cnn_depth=2,
  batch_size=2,
  batch_length=5,
  horizon=4,
)


def episode(inputs, rows=12):
  rng = np.random.default_rng(rows)
  found = dict(
    action=rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
    reward=rng.uniform(0, 1, rows).astype(np.float32),
    discount=np.ones(rows, np.float32),
  )
  for name, shape in inputs.items():
    if spaces.is_image(name):
      found[name] = rng.integers(0, 256, (rows, *shape), dtype=np.uint8)
    elif name == 'flags':  # integers
      found[name] = rng.integers(-9, 9, (rows, *shape), dtype=np.int32)
    else:
      found[name] = rng.normal(0, 3, (rows, *shape)).astype(np.float32)
  return found


def make_agent(folder, inputs, **changes):
  keras.utils.set_random_seed(0)
  config = dreamer.define_config()
  config.update(SMALL, logdir=pathlib.Path(folder), **changes)
  tools.save_episodes(folder / 'episodes', [episode(inputs, n) for n in (9, 8)])
  space = gym.spaces.Box(-1, 1, (2,), np.float32)
  return dreamer.Dreamer(config, space, inputs=inputs)


def batch_of(agent):
  folder, inputs = agent._c.logdir / 'episodes', agent.world.inputs
  return next(dreamer.load_dataset(folder, agent._c, inputs=inputs))


def losses(agent):
  data = agent.world.preprocess(batch_of(agent))
  return agent.world.losses(data, agent.seeds(data['action'].shape[1], 0))


@pytest.mark.parametrize('other', ['a_b', 'A_b'])
def test_inputs_of_one_name_are_not_exported(tmp_path, other):
  agent = make_agent(tmp_path, {'a/b': (), other: (2,)})
  with pytest.raises(cli.UserError, match='two inputs would be called (a|A)_b'):
    saved_model.export(agent, tmp_path / 'exported')
  assert not (tmp_path / 'exported').exists()


# --- Losses -----------------------------------------------------------------


def test_vectors_become_one_in_symlog():
  obs = episode(BOTH)
  config = dreamer.define_config()
  data = dreamer.preprocess(obs, config, BOTH)
  assert sorted(data) == ['action', 'discount', 'image', 'reward', 'vector']
  for t in (0, 7):
    flat = [obs[k][t].ravel() for k in ('height', 'pose', 'flags')]
    flat = np.concatenate(flat).astype(np.float64)
    expected = np.sign(flat) * np.log(1 + np.abs(flat))
    np.testing.assert_allclose(data['vector'][t], expected, rtol=1e-5)
  plain = dreamer.preprocess(obs, dict_of(config, vector_scale='none'), BOTH)
  np.testing.assert_allclose(plain['vector'][3, -4:], obs['flags'][3])


def dict_of(config, **changes):
  return type(config)(config, **changes)


def test_likelihood_of_a_vector_in_closed_form(tmp_path):
  """-1/2 sum((x - m)^2 / s^2) - D (ln s + 1/2 ln 2 pi), with D = 11."""
  agent = make_agent(tmp_path, VECTORS, vector_std=0.3)
  data = agent.world.preprocess(batch_of(agent))
  feat = tf.random.normal([2, 5, 11])
  mean = agent.world.vector(feat).mean().numpy().astype(np.float64)
  error = (data['vector'].numpy() - mean) / 0.3
  constant = 11 * (np.log(0.3) + 0.5 * np.log(2 * np.pi))
  expected = -0.5 * (error**2).sum(-1) - constant
  like = agent.world.vector(feat).log_prob(data['vector'])
  np.testing.assert_allclose(like, expected, rtol=1e-4)


def test_networks_of_vectors_and_states_are_as_the_flags_say(tmp_path):
  """And that of q(s | o) of Eq. 11, of features of 11 numbers."""
  changes = dict(vector_layers=1, reward_layers=3, num_units=7)
  changes.update(dense_act='relu', representation='contrastive')
  agent = make_agent(tmp_path, VECTORS, **changes)
  shapes = dict(encode_vector=[(11, 7)], vector=[(11, 7), (7, 11)])
  shapes.update(state=[(7, 7), (7, 2 * 11)])
  for name, expected in shapes.items():
    network = agent.networks()[name]
    assert [tuple(v.shape) for v in network.weights[::2]] == expected
    hidden = next(x for x in network._flatten_layers() if x.name == 'h1')
    assert hidden.activation is keras.activations.relu


@pytest.mark.parametrize(
  ('representation', 'terms'),
  [
    ('reconstruction', ['image_loss', 'reward_loss', 'vector_loss']),
    ('contrastive', ['reward_loss', 'state_loss', 'vector_loss']),
    ('reward', ['reward_loss', 'vector_loss']),
  ],
)
def test_loss_is_the_sum_of_its_terms(tmp_path, representation, terms):
  agent = make_agent(tmp_path, BOTH, representation=representation)
  loss, metrics, _ = losses(agent)
  found = sorted(k for k in metrics if k.endswith('_loss'))
  assert found == sorted([*terms, 'model_loss'])
  expected = sum(float(metrics[k]) for k in terms) + max(
    float(metrics['div']), agent._c.free_nats
  )
  assert float(loss['model']) == pytest.approx(expected, rel=1e-5)


def test_several_images_have_networks_of_their_own(tmp_path):
  inputs = dict(image=(64, 64, 3), image_2=(64, 64, 3))
  agent = make_agent(tmp_path, inputs)
  names = agent.networks()
  assert {'encode', 'encode_2', 'decode', 'decode_2'} <= set(names)
  for name in ('decode', 'decode_2'):  # all that they put out is 0
    for variable in names[name].variables:
      variable.assign(tf.zeros_like(variable))
  _, metrics, _ = losses(agent)
  batch = batch_of(agent)
  video = agent.world.open_loop(batch)
  assert video.shape == (2, 5, 192, 128, 3)
  for index, name in enumerate(inputs):
    image = batch[name] / 255.0
    error = 0.5 * (image - 0.5) ** 2 + 0.5 * np.log(2 * np.pi)
    loss = error.sum((2, 3, 4)).mean()
    assert float(metrics[f'{name}_loss']) == pytest.approx(loss, rel=1e-5)
    truth = video[:, :, :64, 64 * index : 64 * (index + 1)]
    np.testing.assert_allclose(truth, image, atol=1e-6)


def test_the_term_of_vectors_moves_the_new_layers_and_what_is_below(tmp_path):
  """All weights of both new networks; not the heads of images and rewards."""
  agent = make_agent(tmp_path, BOTH)
  data = agent.world.preprocess(batch_of(agent))
  variables = agent.optimizers['model'].variables
  with layers.Tapes(variables) as tapes:
    embed = agent.world.embed(data)
    post, _ = agent.world.dynamics.observe(embed, data['action'])
    feat = agent.world.dynamics.get_feat(post)
    like = agent.world.vector(feat).log_prob(data['vector'])
    loss = tf.reduce_sum(like)
  grads = tapes.gradient(loss, variables)
  moved = {
    id(v)
    for v, grad in zip(variables, grads, strict=True)
    if grad is not None and np.abs(grad.numpy()).max() > 0
  }
  networks = agent.world.networks
  reached = {
    name
    for name, layer in networks.items()
    if moved & {id(v) for v in layer.trainable_variables}
  }
  assert reached == {'encode', 'encode_vector', 'dynamics', 'vector'}
  for name in ('encode_vector', 'vector'):
    assert all(id(v) in moved for v in networks[name].trainable_variables)


# --- Balanced KL, entropy, starts -------------------------------------------


def two_gaussians():
  """Posterior and prior of one number each, and their KL by the formula."""
  post = dict(mean=tf.constant([[[0.5]]]), std=tf.constant([[[0.4]]]))
  prior = dict(mean=tf.constant([[[-0.3]]]), std=tf.constant([[[0.9]]]))
  nats = np.log(0.9 / 0.4) + (0.4**2 + 0.8**2) / (2 * 0.9**2) - 0.5
  return post, prior, nats


@pytest.mark.parametrize('free', [0.0, 5.0])
def test_balance_shares_the_gradient_of_the_divergence(tmp_path, free):
  """b of the prior's gradient, 1 - b of the posterior's; none below free."""
  agent = make_agent(tmp_path, VECTORS, free_nats=free)
  grads = {}
  for balance in (0.0, 0.8):
    agent.world._c.kl_balance = balance
    post, prior, nats = two_gaussians()
    with tf.GradientTape() as tape:
      tape.watch([post, prior])
      div, cost = agent.world.divergence(post, prior)
    assert float(div) == pytest.approx(nats, rel=1e-5)
    assert float(cost) == pytest.approx(max(nats, free), rel=1e-5)
    of = tape.gradient(cost, [post['mean'], prior['mean']])
    grads[balance] = [float(tf.reduce_sum(x)) for x in of]
  whole = np.array([0.8 / 0.9**2, -0.8 / 0.9**2]) * (free == 0)
  np.testing.assert_allclose(grads[0.0], whole, rtol=1e-5)
  np.testing.assert_allclose(grads[0.8], whole * [0.2, 0.8], rtol=1e-5)


def behavior_losses(agent):
  _, _, post = losses(agent)
  return agent.behavior.losses(post, agent.seeds(2 * agent._c.horizon, 1))


def test_entropy_bonus_is_its_weight_times_the_entropy(tmp_path):
  agent = make_agent(tmp_path, VECTORS)
  plain, metrics = behavior_losses(agent)
  agent.behavior._c.actor_entropy = 0.1
  bonus, _ = behavior_losses(agent)
  # Without pcont the first two of H weights are 1, the next are gamma^i.
  entropy = entropies(agent)
  assert float(tf.reduce_mean(entropy)) == pytest.approx(
    float(metrics['action_ent']), rel=1e-5
  )
  weights = 0.99 ** np.array([0.0, 0.0, 1.0, 2.0])
  mean = (weights[:, None] * entropy.numpy()).mean()
  assert float(bonus['actor'] - plain['actor']) == pytest.approx(
    -0.1 * mean, rel=1e-4
  )
  assert float(bonus['value']) == pytest.approx(float(plain['value']))


def entropies(agent):
  _, _, post = losses(agent)
  seeds = agent.seeds(2 * agent._c.horizon, 1)
  return agent.behavior.imagine(post, seeds)[1]


def test_entropy_bonus_widens_the_actions(tmp_path):
  """From narrow actions the entropy rises with a large weight, not without."""
  grown = {}
  for weight in (0.0, 10.0):
    folder = tmp_path / str(weight)
    agent = make_agent(folder, VECTORS, actor_entropy=weight, actor_lr=3e-3)
    agent.behavior.actor._raw_init_std = -3.0  # narrow at first
    batch = batch_of(agent)
    ent = [float(agent.train(batch)['action_ent']) for _ in range(40)]
    grown[weight] = np.mean(ent[-5:]) - np.mean(ent[:5])
  assert grown[10.0] > 0.5 and grown[10.0] > grown[0.0] + 1


def test_imagination_starts_at_some_states_without_repetition(tmp_path):
  agent = make_agent(tmp_path, VECTORS, imag_starts=4)
  _, _, post = losses(agent)
  feat, entropy = agent.behavior.imagine(post, agent.seeds(8, 1))
  assert feat.shape == (4, 4, 11) and entropy.shape == (4, 4)


def test_rows_are_drawn_without_repetition():
  rows = dict(stoch=tf.reshape(tf.range(10), [10, 1]), deter=tf.range(10))
  drawn = []
  for seed in range(1000):
    some = distribute.some_rows(rows, 4, tf.constant([1, seed]))
    np.testing.assert_array_equal(some['stoch'][:, 0], some['deter'])
    drawn.append(some['deter'].numpy())
  assert all(len(set(x)) == 4 for x in drawn)
  counts = np.bincount(np.concatenate(drawn), minlength=10)
  assert (abs(counts - 400) < 77).all()  # 4000 draws over 10, 5 deviations
  for wanted in (0, 10, 11):
    assert distribute.some_rows(rows, wanted, tf.constant([1, 2])) is rows


def test_some_images_are_decoded_without_bias(tmp_path):
  """Means over many draws: the term of all images, and its gradient."""
  agent = make_agent(tmp_path, dict(image=(64, 64, 3)))
  data = agent.world.preprocess(batch_of(agent))
  feat = tf.random.stateless_normal([2, 5, 11], [0, 1])

  @tf.function(autograph=False)
  def term(seed):
    with tf.GradientTape() as tape:
      tape.watch(feat)
      likes = agent.world.representation.likes(feat, None, data, seed)
      like = tf.reduce_mean(likes['image'])
    return like, tape.gradient(like, feat)

  whole = term(tf.constant([0, 0]))
  agent.world.representation._c.decode_images = 4
  some = tf.function(term.python_function, autograph=False)
  draws = [some(tf.constant([1, seed])) for seed in range(300)]
  shares = [np.any(grad, -1).mean() for _, grad in draws]
  assert np.allclose(shares, 0.4)
  for means, exact in zip(zip(*draws, strict=True), whole, strict=True):
    means = np.array(means)
    error = means.mean(0) - exact.numpy()
    bound = 5 * means.std(0) / 300**0.5
    assert (abs(error) <= bound).all()


# --- Learning ---------------------------------------------------------------


@pytest.mark.slow
def test_predicts_a_linear_system_open_loop(tmp_path):
  """x' = A x + B a: from 5 steps of context, 25 steps ahead, after training."""
  cos, sin = np.cos(0.3), np.sin(0.3)
  matrix = 0.97 * np.array([[cos, -sin], [sin, cos]])
  rng = np.random.default_rng(0)
  episodes = []
  for _ in range(30):
    x, rows = rng.normal(0, 1, 2), []
    action = np.repeat(rng.uniform(-1, 1, (10, 1)), 6, 0)
    for a in action:
      x = matrix @ x + np.array([0.3, 0.0]) * a
      rows.append(x)
    episodes.append(
      dict(
        state=np.array(rows, np.float32),
        action=action.astype(np.float32),
        reward=np.array(rows, np.float32)[:, 0],
        discount=np.ones(60, np.float32),
      )
    )
  keras.utils.set_random_seed(0)
  config = dreamer.define_config('dmc_walker_walk', 'cpu', 'state')
  config.update(
    logdir=tmp_path, num_units=64, deter_size=64, stoch_size=8,
    batch_length=30, behavior='planning', vector_std=0.1, model_lr=3e-3,
  )  # fmt: skip
  tools.save_episodes(tmp_path / 'episodes', episodes)
  space = gym.spaces.Box(-1, 1, (1,), np.float32)
  inputs = dict(state=(2,))
  agent = dreamer.Dreamer(config, space, inputs=inputs)
  batches = dreamer.load_dataset(tmp_path / 'episodes', config, inputs=inputs)
  errors = []
  for count in (0, 400):
    for _ in range(count):
      agent.train(next(batches))
      agent.updates.assign_add(1)
    truth, model = agent.world.open_loop_curves(next(batches))['vector']
    late = (truth - model)[:, world_model.CONTEXT :]
    share = tf.reduce_mean(late**2) / tf.math.reduce_variance(truth)
    errors.append(float(share))
  assert errors[0] > 0.8 and errors[1] < 0.1


def test_the_library_tells_vectors_as_the_environment_has_them(tmp_path):
  """Undoing what the model's are scaled by, if they are."""
  for scale, expected in dict(none=2.0, symlog=np.exp(2.0) - 1).items():
    agent = make_agent(tmp_path / scale, VECTORS, vector_scale=scale)
    head = agent.world.vector
    for variable in head.variables:
      variable.assign(tf.zeros_like(variable))
    head._out.bias.assign(2.0 * tf.ones(11))
    obs = {k: np.zeros(shape, np.float32) for k, shape in VECTORS.items()}
    told = library.Agent(agent).imagine(obs, np.zeros((3, 2)))
    for name, shape in VECTORS.items():
      assert told[name].shape == (3, *shape)
      np.testing.assert_allclose(told[name], expected, rtol=1e-5)


def test_the_library_makes_environments_of_any_seed(tmp_path):
  agent = make_agent(tmp_path, VECTORS, seed=1)
  agent.config.update(task='toy_reach', inputs='state', parallel='none')
  agent, starts = library.Agent(agent), []
  for seed in (None, 1, 2):
    env = agent.make_env(seed)
    starts.append(tuple(env.reset(number=0)['state']))
    env.close()
  assert starts[0] == starts[1] != starts[2]
  assert agent.config.seed == 1
