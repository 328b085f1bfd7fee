"""Tests of the networks against plain NumPy in float64, same weights."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf

import layers
import models
import tools

POLICIES = ['float32', 'mixed_float16', 'mixed_bfloat16']


@pytest.fixture(autouse=True)
def policy(request):
  """The precision of a test: float32 unless it asks for another."""
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy(getattr(request, 'param', 'float32'))
  yield keras.config.dtype_policy()
  keras.config.set_dtype_policy(before)


every_policy = pytest.mark.parametrize('policy', POLICIES, indirect=True)


def randomize(layer, scale=0.5, seed=0):
  """Gives every weight, biases too, a random value."""
  rng = np.random.default_rng(seed)
  for variable in layer.trainable_variables:
    variable.assign(rng.normal(size=variable.shape) * scale)


def weights_of(layer):
  """Weights in float64 by the last two parts of their path."""
  return {
    '/'.join(v.path.split('/')[-2:]): v.numpy().astype(np.float64)
    for v in layer.trainable_variables
  }


def count(layer):
  return sum(int(np.prod(v.shape)) for v in layer.trainable_variables)


def elu(x):
  return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def softplus(x):
  return np.logaddexp(x, 0)


def dense(weights, name, x, act=lambda x: x):
  return act(x @ weights[f'{name}/kernel'] + weights[f'{name}/bias'])


# --- RSSM -------------------------------------------------------------------

STOCH, DETER, HIDDEN, ACTIONS, EMBED = 3, 5, 7, 2, 6


def make_rssm(seed=0):
  rssm = models.RSSM(STOCH, DETER, HIDDEN)
  rssm.obs_step(rssm.initial(1), tf.zeros([1, ACTIONS]), tf.zeros([1, EMBED]))
  randomize(rssm, seed=seed)
  return rssm


def make_state(batch, seed=0):
  rng = np.random.default_rng(seed)
  sizes = dict(mean=STOCH, std=STOCH, stoch=STOCH, deter=DETER)
  return {
    k: tf.constant(rng.normal(size=(batch, n)), tf.float32)
    for k, n in sizes.items()
  }


def normal(*shape, seed=0):
  return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


def numpy_gru(weights, x, h):
  """Cho et al. (2014), the reset gate after the recurrent product."""
  size = h.shape[-1]
  kernel, recurrent = weights['gru/kernel'], weights['gru/recurrent_kernel']
  bias = weights['gru/bias']
  z, r, c = (slice(i * size, (i + 1) * size) for i in range(3))
  update = scipy.special.expit(
    x @ kernel[:, z] + bias[0, z] + h @ recurrent[:, z] + bias[1, z]
  )
  reset = scipy.special.expit(
    x @ kernel[:, r] + bias[0, r] + h @ recurrent[:, r] + bias[1, r]
  )
  candidate = np.tanh(
    x @ kernel[:, c] + bias[0, c] + reset * (h @ recurrent[:, c] + bias[1, c])
  )
  return update * h + (1 - update) * candidate


def numpy_stats(x):
  mean, std = np.split(x, 2, -1)
  return mean, softplus(std) + 0.1


def numpy_img_step(weights, state, action):
  """Mean, std and deter of the prior."""
  stoch, deter = (np.float64(state[k]) for k in ('stoch', 'deter'))
  x = np.concatenate([stoch, np.float64(action)], -1)
  deter = numpy_gru(weights, dense(weights, 'img1', x, elu), deter)
  x = dense(weights, 'img3', dense(weights, 'img2', deter, elu))
  return *numpy_stats(x), deter


def numpy_obs_step(weights, state, action, embed):
  """Mean, std and deter of the posterior."""
  deter = numpy_img_step(weights, state, action)[-1]
  x = np.concatenate([deter, np.float64(embed)], -1)
  x = dense(weights, 'obs2', dense(weights, 'obs1', x, elu))
  return *numpy_stats(x), deter


def assert_stats(state, expected, rtol=1e-5):
  for key, value in zip(('mean', 'std', 'deter'), expected, strict=True):
    np.testing.assert_allclose(
      state[key], value, rtol=rtol, atol=rtol, err_msg=key
    )


def assert_states_equal(one, two, rtol=1e-5):
  assert set(one) == set(two) == {'mean', 'std', 'stoch', 'deter'}
  for key in one:
    np.testing.assert_allclose(
      one[key], two[key], rtol=rtol, atol=1e-6, err_msg=key
    )


def test_rssm_steps_against_numpy():
  rssm = make_rssm()
  weights = weights_of(rssm)
  assert len(weights) == 13
  state, action, embed = make_state(4), normal(4, ACTIONS), normal(4, EMBED)
  seed = tf.constant([1, 2])
  post, prior = rssm.obs_step(state, action, embed, seed)
  assert_stats(prior, numpy_img_step(weights, state, action))
  assert_stats(post, numpy_obs_step(weights, state, action, embed))
  assert_states_equal(rssm.img_step(state, action, seed), prior)
  # The image does change the posterior, and not the prior.
  other_post, other_prior = rssm.obs_step(state, action, -embed, seed)
  assert np.all(np.abs(other_post['mean'] - post['mean']).max(-1) > 1e-3)
  assert_states_equal(other_prior, prior)


def test_rssm_samples_follow_mean_and_std():
  rssm = make_rssm()
  state = {k: tf.repeat(v, 5000, 0) for k, v in make_state(1).items()}
  action = tf.repeat(normal(1, ACTIONS), 5000, 0)
  embed = tf.repeat(normal(1, EMBED), 5000, 0)
  post, prior = rssm.obs_step(state, action, embed, tf.constant([3, 4]))
  noises = []
  for result in (post, prior):
    noise = (result['stoch'] - result['mean']) / result['std']
    noises.append(noise.numpy())
    # Rows had the same inputs, so the noise is all that tells them apart:
    # independent across the batch and across the parts of the state.
    np.testing.assert_allclose(
      result['mean'] - result['mean'][:1], 0, atol=1e-5
    )
    assert len(np.unique(noise)) > 0.99 * np.size(noise)
    for column in noises[-1].T:
      assert scipy.stats.kstest(column, 'norm').pvalue > 1e-4
      neighbours = np.corrcoef(column[:-1], column[1:])[0, 1]
      assert abs(neighbours) < 0.06
  columns = np.concatenate(noises, 1)
  correlation = np.corrcoef(columns.T) - np.eye(2 * STOCH)
  # The prior's noise is not the posterior's.
  assert np.abs(correlation).max() < 0.06


def test_rssm_noise_depends_on_the_seed_alone():
  rssm = make_rssm()
  state, action = make_state(2), normal(2, ACTIONS)
  one, again, other = (
    rssm.img_step(state, action, tf.constant(s))['stoch'].numpy()
    for s in ([1, 2], [1, 2], [1, 3])
  )
  np.testing.assert_array_equal(one, again)
  assert np.all(one != other)
  drawn = [rssm.img_step(state, action)['stoch'].numpy() for _ in range(2)]
  assert np.all(drawn[0] != drawn[1])


def test_rssm_gradient_reaches_through_the_sample():
  rssm = make_rssm()
  state, action, embed = make_state(2), normal(2, ACTIONS), normal(2, EMBED)
  with tf.GradientTape() as tape:
    tape.watch([action, embed])
    post, prior = rssm.obs_step(state, action, embed, tf.constant([1, 2]))
    loss = tf.reduce_sum(post['stoch']) + tf.reduce_sum(prior['stoch'])
  variables = [v.value for v in rssm.trainable_variables]
  for grad in tape.gradient(loss, [action, embed, *variables]):
    assert grad is not None and np.any(grad != 0)


def test_rssm_smallest_std():
  rssm = make_rssm()
  for variable in rssm.trainable_variables:
    if variable.path.split('/')[-2:] in (['img3', 'bias'], ['obs2', 'bias']):
      variable.assign(np.full(variable.shape, -100.0))
  post, prior = rssm.obs_step(
    make_state(3), normal(3, ACTIONS), normal(3, EMBED)
  )
  np.testing.assert_allclose(post['std'], 0.1, rtol=1e-5)
  np.testing.assert_allclose(prior['std'], 0.1, rtol=1e-5)


@pytest.mark.parametrize('begin', ['initial', 'given'])
def test_observe_is_obs_step_in_a_loop(begin):
  rssm = make_rssm()
  embed, action = normal(3, 4, EMBED), normal(3, 4, ACTIONS, seed=1)
  seeds = tools.make_seeds(4, tf.random.Generator.from_seed(0))
  given = None if begin == 'initial' else make_state(3)
  post, prior = rssm.observe(embed, action, given, seeds)
  state = given or rssm.initial(3)
  for t in range(4):
    state, expected = rssm.obs_step(state, action[:, t], embed[:, t], seeds[t])
    assert_states_equal({k: v[:, t] for k, v in post.items()}, state)
    assert_states_equal({k: v[:, t] for k, v in prior.items()}, expected)


@pytest.mark.parametrize('begin', ['initial', 'given'])
def test_imagine_is_img_step_in_a_loop(begin):
  rssm = make_rssm()
  action = normal(3, 4, ACTIONS)
  seeds = tools.make_seeds(4, tf.random.Generator.from_seed(0))
  given = None if begin == 'initial' else make_state(3)
  prior = rssm.imagine(action, given, seeds)
  state = given or rssm.initial(3)
  for t in range(4):
    state = rssm.img_step(state, action[:, t], seeds[t])
    assert_states_equal({k: v[:, t] for k, v in prior.items()}, state)


def test_observe_draws_other_noise_at_each_time():
  rssm = make_rssm()
  for variable in rssm.trainable_variables:
    variable.assign(np.zeros(variable.shape))
  # Without weights mean and std are constant: the samples are pure noise.
  post, prior = rssm.observe(tf.zeros([2, 3, EMBED]), tf.zeros([2, 3, ACTIONS]))
  for state in (post, prior):
    assert len(np.unique(state['stoch'])) == 2 * 3 * STOCH
  assert len(np.unique(rssm.imagine(tf.zeros([2, 3, ACTIONS]))['stoch'])) == 18


def test_initial_and_feat():
  rssm = make_rssm()
  for key, value in rssm.initial(4).items():
    assert value.shape == (4, DETER if key == 'deter' else STOCH)
    assert np.all(value == 0)
  state = make_state(4)
  feat = rssm.get_feat(state)
  np.testing.assert_array_equal(feat[:, :STOCH], state['stoch'])
  np.testing.assert_array_equal(feat[:, STOCH:], state['deter'])


def test_kl_of_state_distributions():
  rng = np.random.default_rng(0)
  p, q = (
    dict(
      mean=rng.normal(size=(2, 3, STOCH)),
      std=rng.uniform(0.1, 2.0, size=(2, 3, STOCH)),
    )
    for _ in range(2)
  )
  # Closed form for one dimension, summed over the independent ones.
  expected = (
    np.log(q['std'] / p['std'])
    + (p['std'] ** 2 + (p['mean'] - q['mean']) ** 2) / (2 * q['std'] ** 2)
    - 0.5
  ).sum(-1)
  rssm = make_rssm()
  dists = [
    rssm.get_dist({k: tf.constant(v, tf.float32) for k, v in x.items()})
    for x in (p, q)
  ]
  actual = dists[0].kl_divergence(dists[1])
  assert actual.shape == (2, 3)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)
  log_prob = scipy.stats.norm(p['mean'], p['std']).logpdf(q['mean']).sum(-1)
  actual = dists[0].log_prob(q['mean'].astype(np.float32))
  np.testing.assert_allclose(actual, log_prob, rtol=1e-4)


# --- Gradients of unrolled loops ----------------------------------------------


def loop_gradients(rssm, gather, wanted='', kinds=2):
  """Of a loss on posterior and prior states, by weights `wanted`.

  Returns:
    The gradients, and the types of the operations of their graph.
  """
  steps, rng = 5, np.random.default_rng(0)
  embed, action = (
    tf.constant(rng.normal(size=[2, steps, n]), tf.float32)
    for n in (EMBED, ACTIONS)
  )
  seeds = tf.constant(rng.integers(2**31, size=[steps, 2]), tf.int32)
  weights = [v for v in rssm.trainable_variables if wanted in v.path]

  @tf.function(autograph=False)
  def gradients():
    with layers.Tapes(weights) if gather else tf.GradientTape() as tape:
      states = rssm.observe(embed, action, seed=seeds)[:kinds]
      loss = sum(tf.reduce_sum(x[k] ** 2) for x in states for k in x)
    if gather:
      return tape.gradient(loss, weights)
    return tape.gradient(loss, [v.value for v in weights])

  graph = gradients.get_concrete_function().graph
  return gradients(), [op.type for op in graph.get_operations()]


def assert_gradients_equal(ours, theirs):
  for one, two in zip(ours, theirs, strict=True):
    scale = np.abs(two).max()
    assert scale > 0
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize('wanted', ['', 'gru', 'obs1/bias'])
def test_gathered_gradients_are_those_of_a_loop(wanted):
  rssm = make_rssm()
  expected, _ = loop_gradients(rssm, False, wanted)
  rssm.unroll = True
  apart, many = loop_gradients(rssm, False, wanted)
  gathered, few = loop_gradients(rssm, True, wanted)
  assert_gradients_equal(apart, expected)
  assert_gradients_equal(gathered, expected)
  assert not any('While' in kind for kind in few)
  assert few.count('MatMul') < many.count('MatMul')


def test_layers_without_a_part_in_the_loss_have_no_gradient():
  """The prior's last layers, where the loss is on posteriors alone."""
  rssm = make_rssm()
  rssm.unroll = True
  assert loop_gradients(rssm, True, 'img3', kinds=1)[0] == [None, None]
  grads, _ = loop_gradients(rssm, True, 'obs2', kinds=1)
  assert_gradients_equal(grads, loop_gradients(rssm, False, 'obs2', 1)[0])


