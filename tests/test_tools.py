"""Returns, scans, distributions, optimizer, schedules, simulation."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import layers
import tools

# --- Scans and returns ------------------------------------------------------


def n_step_estimate(reward, value, pcont, tau, k):
  """V_N^k of Eq. 5 from state tau; `value` has one entry more, the last."""
  stop = min(tau + k, len(reward))
  total, discount = 0.0, 1.0
  for n in range(tau, stop):
    total += discount * reward[n]
    discount *= pcont[n]
  return total + discount * value[stop]


def lambda_estimate(reward, value, pcont, tau, lambda_):
  """V_lambda of Eq. 6 from state tau, term by term."""
  steps = len(reward) - tau
  total = sum(
    (1 - lambda_)
    * lambda_ ** (k - 1)
    * n_step_estimate(reward, value, pcont, tau, k)
    for k in range(1, steps)
  )
  longest = n_step_estimate(reward, value, pcont, tau, steps)
  return total + lambda_ ** (steps - 1) * longest


def random_trajectories(steps, batch=3, seed=0):
  rng = np.random.default_rng(seed)
  reward = rng.normal(size=(steps, batch))
  value = rng.normal(size=(steps + 1, batch))
  pcont = rng.uniform(0.2, 1.0, size=(steps, batch))
  return reward, value, pcont


def returns_of(reward, value, pcont, lambda_):
  reward, value, pcont = map(tf.constant, (reward, value, pcont))
  return tools.lambda_return(reward, value[:-1], pcont, value[-1], lambda_, 0)


@pytest.mark.parametrize('steps', [1, 2, 15])
@pytest.mark.parametrize('lambda_', [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_is_eq_6(steps, lambda_):
  reward, value, pcont = random_trajectories(steps)
  expected = [
    [
      lambda_estimate(reward[:, b], value[:, b], pcont[:, b], tau, lambda_)
      for b in range(3)
    ]
    for tau in range(steps)
  ]
  actual = returns_of(reward, value, pcont, lambda_)
  assert actual.dtype == tf.float64
  np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_lambda_return_by_hand():
  # V(2) = 3 + 0.5 * 40 = 23
  # V(1) = 2 + 0.5 * (0.5 * 30 + 0.5 * 23) = 15.25
  # V(0) = 1 + 1.0 * (0.5 * 20 + 0.5 * 15.25) = 18.625
  # value[0] = 10 is the estimate of the first state itself: in no return.
  actual = tools.lambda_return(
    tf.constant([1.0, 2.0, 3.0]),
    tf.constant([10.0, 20.0, 30.0]),
    tf.constant([1.0, 0.5, 0.5]),
    tf.constant(40.0),
    lambda_=0.5,
    axis=0,
  )
  np.testing.assert_allclose(actual, [18.625, 15.25, 23.0], rtol=1e-6)


def test_lambda_zero_is_one_step():
  reward, value, pcont = random_trajectories(6)
  actual = returns_of(reward, value, pcont, 0.0)
  np.testing.assert_allclose(actual, reward + pcont * value[1:], rtol=1e-12)


def test_lambda_one_is_the_longest_estimate():
  reward, value, pcont = random_trajectories(6)
  expected = [
    n_step_estimate(reward[:, 0], value[:, 0], pcont[:, 0], tau, 99)
    for tau in range(6)
  ]
  actual = returns_of(reward, value, pcont, 1.0)
  np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize('one', [1, 1.0, np.float64(1), tf.ones([], 'float64')])
def test_lambda_return_contains_sum_of_rewards(one):
  # V_R, Eq. 4.
  reward, value, _ = random_trajectories(7)
  actual = tools.lambda_return(
    tf.constant(reward), tf.constant(value[:-1]), one, None, 1.0, 0
  )
  expected = [reward[tau:].sum(0) for tau in range(7)]
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_lambda_return_axis_one():
  reward, value, pcont = random_trajectories(5)
  expected = returns_of(reward, value, pcont, 0.9)
  actual = tools.lambda_return(
    tf.constant(reward.T),
    tf.constant(value[:-1].T),
    tf.constant(pcont.T),
    tf.constant(value[-1]),
    0.9,
    axis=1,
  )
  np.testing.assert_allclose(actual, tf.transpose(expected), rtol=1e-12)


@pytest.mark.parametrize('axis', [0, 1, 2, -1])
def test_lambda_return_along_any_axis(axis):
  reward, value, pcont = random_trajectories(5, 6)
  expected = np.reshape(returns_of(reward, value, pcont, 0.9), (5, 2, 3))

  def moved(x):
    return tf.constant(np.moveaxis(np.reshape(x, (-1, 2, 3)), 0, axis))

  actual = tools.lambda_return(
    *map(moved, (reward, value[:-1], pcont)),
    tf.constant(value[-1].reshape(2, 3)),
    0.9,
    axis,
  )
  np.testing.assert_allclose(actual, np.moveaxis(expected, 0, axis), rtol=1e-12)


def test_lambda_return_without_bootstrap_is_zero_bootstrap():
  reward, value, pcont = random_trajectories(5)
  value[-1] = 0.0
  expected = returns_of(reward, value, pcont, 0.9)
  actual = tools.lambda_return(
    tf.constant(reward),
    tf.constant(value[:-1]),
    tf.constant(pcont),
    None,
    0.9,
    0,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_lambda_return_number_as_discount():
  reward, value, pcont = random_trajectories(5)
  expected = returns_of(reward, value, np.full_like(pcont, 0.99), 0.95)
  actual = tools.lambda_return(
    tf.constant(reward),
    tf.constant(value[:-1]),
    0.99,
    tf.constant(value[-1]),
    0.95,
    0,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_lambda_return_gradients():
  arrays = random_trajectories(4, batch=2)
  weights = np.random.default_rng(1).normal(size=(4, 2))

  def scalar(*arrays):
    return np.sum(weights * returns_of(*arrays, 0.8).numpy())

  tensors = [tf.constant(x) for x in arrays]
  with tf.GradientTape() as tape:
    tape.watch(tensors)
    reward, value, pcont = tensors
    returns = tools.lambda_return(
      reward, value[:-1], pcont, value[-1], 0.8, axis=0
    )
    loss = tf.reduce_sum(weights * returns)
  grads = tape.gradient(loss, tensors)
  for position, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
    for index in np.ndindex(array.shape):
      sides = []
      for delta in (1e-5, -1e-5):
        moved = [x.copy() for x in arrays]
        moved[position][index] += delta
        sides.append(scalar(*moved))
      slope = (sides[0] - sides[1]) / 2e-5
      np.testing.assert_allclose(
        grad[index], slope, rtol=1e-6, atol=1e-8, err_msg=f'{position} {index}'
      )


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('reverse', [False, True])
def test_static_scan_is_a_loop(reverse, unroll):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(5, 2, 3))
  start = rng.normal(size=(2, 3))
  carry, expected = start, [None] * 5
  for t in reversed(range(5)) if reverse else range(5):
    carry = 0.5 * carry + inputs[t] ** 2
    expected[t] = carry
  actual = tools.static_scan(
    lambda c, x: 0.5 * c + x**2,
    tf.constant(inputs),
    tf.constant(start),
    reverse=reverse,
    unroll=unroll,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize('unroll', [False, True])
def test_static_scan_nested(unroll):
  inputs = ({'a': tf.range(1.0, 4.0)}, tf.constant([10.0, 20.0, 30.0]))
  start = {'sum': tf.constant(0.0), 'pair': (tf.constant(1.0),)}

  def fn(carry, x):
    total = carry['sum'] + x[0]['a'] * x[1]
    return {'sum': total, 'pair': (carry['pair'][0] * x[0]['a'],)}

  actual = tools.static_scan(fn, inputs, start, unroll=unroll)
  np.testing.assert_allclose(actual['sum'], [10.0, 50.0, 140.0])
  np.testing.assert_allclose(actual['pair'][0], [1.0, 2.0, 6.0])


# --- Distributions ----------------------------------------------------------


def tanh_normal(mean, std):
  return tfd.TransformedDistribution(
    tfd.Normal(mean, std), tools.TanhBijector()
  )


def test_tanh_bijector():
  x = np.linspace(-4.0, 4.0, 41)
  bijector = tools.TanhBijector()
  tensor = tf.constant(x)
  y = bijector.forward(tensor)
  np.testing.assert_allclose(y, np.tanh(x), rtol=1e-12)
  # Copies, for the bijector remembers what it mapped.
  back = bijector.inverse(tf.constant(np.tanh(x)))
  np.testing.assert_allclose(back, x, rtol=1e-10, atol=1e-12)
  log_det = bijector.forward_log_det_jacobian(tensor, 0)
  np.testing.assert_allclose(log_det, np.log1p(-(np.tanh(x) ** 2)), atol=1e-7)


@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-7), ('float32', 2e-5)])
def test_tanh_normal_log_prob(dtype, rtol):
  rng = np.random.default_rng(0)
  mean, std = rng.normal(size=20), rng.uniform(0.2, 2.0, 20)
  action = rng.uniform(-0.99, 0.99, 20)
  dist = tanh_normal(tf.constant(mean, dtype), tf.constant(std, dtype))
  # The density of tanh(X): that of X, divided by the slope of tanh.
  density = scipy.stats.norm(mean, std).logpdf(np.arctanh(action))
  expected = density - np.log(1 - action**2)
  actual = dist.log_prob(tf.constant(action, dtype))
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol)


def test_tanh_normal_density_integrates_to_one():
  dist = tanh_normal(tf.constant(0.3, tf.float64), tf.constant(0.7, tf.float64))
  grid = np.linspace(-1, 1, 20001)[1:-1]
  total = np.trapezoid(np.exp(dist.log_prob(tf.constant(grid))), grid)
  np.testing.assert_allclose(total, 1.0, atol=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_saturated_actions_are_finite(dtype):
  mean = tf.constant([[0.0, 5.0], [-5.0, 0.1]])
  std = tf.fill([2, 2], 5.0)
  edge = tf.constant([[1.0, -1.0], [-1.0, 1.0]])
  with tf.GradientTape() as tape:
    tape.watch([mean, std])
    dist = tools.SampleDist(tfd.Independent(tanh_normal(mean, std), 1))
    sample = dist.sample(200, seed=1)
    # An action that was stored or computed with in fewer bits is another
    # tensor to the bijector: it has to invert it.
    rounded = tf.cast(tf.cast(tf.stop_gradient(sample), dtype), tf.float32)
    quantities = [
      dist.log_prob(sample),
      dist.log_prob(rounded),
      dist.log_prob(edge),
      dist.entropy(seed=1),
    ]
    loss = sum(tf.reduce_mean(x) for x in quantities)
  assert np.any(np.abs(rounded) == 1), 'nothing was saturated'
  for quantity in quantities:
    assert quantity.dtype == tf.float32
    assert np.all(np.isfinite(quantity))
  for grad in tape.gradient(loss, [mean, std]):
    assert np.all(np.isfinite(grad))
    assert np.any(grad != 0)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_saturated_actions_in_a_distribution_of_that_dtype(dtype):
  mean, std = tf.zeros([2], dtype), tf.fill([2], tf.cast(5.0, dtype))
  with tf.GradientTape() as tape:
    tape.watch([mean, std])
    dist = tanh_normal(mean, std)
    log_prob = dist.log_prob(tf.constant([1.0, -1.0], dtype))
  assert np.all(np.isfinite(tf.cast(log_prob, tf.float64)))
  for grad in tape.gradient(log_prob, [mean, std]):
    assert np.all(np.isfinite(tf.cast(grad, tf.float64)))


class FixedSamples:
  """A distribution whose samples are given, to see what is made of them."""

  def __init__(self, samples, target):
    self._samples = samples
    self._target = target

  def sample(self, count, seed=None):
    return self._samples[:count]

  def log_prob(self, x):
    return -tf.reduce_sum((x - self._target) ** 2, -1)


@pytest.mark.parametrize('batch', [(), (5,), (2, 3)])
def test_mode_is_the_best_sample_of_each_row(batch):
  rng = np.random.default_rng(0)
  samples = rng.normal(size=(100, *batch, 2)).astype(np.float32)
  target = rng.normal(size=(*batch, 2)).astype(np.float32)
  dist = tools.SampleDist(FixedSamples(tf.constant(samples), target))
  actual = dist.mode().numpy()
  assert actual.shape == (*batch, 2)
  winners = set()
  for index in np.ndindex(batch):
    own = samples[(slice(None), *index)]
    winner = np.argmin(((own - target[index]) ** 2).sum(-1))
    winners.add(winner)
    np.testing.assert_array_equal(actual[index], own[winner])
  assert len(winners) == max(1, np.prod(batch)), 'rows shared a winner'


def test_mode_of_a_row_does_not_depend_on_the_others():
  rng = np.random.default_rng(0)
  samples = rng.normal(size=(100, 2, 3)).astype(np.float32)
  other = samples.copy()
  other[:, 1] = rng.normal(size=(100, 3)) * 3
  modes = [
    tools.SampleDist(FixedSamples(tf.constant(s), 0.0)).mode().numpy()
    for s in (samples, other)
  ]
  np.testing.assert_array_equal(modes[0][0], modes[1][0])
  assert np.any(modes[0][1] != modes[1][1])


def test_sample_dist_estimates():
  mean = tf.constant([[-1.0], [0.5]])
  base = tfd.Independent(tanh_normal(mean, tf.fill([2, 1], 0.3)), 1)
  dist = tools.SampleDist(base, samples=4000)
  # Slow and obvious: integrals over the Gaussian on a grid.
  x = np.linspace(-4, 4, 8001)[:, None, None]
  pdf = scipy.stats.norm(mean.numpy(), 0.3)
  expected = np.trapezoid(np.tanh(x) * pdf.pdf(x), x[:, 0, 0], axis=0)
  np.testing.assert_allclose(dist.mean(seed=1), expected, atol=0.03)
  log_prob = pdf.logpdf(x) - np.log(1 - np.tanh(x) ** 2)
  entropy = -np.trapezoid(log_prob * pdf.pdf(x), x[:, 0, 0], axis=0)[:, 0]
  np.testing.assert_allclose(dist.entropy(seed=1), entropy, atol=0.06)
  assert dist.batch_shape == [2] and dist.event_shape == [1]
  # With many samples the mode is near the peak of the density.
  peak = np.tanh(x)[np.argmax(log_prob, 0)[:, 0], 0, 0]
  np.testing.assert_allclose(dist.mode(seed=1)[:, 0], peak, atol=0.05)


@pytest.mark.parametrize('dims', [0, 1, 3])
def test_unit_normal_is_a_gaussian_of_unit_variance(dims):
  rng = np.random.default_rng(0)
  shape = (2, 3, 4, 5, 6)[: 2 + dims]
  mean, value = (tf.constant(rng.normal(size=shape)) for _ in range(2))
  results = []
  for dist in (tools.UnitNormal, lambda m, n: tfd.Independent(stock(m), n)):
    with tf.GradientTape() as tape:
      tape.watch((mean, value))
      like = dist(mean, dims).log_prob(value)
      loss = tf.reduce_sum(like * tf.cast(tf.range(1, 4), like.dtype))
    results.append([like, *tape.gradient(loss, (mean, value))])
    copied = dist(mean, dims).copy().log_prob(value)
    np.testing.assert_array_equal(copied, like)
    assert like.shape == [2, 3]
    np.testing.assert_array_equal(dist(mean, dims).mean(), mean)
  for one, other in zip(*results, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12)


def stock(mean):
  return tfd.Normal(mean, np.float64(1))


LOGITS = np.array([[0.5, -1.0, 2.0], [3.0, 0.1, -0.4]])


def test_one_hot_log_prob_and_entropy():
  dist = tools.OneHotDist(logits=tf.constant(LOGITS, tf.float32))
  probs = scipy.special.softmax(LOGITS, -1)
  for index in range(3):
    one_hot = np.eye(3)[[index, index]]
    expected = [
      scipy.stats.multinomial(1, p / p.sum()).logpmf(o)
      for p, o in zip(probs, one_hot, strict=True)
    ]
    actual = dist.log_prob(tf.constant(one_hot, tf.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
  entropy = scipy.stats.entropy(probs, axis=-1)
  np.testing.assert_allclose(dist.entropy(), entropy, rtol=1e-5)


def test_one_hot_samples_and_mode():
  dist = tools.OneHotDist(logits=tf.constant(LOGITS, tf.float32))
  sample = dist.sample(4000, seed=3).numpy()
  assert sample.shape == (4000, 2, 3) and sample.dtype == np.float32
  np.testing.assert_allclose(np.sort(sample, -1)[..., :2], 0, atol=1e-6)
  np.testing.assert_allclose(sample.sum(-1), 1, atol=1e-6)
  probs = scipy.special.softmax(LOGITS, -1)
  np.testing.assert_allclose(sample.mean(0), probs, atol=0.03)
  assert dist.sample().shape == (2, 3)
  mode = dist.mode()
  np.testing.assert_allclose(mode, np.eye(3)[[2, 0]], atol=1e-6)


@pytest.mark.parametrize('draw', ['sample', 'mode'])
def test_one_hot_straight_through_gradient(draw):
  # The gradient of sum(weight * probs), by the formula of the softmax.
  weight = np.array([[1.0, -2.0, 0.5], [0.3, 4.0, -1.0]])
  probs = scipy.special.softmax(LOGITS, -1)
  expected = probs * (weight - (probs * weight).sum(-1, keepdims=True))
  logits = tf.constant(LOGITS, tf.float32)
  with tf.GradientTape() as tape:
    tape.watch(logits)
    action = getattr(tools.OneHotDist(logits=logits), draw)()
    loss = tf.reduce_sum(weight.astype(np.float32) * action)
  grad = tape.gradient(loss, logits)
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


def test_one_hot_gradient_on_two_arms():
  # Expected reward p * 3 + (1 - p) * 1; its slope in the first logit is
  # 2 p (1 - p). On a linear reward straight-through is exact at each sample.
  reward = tf.constant([3.0, 1.0])
  logits = tf.constant([0.4, -0.3])
  with tf.GradientTape() as tape:
    tape.watch(logits)
    action = tools.OneHotDist(logits=logits).sample(500, seed=1)
    earned = tf.reduce_sum(action * reward, -1)
    mean = tf.reduce_mean(earned)
  p = scipy.special.expit(0.7)
  np.testing.assert_allclose(mean, 3 * p + 1 - p, atol=0.15)
  slope = 2 * p * (1 - p)
  grad = tape.gradient(mean, logits)
  np.testing.assert_allclose(grad, [slope, -slope], rtol=1e-4)


def test_make_seeds():
  one, two = (tf.random.Generator.from_seed(1) for _ in range(2))
  first = tools.make_seeds(4, one)
  assert first.shape == (4, 2) and first.dtype == tf.int32
  np.testing.assert_array_equal(first, tools.make_seeds(4, two))
  assert len(np.unique(np.concatenate([first, tools.make_seeds(4, one)]))) == 16
  assert np.any(tools.make_seeds(2) != tools.make_seeds(2))


CHOICES = [3, 2]


def factored():
  logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  parts = np.split(logits, [3], -1)
  probs = [scipy.special.softmax(x, -1) for x in parts]
  return tf.constant(logits), probs


def test_factored_one_hot_beside_all_pairs():
  """Probabilities of all six actions, their entropy, samples and the mode."""
  logits, (first, second) = factored()
  dist = tools.FactoredOneHotDist(logits, CHOICES)
  total, entropy = 0.0, 0.0
  for i in range(3):
    for j in range(2):
      action = np.concatenate([np.eye(3)[i], np.eye(2)[j]]).astype(np.float32)
      expected = first[:, i] * second[:, j]
      like = dist.log_prob(tf.constant(np.tile(action, (4, 1)))).numpy()
      np.testing.assert_allclose(np.exp(like), expected, rtol=1e-5)
      total, entropy = total + expected, entropy - expected * np.log(expected)
  np.testing.assert_allclose(total, 1, rtol=1e-5)
  np.testing.assert_allclose(dist.entropy(), entropy, rtol=1e-5)
  samples = dist.sample(20_000, seed=1).numpy()
  np.testing.assert_allclose(
    samples.mean(0), np.concatenate([first, second], -1), atol=0.02
  )
  # The choices are drawn independently.
  pairs = samples[..., :3, None] * samples[..., None, 3:]
  expected = first[..., None] * second[:, None]
  np.testing.assert_allclose(pairs.mean(0), expected, atol=0.02)
  mode = dist.mode().numpy()
  assert (mode[:, :3].argmax(-1) == first.argmax(-1)).all()
  assert (mode[:, 3:].argmax(-1) == second.argmax(-1)).all()


def probabilities(logits):
  parts = tf.split(logits, CHOICES, -1)
  return tf.concat([tf.nn.softmax(part) for part in parts], -1)


def test_factored_one_hot_draws_each_choice_by_itself():
  dist = tools.FactoredOneHotDist(tf.zeros([4000, 6]), (3, 3))
  first, second = np.split(dist.sample(seed=(1, 2)).numpy(), 2, -1)
  together = first.T @ second / 4000
  np.testing.assert_allclose(together, np.full((3, 3), 1 / 9), atol=0.02)


def test_factored_one_hot_is_straight_through():
  logits, _ = factored()
  weights = tf.random.stateless_normal([4, 5], [0, 1])
  grads = []
  for function in (
    lambda x: tools.FactoredOneHotDist(x, CHOICES).sample(seed=3),
    lambda x: tools.FactoredOneHotDist(x, CHOICES).mode(),
    probabilities,
  ):
    with tf.GradientTape() as tape:
      tape.watch(logits)
      value = tf.reduce_sum(weights * function(logits))
    grads.append(tape.gradient(value, logits).numpy())
  for grad in grads[:2]:
    np.testing.assert_allclose(grad, grads[2], rtol=1e-4, atol=1e-6)
  assert np.abs(grads[2]).max() > 0.1


# --- Schedules --------------------------------------------------------------


def test_every():
  every = tools.Every(10)
  # First call; then once for each ten steps since, however they came.
  assert every(3)
  assert not every(3)
  assert not every(12)
  assert every(13)
  assert not every(22)
  assert [every(55) for _ in range(5)] == [True] * 4 + [False]
  assert not every(62)
  assert [every.due(step) for step in (62, 63, 63)] == [False, True, True]
  assert every(63)
  assert not every.due(63)
  every.catch_up(72)
  assert every.due(73)
  every.catch_up(104)  # as after calls at 73, 83, 93 and 103
  assert [every.due(step) for step in (112, 113)] == [False, True]


def test_every_keeps_its_places_where_steps_are_made_again():
  every = tools.Every(10)
  every.catch_up(3)
  every.catch_up(195)  # 193 was the last
  every.repeat_from(185)
  assert [every.due(step) for step in (202, 203)] == [False, True]
  every.repeat_from(100)
  assert [every.due(step) for step in (102, 112, 113)] == [False, False, True]
  never = tools.Every(0)
  never.catch_up(7)
  never.repeat_from(3)
  assert not never.due(100)


def test_every_goes_back_and_never_forward():
  every = tools.Every(10)
  every.skip(120)
  assert [every.due(step) for step in (129, 130)] == [False, True]
  for before in (115, 124):
    every.go_back(before)
    assert [every.due(step) for step in (124, 125)] == [False, True]


def test_every_zero_is_only_the_first_call():
  every = tools.Every(0)
  assert every.due(0)
  every.catch_up(0)
  assert not any(every(step) for step in (0, 1, 1000))


def test_once():
  once = tools.Once()
  assert [once() for _ in range(3)] == [True, False, False]


# --- Optimizer --------------------------------------------------------------


class Weights(keras.layers.Layer):
  """Two variables, `kernel` and `bias`, with given values."""

  def __init__(self, kernel, bias):
    super().__init__(dtype='float32')
    for name, value in (('kernel', kernel), ('bias', bias)):
      setattr(self, name, self.add_weight(shape=np.shape(value), name=name))
      getattr(self, name).assign(np.asarray(value, np.float32))
    self.built = True

  def values(self):
    return [self.kernel.numpy(), self.bias.numpy()]


KERNEL, BIAS = [1.0, -2.0, 3.0], [0.5]
SLOPES = [np.array([0.3, -1.2, 4.0]), np.array([2.0])]


def linear_step(optimizer, weights, slopes=SLOPES):
  with layers.Tapes(optimizer.variables) as tapes:
    loss = sum(
      tf.reduce_sum(v.value * slope.astype(np.float32))
      for v, slope in zip((weights.kernel, weights.bias), slopes, strict=True)
    )
  metrics = optimizer.apply(optimizer.gradient(tapes, loss))
  return {k: float(v) for k, v in metrics.items()}


def adam_steps(values, slopes, count, lr, eps=1e-7, clip=None, decay=(0, 0)):
  """Kingma and Ba (2014), the order of section 2, in float64."""
  values = [np.asarray(v, np.float64) for v in values]
  norm = np.sqrt(sum((g**2).sum() for g in slopes))
  if clip and norm > clip:
    slopes = [g * clip / norm for g in slopes]
  m = [np.zeros_like(v) for v in values]
  s = [np.zeros_like(v) for v in values]
  for t in range(1, count + 1):
    rate = lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    for i, grad in enumerate(slopes):
      m[i] = 0.9 * m[i] + 0.1 * grad
      s[i] = 0.999 * s[i] + 0.001 * grad**2
      step = rate * m[i] / (np.sqrt(s[i]) + eps)
      values[i] = values[i] - lr * decay[i] * values[i] - step
  return values


def assert_values(weights, expected, rtol=2e-5):
  for actual, value in zip(weights.values(), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=rtol)


# A large epsilon, so that the size of a gradient shows in the step.
@pytest.mark.parametrize('eps', [1e-7, 0.5])
@pytest.mark.parametrize('count', [1, 3])
def test_adam_against_formula(count, eps):
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam('opt', [weights], 0.1, eps=eps)
  for _ in range(count):
    metrics = linear_step(optimizer, weights)
  assert_values(weights, adam_steps([KERNEL, BIAS], SLOPES, count, 0.1, eps))
  norm = np.sqrt(sum((g**2).sum() for g in SLOPES))
  assert metrics == {'opt_grad_norm': pytest.approx(norm, rel=1e-5)}


@pytest.mark.parametrize('scaling', [False, True])
@pytest.mark.parametrize('clip', [0.7, 100.0])
def test_adam_clips_by_global_norm(clip, scaling):
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam(
    'opt', [weights], 0.1, clip=clip, eps=0.1, loss_scaling=scaling
  )
  metrics = linear_step(optimizer, weights)
  expected = adam_steps([KERNEL, BIAS], SLOPES, 1, 0.1, 0.1, clip)
  assert_values(weights, expected)
  # The metric is the norm before clipping.
  norm = np.sqrt(sum((g**2).sum() for g in SLOPES))
  assert metrics['opt_grad_norm'] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
  'pattern, decay',
  [('kernel', (0.2, 0)), ('.*', (0.2, 0.2)), ('nothing', (0, 0))],
)
def test_adam_decoupled_weight_decay(pattern, decay):
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam('opt', [weights], 0.1, wd=0.2, wdpattern=pattern)
  for _ in range(2):
    linear_step(optimizer, weights)
  expected = adam_steps([KERNEL, BIAS], SLOPES, 2, 0.1, decay=decay)
  assert_values(weights, expected)


def test_loss_scaling_gives_the_same_update():
  results = []
  for scaling in (False, True):
    weights = Weights(KERNEL, BIAS)
    optimizer = tools.Adam('opt', [weights], 0.1, eps=1, loss_scaling=scaling)
    metrics = linear_step(optimizer, weights)
    results.append(weights.values())
  for plain, scaled in zip(*results, strict=True):
    np.testing.assert_allclose(plain, scaled, rtol=1e-6)
  assert metrics['opt_skipped'] == 0
  assert metrics['opt_loss_scale'] > 1


@pytest.mark.parametrize('scaling', [False, True])
def test_loss_scale_is_in_the_gradients(scaling):
  # Else small gradients would vanish in float16 before they are divided.
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam('opt', [weights], 0.1, loss_scaling=scaling)
  with layers.Tapes(optimizer.variables) as tapes:
    loss = tf.reduce_sum(weights.kernel.value) + weights.bias.value[0]
  grads = optimizer.gradient(tapes, loss)
  scale = float(optimizer.apply(grads).get('opt_loss_scale', 1))
  assert (scale > 1) == scaling
  np.testing.assert_allclose(grads[0], [scale] * 3)


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_loss_scaling_skips_non_finite_gradients(bad):
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam('opt', [weights], 0.1, clip=1.0, loss_scaling=True)
  slopes = [np.array([1.0, bad, 1.0]), np.array([1.0])]
  metrics = linear_step(optimizer, weights, slopes)
  assert metrics['opt_skipped'] == 1
  assert_values(weights, [KERNEL, BIAS], rtol=0)
  after = linear_step(optimizer, weights)
  assert after['opt_skipped'] == 0
  assert after['opt_loss_scale'] == metrics['opt_loss_scale'] / 2
  # The skipped step left no trace in the slots.
  expected = adam_steps([KERNEL, BIAS], SLOPES, 1, 0.1, clip=1.0)
  assert_values(weights, expected)


# --- Simulation -------------------------------------------------------------


class CountingEnv:
  """Episodes of given length; the observation counts steps and episodes."""

  def __init__(self, number, length):
    self.number = number
    self.length = length
    self.episode = 0
    self.count = 0
    self.over = True
    self.log = []  # (episode, step, action), each step once

  def _obs(self):
    return {'id': np.array([self.number, self.episode, self.count])}

  def reset(self, blocking=True):
    assert self.over, 'reset amid an episode'
    self.over = False
    self.episode += 1
    self.count = 0
    return self._answer(self._obs(), blocking)

  def step(self, action, blocking=True):
    assert not self.over, 'step after the end'
    self.count += 1
    self.over = self.count == self.length
    self.log.append((self.episode, self.count, float(action[0])))
    result = self._obs(), 1.0, self.over, {}
    return self._answer(result, blocking)

  def _answer(self, value, blocking):
    return value if blocking else lambda: value


class CountingAgent:
  """Its action names the observation; its state counts steps since reset."""

  def __init__(self):
    self.calls = 0

  def __call__(self, obs, reset, state):
    self.calls += 1
    number, episode, count = obs['id'].T
    np.testing.assert_array_equal(number, np.arange(len(number)))
    # Reset is true at the first observation of an episode, and only there.
    np.testing.assert_array_equal(reset, count == 0)
    state = np.zeros(len(reset), int) if state is None else state
    state = np.where(reset, 0, state)
    np.testing.assert_array_equal(state, count)
    action = 10000 * number + 100 * episode + count
    return action[:, None].astype(np.float64), state + 1


def assert_nothing_lost_or_repeated(env):
  expected = []
  for index in range(len(env.log)):
    episode, count = divmod(index, env.length)
    action = 10000 * env.number + 100 * (episode + 1) + count
    expected.append((episode + 1, count + 1, action))
  assert env.log == expected


@pytest.mark.parametrize('lengths', [(4,), (4, 7, 3)])
def test_simulate_steps(lengths):
  envs = [CountingEnv(i, n) for i, n in enumerate(lengths)]
  agent, state, total = CountingAgent(), None, 0
  for _ in range(5):
    state = tools.simulate(agent, envs, steps=10, state=state)
    total += 10
    finished = sum(len(e.log) // e.length * e.length for e in envs)
    # Enough, and not enough before the last episodes ended.
    last = sum(e.length for e in envs if e.over)
    assert finished - last < total <= finished
  for env in envs:
    assert_nothing_lost_or_repeated(env)
    assert len(env.log) == agent.calls, 'all step at the same time'


@pytest.mark.parametrize('lengths', [(4,), (4, 7, 3)])
def test_simulate_episodes(lengths):
  envs = [CountingEnv(i, n) for i, n in enumerate(lengths)]
  agent, state = CountingAgent(), None
  for call in range(1, 6):
    state = tools.simulate(agent, envs, episodes=2, state=state)
    finished = sum(len(e.log) // e.length for e in envs)
    last = sum(e.over for e in envs)
    assert finished - last < 2 * call <= finished
  for env in envs:
    assert_nothing_lost_or_repeated(env)


def test_simulate_exact_counts():
  env, agent = CountingEnv(0, 4), CountingAgent()
  state = tools.simulate(agent, [env], steps=4)
  assert len(env.log) == 4
  state = tools.simulate(agent, [env], steps=5, state=state)
  # Five needs two more episodes; three steps are surplus ...
  assert len(env.log) == 12
  state = tools.simulate(agent, [env], steps=3, state=state)
  # ... which are enough for the next three.
  assert len(env.log) == 12
  tools.simulate(agent, [env], steps=1, state=state)
  assert len(env.log) == 16


@pytest.mark.parametrize('limit', [dict(episodes=2), dict(steps=8)])
def test_simulate_leaves_out_lost_episodes(limit):
  env = CountingEnv(0, 4)
  whole = env._answer
  env._answer = lambda value, blocking: whole(
    (*value[:3], {'lost': env.episode == 1}) if len(value) == 4 else value,
    blocking,
  )
  tools.simulate(CountingAgent(), [env], **limit)
  assert env.episode == 3  # the first was lost


def test_simulate_keeps_no_surplus_over_another_limit():
  env, agent = CountingEnv(0, 5), CountingAgent()
  state = tools.simulate(agent, [env], episodes=3)
  assert len(env.log) == 15
  state = tools.simulate(agent, [env], steps=10, state=state)
  assert len(env.log) == 25
  tools.simulate(agent, [env], episodes=1, state=state)
  assert len(env.log) == 30


def test_simulate_counts_surplus_episodes():
  envs, agent = [CountingEnv(i, 4) for i in range(3)], CountingAgent()
  state = tools.simulate(agent, envs, episodes=2)
  # All three end at the same time, one more than wanted ...
  assert agent.calls == 4
  state = tools.simulate(agent, envs, episodes=1, state=state)
  # ... which is the next one.
  assert agent.calls == 4
  tools.simulate(agent, envs, episodes=1, state=state)
  assert agent.calls == 8


def test_simulate_reaches_both_limits():
  env, agent = CountingEnv(0, 4), CountingAgent()
  state = tools.simulate(agent, [env], steps=5, episodes=1)
  assert len(env.log) == 8  # five steps are more than one episode
  state = tools.simulate(agent, [env], steps=4, episodes=3, state=state)
  # Three steps and one episode were surplus.
  assert len(env.log) == 16
  tools.simulate(agent, [env], steps=3, episodes=1, state=state)
  assert len(env.log) == 20