def test_each_loss_has_the_gradients_of_its_own_weights():
  """Both losses depend on both layers; the second on the first's output."""
  one, two = models.Dense(3), models.Dense(3)
  x = normal(4, 3)
  for layer in (one, two):
    layer(x)
    randomize(layer, 0.5)

  def losses():
    y = one(x)
    z = two(y)
    return tf.reduce_sum(y * z), tf.reduce_sum(tf.square(z) + one(z))

  groups = [layer.trainable_variables for layer in (one, two)]
  with tf.GradientTape(persistent=True) as tape:
    plain = losses()
  with layers.Tapes(*groups) as tapes:
    results = losses()
  for loss, expected, group in zip(results, plain, groups, strict=True):
    target = tape.gradient(expected, [v.value for v in group])
    assert_gradients_equal(tapes.gradient(loss, group), target)


def test_tapes_have_gradients_of_inputs_and_a_scale():
  layer, x = models.Dense(3), normal(4, 3)
  layer(x)
  weights = layer.trainable_variables
  with layers.Tapes(weights) as tapes:
    tapes.watch([x])
    with layers.Tapes():  # what is within another is not of this one
      tf.reduce_sum(layer(x))
    loss = tf.reduce_sum(tf.square(layer(x)))
  with tf.GradientTape() as tape:
    tape.watch(x)
    plain = 3 * tf.reduce_sum(tf.square(layer(x)))
  grads = tapes.gradient(loss, weights, tf.constant(3.0), [x])
  expected = tape.gradient(plain, [*(v.value for v in weights), x])
  assert_gradients_equal(grads, expected)


def test_an_unrolled_loop_reads_each_weight_once():
  rssm = make_rssm()
  rssm.unroll = True
  kinds = loop_gradients(rssm, True)[1]
  assert kinds.count('ReadVariableOp') == len(rssm.trainable_variables)


def test_uses_within_a_loop_of_tensorflow_are_not_gathered():
  rssm = make_rssm()
  expected, kinds = loop_gradients(rssm, False)
  assert any('While' in kind for kind in kinds)
  assert_gradients_equal(loop_gradients(rssm, True)[0], expected)


# --- Images -----------------------------------------------------------------


def relu(x):
  return np.maximum(x, 0)


def numpy_conv(x, kernel, bias, stride):
  """Output (y, x) sees the patch that begins at (y, x) * stride."""
  size = kernel.shape[0]
  out = (x.shape[1] - size) // stride + 1
  result = np.zeros((len(x), out, out, kernel.shape[-1]))
  for row in range(out):
    for column in range(out):
      top, left = row * stride, column * stride
      patch = x[:, top : top + size, left : left + size]
      result[:, row, column] = np.einsum('bijc,ijco->bo', patch, kernel)
  return result + bias


def numpy_conv_transpose(x, kernel, bias, stride):
  """Input (y, x) paints a patch that begins at (y, x) * stride."""
  size = kernel.shape[0]
  out = (x.shape[1] - 1) * stride + size
  result = np.zeros((len(x), out, out, kernel.shape[2]))
  for row in range(x.shape[1]):
    for column in range(x.shape[2]):
      top, left = row * stride, column * stride
      result[:, top : top + size, left : left + size] += np.einsum(
        'bc,ijoc->bijo', x[:, row, column], kernel
      )
  return result + bias


def test_encoder_against_numpy():
  encoder = models.ConvEncoder(depth=2)
  image = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 64, 64, 3))
  encoder({'image': tf.zeros([1, 64, 64, 3])})
  randomize(encoder, 0.3)
  weights = weights_of(encoder)
  x, sizes = image, []
  for name in ('h1', 'h2', 'h3', 'h4'):
    kernel, bias = weights[f'{name}/kernel'], weights[f'{name}/bias']
    x = relu(numpy_conv(x, kernel, bias, 2))
    sizes.append(x.shape[1])
  assert sizes == [31, 14, 6, 2]
  expected = x.reshape((2, -1))
  assert np.mean(expected > 0) > 0.1, 'all dead: the check would be empty'
  image = tf.constant(image, tf.float32)
  # One leading axis or two, the other keys unused.
  actual = encoder({'image': image, 'reward': tf.zeros([2])})
  assert actual.shape == (2, 32 * 2)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, atol=1e-5 * scale, rtol=1e-5)
  nested = encoder({'image': image[:, None]})
  assert nested.shape == (2, 1, 64)
  np.testing.assert_allclose(nested[:, 0], actual, rtol=1e-5, atol=1e-6)


def test_decoder_against_numpy():
  decoder = models.ConvDecoder(depth=2)
  feat = np.random.default_rng(1).normal(size=(2, 9))
  decoder(tf.zeros([1, 9]))
  randomize(decoder, 0.3)
  weights = weights_of(decoder)
  x, sizes = dense(weights, 'h1', feat)[:, None, None], []
  for name in ('h2', 'h3', 'h4', 'h5'):
    kernel, bias = weights[f'{name}/kernel'], weights[f'{name}/bias']
    x = numpy_conv_transpose(x, kernel, bias, 2)
    x = x if name == 'h5' else relu(x)
    sizes.append(x.shape[1])
  assert sizes == [5, 13, 30, 64]
  dist = decoder(tf.constant(feat, tf.float32))
  assert dist.batch_shape == [2] and dist.event_shape == [64, 64, 3]
  scale = np.abs(x).max()
  np.testing.assert_allclose(dist.mode(), x, atol=1e-5 * scale, rtol=1e-5)
  np.testing.assert_array_equal(dist.mean(), dist.mode())
  # log_prob is a sum over pixels and channels, with unit variance.
  target = np.random.default_rng(2).uniform(-0.5, 0.5, x.shape)
  expected = scipy.stats.norm(x, 1).logpdf(target).sum((1, 2, 3))
  actual = dist.log_prob(target.astype(np.float32))
  assert actual.shape == (2,)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)
  nested = decoder(tf.constant(feat[:, None], tf.float32))
  assert nested.batch_shape == [2, 1]
  np.testing.assert_allclose(nested.mean()[:, 0], dist.mean(), atol=1e-4)


def numpy_hidden(weights, x, layers):
  for index in range(layers):
    x = dense(weights, f'h{index + 1}', x, elu)
  return x


@pytest.mark.parametrize('layers', [0, 2])
def test_dense_encoder_against_numpy(layers):
  encoder = models.DenseEncoder(layers, 5)
  vector = np.random.default_rng(1).normal(size=(2, 3, 4))
  encoder(tf.zeros([1, 4]))
  randomize(encoder)
  expected = numpy_hidden(weights_of(encoder), vector, layers)
  actual = encoder(tf.constant(vector, tf.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# --- Heads ------------------------------------------------------------------


def make_head(layer, features=4, scale=0.5):
  layer(tf.zeros([1, features]))
  randomize(layer, scale)
  return layer, weights_of(layer)


def numpy_head(weights, x, layers):
  return dense(weights, 'out', numpy_hidden(weights, x, layers))


def test_state_model_against_numpy():
  """q(s | o) of Eq. 11: one hidden layer, and std as of the states."""
  model, weights = make_head(models.StateModel(3, 5), 7)
  embed = np.random.default_rng(1).normal(size=(2, 4, 7))
  expected = numpy_stats(numpy_head(weights, embed, 1))
  actual = model(tf.constant(embed, tf.float32))
  for value, target in zip(actual, expected, strict=True):
    np.testing.assert_allclose(value, target, rtol=1e-4, atol=1e-5)


def test_dense_decoder_normal():
  head, weights = make_head(models.DenseDecoder((), 2, 5))
  feat = np.random.default_rng(0).normal(size=(3, 2, 4))
  mean = numpy_head(weights, feat, 2)[..., 0]
  dist = head(tf.constant(feat, tf.float32))
  assert dist.batch_shape == [3, 2] and dist.event_shape == []
  np.testing.assert_allclose(dist.mode(), mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dist.mean(), mean, rtol=1e-4, atol=1e-5)
  target = np.random.default_rng(1).normal(size=(3, 2))
  # ln N(target; mean, 1)
  expected = -0.5 * (target - mean) ** 2 - 0.5 * np.log(2 * np.pi)
  actual = dist.log_prob(target.astype(np.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_dense_decoder_with_an_event_shape():
  head, weights = make_head(models.DenseDecoder((2, 3), 1, 5))
  feat = np.random.default_rng(0).normal(size=(3, 4))
  mean = numpy_head(weights, feat, 1).reshape((3, 2, 3))
  dist = head(tf.constant(feat, tf.float32))
  assert dist.batch_shape == [3] and dist.event_shape == [2, 3]
  np.testing.assert_allclose(dist.mean(), mean, rtol=1e-4, atol=1e-5)
  expected = scipy.stats.norm(mean, 1).logpdf(0).sum((1, 2))
  np.testing.assert_allclose(
    dist.log_prob(tf.zeros([3, 2, 3])), expected, rtol=1e-4
  )


def test_dense_decoder_binary_with_soft_labels():
  head, weights = make_head(models.DenseDecoder((), 3, 5, 'binary'))
  feat = np.random.default_rng(0).normal(size=(6, 4))
  prob = scipy.special.expit(numpy_head(weights, feat, 3)[..., 0])
  dist = head(tf.constant(feat, tf.float32))
  assert dist.batch_shape == [6] and dist.event_shape == []
  np.testing.assert_allclose(dist.mean(), prob, rtol=1e-4)
  np.testing.assert_array_equal(dist.mode(), prob > 0.5)
  # pcont's target is the discount, 0 or 0.99, not a bit: cross entropy.
  for label in (0.0, 0.99, 1.0):
    expected = label * np.log(prob) + (1 - label) * np.log(1 - prob)
    actual = dist.log_prob(tf.fill([6], label))
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
  # Finite where float32 rounds the probability to 1.
  head._out.kernel.assign(tf.zeros([5, 1]))
  head._out.bias.assign([200.0])
  sure = head(tf.constant(feat, tf.float32))
  np.testing.assert_allclose(sure.log_prob(tf.zeros([6])), [-200.0] * 6)


@pytest.mark.parametrize('scale', [0.5, 5.0])
@pytest.mark.parametrize(
  'min_std, init_std, mean_scale', [(1e-4, 5.0, 5.0), (0.3, 1.0, 2.0)]
)
def test_action_decoder_tanh_normal(scale, min_std, init_std, mean_scale):
  actor, weights = make_head(
    models.ActionDecoder(
      2,
      2,
      5,
      min_std=min_std,
      init_std=init_std,
      mean_scale=mean_scale,
    ),
    scale=scale,
  )
  feat = np.random.default_rng(0).normal(size=(6, 4))
  mean, std = np.split(numpy_head(weights, feat, 2), 2, -1)
  mean = mean_scale * np.tanh(mean / mean_scale)
  # The shift is softplus backwards: from 0, init_std comes out.
  std = softplus(std + np.log(np.exp(init_std) - 1)) + min_std
  dist = actor(tf.constant(feat, tf.float32))
  assert dist.batch_shape == [6] and dist.event_shape == [2]
  action = np.random.default_rng(1).uniform(-0.95, 0.95, (6, 2))
  density = scipy.stats.norm(mean, std).logpdf(np.arctanh(action))
  expected = (density - np.log(1 - action**2)).sum(-1)
  actual = dist.log_prob(action.astype(np.float32))
  assert actual.shape == (6,)
  np.testing.assert_allclose(actual, expected, rtol=5e-4, atol=5e-4)
  assert np.all(np.abs(mean) <= mean_scale) and np.all(std >= min_std)
  for result in (dist.sample(seed=1), dist.mode(), dist.mean()):
    assert result.shape == (6, 2)
    assert np.all(np.abs(result) <= 1)
  assert np.all(np.isfinite(dist.entropy()))


def test_action_decoder_begins_at_init_std():
  actor, _ = make_head(models.ActionDecoder(2, 1, 5, init_std=5.0), scale=0.0)
  sample = actor(tf.zeros([1, 4])).sample(20000, seed=1)
  inside = np.abs(sample) < np.tanh(2.5)
  # Normal of mean 0 and std 5: so much lies within half a deviation.
  expected = scipy.stats.norm.cdf(0.5) - scipy.stats.norm.cdf(-0.5)
  np.testing.assert_allclose(inside.mean(), expected, atol=0.015)


def test_action_decoder_gradient_reaches_through_the_sample():
  actor, _ = make_head(models.ActionDecoder(2, 2, 5, init_std=1.0))
  with tf.GradientTape() as tape:
    action = actor(normal(6, 4)).sample(seed=1)
    loss = tf.reduce_sum(action)
  variables = [v.value for v in actor.trainable_variables]
  for grad in tape.gradient(loss, variables):
    assert grad is not None and np.any(grad != 0)


def test_entropy_of_saturated_actions_is_exact():
  """Also where float32 rounds the action to 1, and in its gradient.

  With x = mu + sigma * eps of Eq. 3 the entropy is the mean of
  -ln N(x) + ln(1 - tanh(x)^2); by mu its slope is the mean of -2 tanh(x), by
  sigma that of 1 / sigma - 2 tanh(x) * eps.
  """
  actor = models.ActionDecoder(1, 0, 1, min_std=0.0)
  shift = np.log(np.expm1(5.0))
  outputs = [[5 * np.arctanh(0.9), np.log(np.expm1(4.0)) - shift]]
  outputs = tf.Variable(np.float32(outputs))
  with tf.GradientTape() as tape:
    rows = tf.repeat(outputs, 5000, 0)
    action, drawn = actor.draw(rows, tf.constant([1, 2]))
    entropy = -tf.reduce_mean(actor.log_prob(rows, drawn))
  x = drawn.numpy().astype(np.float64)
  assert 0.1 < (action.numpy() == 1).mean() < 0.3
  np.testing.assert_allclose(action, np.tanh(x), rtol=1e-5)
  np.testing.assert_array_equal(
    action, actor.dist(rows).sample(seed=tf.constant([1, 2]))
  )
  density = scipy.stats.norm(4.5, 4.0).logpdf(x)
  slope = 2 * (np.log(2) - x - np.log1p(np.exp(-2 * x)))
  np.testing.assert_allclose(entropy, (slope - density).mean(), rtol=1e-4)
  eps = (x - 4.5) / 4.0
  by_mean, by_std = -2 * np.tanh(x), 0.25 - 2 * np.tanh(x) * eps
  # The outputs' slopes: of 5 tanh(y / 5), and of softplus.
  expected = by_mean.mean() * (1 - 0.9**2), by_std.mean() * (1 - np.exp(-4.0))
  grad = tape.gradient(entropy, outputs)
  np.testing.assert_allclose(grad, [expected], rtol=1e-3)


def test_action_decoder_samples_differ_across_the_batch():
  actor, _ = make_head(models.ActionDecoder(2, 1, 5, init_std=1.0))
  dist = actor(tf.repeat(normal(1, 4), 50, 0))
  assert len(np.unique(dist.sample(), axis=0)) == 50
  assert len(np.unique(dist.mode(), axis=0)) > 40


def test_action_decoder_onehot():
  actor, weights = make_head(models.ActionDecoder(3, 2, 5, 'onehot'))
  feat = np.random.default_rng(0).normal(size=(6, 4))
  logits = numpy_head(weights, feat, 2)
  dist = actor(tf.constant(feat, tf.float32))
  log_probs = scipy.special.log_softmax(logits, -1)
  for index in range(3):
    one_hot = np.eye(3, dtype=np.float32)[[index] * 6]
    np.testing.assert_allclose(
      dist.log_prob(one_hot), log_probs[:, index], rtol=1e-4, atol=1e-5
    )
  mode = np.eye(3)[logits.argmax(-1)]
  np.testing.assert_allclose(dist.mode(), mode, atol=1e-6)
  sample = dist.sample().numpy()
  np.testing.assert_allclose(sample.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(sample.max(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
  'layer, shape',
  [
    (models.Dense(7, 'elu'), (5, 3)),
    (models.Conv(6, 4, 2, activation='relu'), (3, 14, 14, 5)),
    (models.Conv(12, 4, 2, activation='relu'), (3, 14, 14, 5)),
    (models.Conv(12, 4, 2, activation='relu'), (3, 14, 14, 40)),
    (models.Conv(6, 4, 2, activation='relu'), (3, 6, 6, 5)),
    (models.Deconv(6, 5, 2, activation='relu'), (3, 1, 1, 5)),
    (models.Deconv(6, 5, 2), (3, 5, 5, 4)),
    (models.Deconv(3, 6, 2), (2, 30, 30, 4)),
    (models.Deconv(16, 6, 2), (2, 13, 13, 4)),
    (models.Deconv(6, 6, 2, activation='relu'), (3, 13, 12, 4)),
    (models.Deconv(6, 4, 2, activation='elu'), (3, 7, 7, 4)),
    (models.GRUCell(6), (5, 3)),
  ],
)
def test_layers_and_their_gradients_are_those_of_keras(layer, shape):
  """The faster formulations against the layers that they derive from."""
  rng = np.random.default_rng(0)
  args = [tf.constant(rng.normal(size=shape), tf.float32)]
  if isinstance(layer, models.GRUCell):
    args.append(tf.constant(rng.normal(size=(shape[0], 6)), tf.float32))
  layer(*args)  # creates the variables
  for variable in layer.variables:
    variable.assign(rng.normal(size=variable.shape))
  base = type(layer).__bases__[0].call

  def keras_call(*args):
    if isinstance(layer, models.GRUCell):
      return base(layer, args[0], [args[1]])[0]
    return base(layer, *args)

  results = []
  for call in (keras_call, layer):
    with tf.GradientTape() as tape:
      tape.watch(args)
      y = call(*args)
      loss = tf.reduce_sum(y * tf.cos(tf.cast(tf.range(y.shape[-1]), y.dtype)))
    inputs = [*args, *(v.value for v in layer.trainable_variables)]
    results.append([y, *tape.gradient(loss, inputs)])
  for expected, actual in zip(*results, strict=True):
    scale = float(tf.reduce_max(tf.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5 * scale)


def test_unknown_distributions_are_refused():
  with pytest.raises(ValueError, match='poisson'):
    models.DenseDecoder((), 1, 5, 'poisson')
  with pytest.raises(ValueError, match='normal_tanh'):
    models.ActionDecoder(2, 1, 5, 'normal_tanh')


# --- Precision --------------------------------------------------------------


def compute_dtype(policy):
  return tf.as_dtype(policy.compute_dtype)


# Half precision against the same weights in float32.
TOLERANCE = {'float32': 1e-5, 'float16': 0.01, 'bfloat16': 0.08}


@every_policy
def test_rssm_precision(policy):
  rssm = make_rssm()
  assert {v.dtype for v in rssm.trainable_variables} == {'float32'}
  dtype = compute_dtype(policy)
  embed = tf.cast(normal(2, 3, EMBED), dtype)
  action = tf.cast(normal(2, 3, ACTIONS), dtype)
  post, prior = rssm.observe(embed, action)
  imagined = rssm.imagine(action, {k: v[:, -1] for k, v in post.items()})
  for state in (post, prior, imagined):
    for key, value in state.items():
      assert value.dtype == tf.float32, key
      assert value.shape == (2, 3, DETER if key == 'deter' else STOCH), key
      assert np.all(np.isfinite(value)), key
  feat = rssm.get_feat(post)
  assert feat.dtype == tf.float32 and feat.shape == (2, 3, STOCH + DETER)
  kl = rssm.get_dist(post).kl_divergence(rssm.get_dist(prior))
  assert kl.dtype == tf.float32 and kl.shape == (2, 3)
  assert np.all(kl >= 0)
  state, action = make_state(2), normal(2, ACTIONS)
  expected = numpy_img_step(weights_of(rssm), state, action)
  tolerance = TOLERANCE[policy.compute_dtype]
  assert_stats(rssm.img_step(state, action), expected, tolerance)


@every_policy
def test_rssm_in_a_compiled_function(policy):
  rssm = make_rssm()

  @tf.function(
    input_signature=[
      tf.TensorSpec([None, None, EMBED]),
      tf.TensorSpec([None, None, ACTIONS]),
    ]
  )
  def gradients(embed, action):
    with tf.GradientTape() as tape:
      post, prior = rssm.observe(embed, action)
      dists = rssm.get_dist(post), rssm.get_dist(prior)
      loss = tf.reduce_mean(dists[0].kl_divergence(dists[1]))
    return tape.gradient(loss, [v.value for v in rssm.trainable_variables])

  for steps in (2, 3):
    grads = gradients(normal(2, steps, EMBED), normal(2, steps, ACTIONS))
    for grad in grads:
      assert grad.dtype == tf.float32
      assert np.all(np.isfinite(grad)) and np.any(grad != 0)


@every_policy
def test_encoder_and_decoder_precision(policy):
  dtype = compute_dtype(policy)
  encoder, decoder = models.ConvEncoder(2), models.ConvDecoder(2)
  image = tf.random.stateless_uniform([2, 3, 64, 64, 3], [1, 2], -0.5, 0.5)
  embed = encoder({'image': tf.cast(image, dtype)})
  assert embed.shape == (2, 3, 64) and embed.dtype == dtype
  dist = decoder(normal(2, 3, 9))
  assert dist.batch_shape == [2, 3] and dist.event_shape == [64, 64, 3]
  assert dist.mean().dtype == tf.float32
  log_prob = dist.log_prob(image)
  assert log_prob.dtype == tf.float32 and log_prob.shape == (2, 3)
  # 12288 terms of about -1 each: more than float16 could add up.
  expected = scipy.stats.norm(dist.mean(), 1).logpdf(image).sum((2, 3, 4))
  np.testing.assert_allclose(log_prob, expected, rtol=1e-4)


def test_decoder_computes_the_same_for_few_features_and_many():
  """Many go through the product of the first two matrices."""
  decoder = models.ConvDecoder(depth=4)
  decoder(tf.zeros([20, 6]))  # there are no matrices before
  randomize(decoder, 0.3)
  feat, grads = normal(20, 6), []
  for group in (1, 20):
    with tf.GradientTape() as tape:
      tape.watch(feat)
      parts = tf.split(feat, 20 // group)
      means = tf.concat([decoder(x).mean() for x in parts], 0)
      loss = tf.reduce_mean(tf.square(means))
    variables = [v.value for v in decoder.trainable_variables]
    grads.append(tape.gradient(loss, [feat, *variables]))
    names = {op.name for op in ops_of(lambda x: decoder(x).mean(), parts[0])}
    assert any('einsum' in name for name in names) == (group == 1)
  for one, many in zip(*grads, strict=True):
    np.testing.assert_allclose(many, one, atol=1e-5 * np.abs(one).max())


def ops_of(function, *args):
  """The operations of its graph."""
  return (
    tf.function(function).get_concrete_function(*args).graph.get_operations()
  )


@pytest.mark.parametrize('size', [128, 20])
@pytest.mark.parametrize('name', ['mixed_float16', 'mixed_bfloat16'])
def test_gradients_in_reduced_precision(name, size):
  """All of them, biases of many pixels and rows too, beside float32."""
  rng = np.random.default_rng(0)
  image = rng.uniform(-0.5, 0.5, (64, 64, 64, 3)).astype(np.float32)
  grads = []
  for policy in ('float32', name):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    networks = [models.ConvEncoder(4), models.ConvDecoder(4)]
    networks.append(models.DenseDecoder((), 2, 32))
    networks[1](tf.zeros([1, size]))  # built: now many may go the short way
    with tf.GradientTape() as tape:
      embed = networks[0]({'image': image})
      like = networks[1](embed[:, :size]).log_prob(image + 0.3)
      rows = tf.tile(tf.cast(embed, tf.float32), [200, 1])
      value = networks[2](rows).log_prob(tf.ones([12800]))
      loss = -tf.reduce_mean(like) - tf.reduce_mean(value)
    variables = [v.value for x in networks for v in x.trainable_variables]
    grads.append(tape.gradient(loss, variables))
  assert len(grads[0]) == 8 + 10 + 6
  for variable, exact, grad in zip(variables, *grads, strict=True):
    exact, grad = exact.numpy().ravel(), grad.numpy().ravel()
    error = np.linalg.norm(grad - exact) / np.linalg.norm(exact)
    assert error < 0.1, (variable.name, error)


@every_policy
@pytest.mark.parametrize(
  'make, event',
  [
    (lambda: models.DenseDecoder((), 2, 5), []),
    (lambda: models.DenseDecoder((), 2, 5, 'binary'), []),
    (lambda: models.ActionDecoder(2, 2, 5), [2]),
    (lambda: models.ActionDecoder(3, 2, 5, 'onehot'), [3]),
  ],
  ids=['normal', 'binary', 'tanh_normal', 'onehot'],
)
def test_heads_precision(policy, make, event):
  head, _ = make_head(make())
  assert {v.dtype for v in head.trainable_variables} == {'float32'}
  dist = head(normal(2, 3, 4))
  assert dist.batch_shape == [2, 3] and dist.event_shape == event
  for result in (dist.sample(), dist.mode(), dist.mean()):
    assert result.dtype == tf.float32 and result.shape == (2, 3, *event)
  for result in (dist.log_prob(dist.mode()), dist.entropy()):
    assert result.dtype == tf.float32 and result.shape == (2, 3)
    assert np.all(np.isfinite(result))
  with tf.GradientTape() as tape:
    dist = head(normal(2, 3, 4))
    loss = tf.reduce_sum(dist.log_prob(tf.stop_gradient(dist.sample())))
  for grad in tape.gradient(loss, [v.value for v in head.trainable_variables]):
    assert grad.dtype == tf.float32 and np.all(np.isfinite(grad))


@every_policy
def test_last_layers_are_exact(policy):
  """45.1, as a bias, is 45 in bfloat16 and 45.09 in float16."""
  value, state = models.DenseDecoder((), 1, 5), models.StateModel(4, 5)
  actor = models.ActionDecoder(4, 1, 5, mean_scale=1e6)
  onehot = models.ActionDecoder(4, 1, 5, 'onehot')
  rssm = models.RSSM(4, 5, 5)

  def outputs():
    post, prior = rssm.obs_step(rssm.initial(1), tf.ones([1, 2]), feat)
    gaussian = actor(feat)._dist.distribution.distribution
    yield value(feat).mean()
    yield from state(feat)[:1]
    yield gaussian.mean()
    yield onehot(feat).logits
    yield from (post['mean'], prior['mean'])

  feat = tf.ones([1, 3])
  list(outputs())
  last = [x._out for x in (value, state, actor, onehot)]
  for layer in (*last, rssm._img3, rssm._obs2):
    layer.kernel.assign(tf.zeros_like(layer.kernel))
    layer.bias.assign(tf.fill(layer.bias.shape, 45.1))
  for output in outputs():
    np.testing.assert_allclose(output, 45.1, rtol=1e-6)


def test_state_model_smallest_std():
  """As of the states; narrower ones would tell images too well apart."""
  model = models.StateModel(3, 5)
  model(tf.zeros([1, 7]))
  for variable in model.weights:
    variable.assign(tf.zeros_like(variable))
  model._out.bias.assign([0.5, 0.5, 0.5, -50, -50, -50])
  mean, std = model(tf.ones([2, 7]))
  np.testing.assert_allclose(mean, np.full((2, 3), 0.5))
  np.testing.assert_allclose(std, np.full((2, 3), 0.1), rtol=1e-6)


# --- Sizes ------------------------------------------------------------------


def test_parameter_counts():
  # The release's, for dmc_walker_walk: features of 230, 6 actions.
  encoder, decoder = models.ConvEncoder(), models.ConvDecoder()
  rssm = models.RSSM(30, 200, 200)
  reward = models.DenseDecoder((), 2, 400)
  value = models.DenseDecoder((), 3, 400)
  actor = models.ActionDecoder(6, 4, 400)
  embed = encoder({'image': tf.zeros([1, 64, 64, 3])})
  assert embed.shape == (1, 1024)
  rssm.obs_step(rssm.initial(1), tf.zeros([1, 6]), embed)
  feat = tf.zeros([1, 230])
  assert decoder(feat).event_shape == [64, 64, 3]
  for head in (reward, value, actor):
    head(feat)
  assert count(encoder) == 690_144
  assert count(decoder) == 3_795_555
  assert count(rssm) == 557_920
  assert count(reward) == 253_201
  assert count(value) == 413_601
  assert count(actor) == 578_412
  model = (encoder, decoder, rssm, reward)
  assert sum(map(count, model)) == 5_296_820
