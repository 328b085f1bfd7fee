"""Tests of returns, distributions, optimizer, replay, simulation and logging.

Each fast piece is held against a slow and obvious one written here.
"""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import hypothesis
import imageio.v3 as imageio
import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from hypothesis import strategies
from tensorflow_probability import distributions as tfd

import cli
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


def test_lambda_return_contains_sum_of_rewards():
  # V_R, Eq. 4.
  reward, value, _ = random_trajectories(7)
  actual = tools.lambda_return(
    tf.constant(reward), tf.constant(value[:-1]), 1.0, None, 1.0, 0
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


@pytest.mark.parametrize('reverse', [False, True])
def test_static_scan_is_a_loop(reverse):
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
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_static_scan_nested():
  inputs = ({'a': tf.range(1.0, 4.0)}, tf.constant([10.0, 20.0, 30.0]))
  start = {'sum': tf.constant(0.0), 'pair': (tf.constant(1.0),)}

  def fn(carry, x):
    total = carry['sum'] + x[0]['a'] * x[1]
    return {'sum': total, 'pair': (carry['pair'][0] * x[0]['a'],)}

  actual = tools.static_scan(fn, inputs, start)
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
  assert every(63)


def test_every_zero_is_only_the_first_call():
  every = tools.Every(0)
  assert every(0)
  assert not any(every(step) for step in (0, 1, 1000))


def test_once():
  once = tools.Once()
  assert [once() for _ in range(3)] == [True, False, False]


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
  with tf.GradientTape() as tape:
    loss = sum(
      tf.reduce_sum(v.value * slope.astype(np.float32))
      for v, slope in zip((weights.kernel, weights.bias), slopes, strict=True)
    )
  return {k: float(v) for k, v in optimizer(tape, loss).items()}


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


def test_loss_scale_is_in_the_gradients():
  # Else small gradients would vanish in float16 before they are divided.
  weights = Weights(KERNEL, BIAS)
  optimizer = tools.Adam('opt', [weights], 0.1, loss_scaling=True)
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(weights.kernel.value) + weights.bias.value[0]
  grads = optimizer.gradient(tape, loss)
  scale = float(optimizer.apply(grads)['opt_loss_scale'])
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


# --- Files and replay -------------------------------------------------------


def make_episode(number, length, dtype=np.float32):
  """Each row says, in every key, whose it is: (episode, row)."""
  row = np.arange(length)
  image = np.zeros((length, 4, 4, 3), np.uint8)
  image[..., 0] = number
  image[..., 1] = row[:, None, None]
  return {
    'image': image,
    'action': np.stack([row, 0 * row + number], 1).astype(dtype),
    'reward': (row + 1000 * number).astype(np.float32),
    'discount': np.ones(length, dtype),
    'position': np.stack([row, row + number, row], 1).astype(np.float64),
  }


def identify(window):
  """(episode, rows) of a window; checks that its keys agree."""
  number = window['image'][0, 0, 0, 0]
  rows = window['image'][:, 0, 0, 1].astype(int)
  # One episode and rows in order, none lost and none twice.
  assert np.all(window['image'][..., 0] == number)
  np.testing.assert_array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
  np.testing.assert_array_equal(window['action'][:, 0], rows)
  assert np.all(window['action'][:, 1] == number)
  np.testing.assert_array_equal(window['reward'], rows + 1000.0 * number)
  if 'position' in window:
    np.testing.assert_array_equal(window['position'][:, 1], rows + number)
  return int(number), tuple(rows)


def draw(directory, count, *args, **kwargs):
  generator = tools.load_episodes(directory, *args, **kwargs)
  return [next(generator) for _ in range(count)]


def test_save_and_count_episodes(tmp_path):
  folder = tmp_path / 'a' / 'episodes'
  episodes = [make_episode(1, 5), make_episode(2, 8)]
  paths = tools.save_episodes(folder, episodes)
  assert sorted(folder.iterdir()) == sorted(paths)
  for path, episode in zip(paths, episodes, strict=True):
    stamp, unique, length = path.stem.split('-')
    assert path.suffix == '.npz'
    assert stamp[8] == 'T' and stamp.replace('T', '').isdigit()
    assert len(unique) == 32
    assert int(length) == len(episode['reward'])
    assert tools.episode_length(path) == int(length)
    with np.load(path, allow_pickle=False) as loaded:
      assert set(loaded.files) == set(episode)
      for key, value in episode.items():
        assert loaded[key].dtype == value.dtype
        np.testing.assert_array_equal(loaded[key], value)
  # The row of the reset is no agent step.
  assert tools.count_episodes(folder) == (2, 4 + 7)
  assert tools.count_episodes(tmp_path / 'a') == (0, 0)


@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('balance', [False, True])
def test_every_row_comes_back_in_order(tmp_path, compressed, balance):
  lengths = {1: 4, 2: 7, 3: 9}
  for number, length in lengths.items():
    episode = make_episode(number, length)
    if compressed:
      np.savez_compressed(tmp_path / f'2020-x{number}-{length}.npz', **episode)
    else:
      tools.save_episodes(tmp_path, [episode])
  windows = draw(tmp_path, 400, 100, 4, balance)
  for window in windows:
    name, _, row = window.pop('source').partition(', row ')
    number = identify(window)[0]
    assert name.endswith(f'-{lengths[number]}.npz')
    assert int(row) == identify(window)[1][0]
    assert set(window) == set(make_episode(1, 4))
    assert all(len(v) == 4 for v in window.values())
    assert window['image'].dtype == np.uint8
    assert window['position'].dtype == np.float64
  seen = {identify(w) for w in windows}
  # All windows that fit: first rows, last rows, none across episodes.
  assert seen == {
    (number, tuple(range(start, start + 4)))
    for number, length in lengths.items()
    for start in range(length - 4 + 1)
  }


def test_whole_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 3), make_episode(2, 6)])
  seen = {identify(w) for w in draw(tmp_path, 50, 10)}
  assert seen == {(1, (0, 1, 2)), (2, (0, 1, 2, 3, 4, 5))}


def test_balance_favours_the_ends(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 10)])
  shares = {}
  for balance in (False, True):
    starts = [identify(w)[1][0] for w in draw(tmp_path, 2000, 100, 5, balance)]
    shares[balance] = np.bincount(starts, minlength=6) / len(starts)
  np.testing.assert_allclose(shares[False], [1 / 6] * 6, atol=0.04)
  # Draws 0..10, of which 5..10 count as the last window.
  expected = [1 / 11] * 5 + [6 / 11]
  np.testing.assert_allclose(shares[True], expected, atol=0.04)


def test_capacity_drops_the_oldest(tmp_path):
  # Four agent steps in each.
  tools.save_episodes(tmp_path, [make_episode(n, 5) for n in range(1, 6)])

  def numbers(capacity):
    windows = draw(tmp_path, 200, 50, 3, capacity=capacity)
    return {identify(w)[0] for w in windows}

  assert numbers(0) == {1, 2, 3, 4, 5}
  assert numbers(8) == {4, 5}
  assert numbers(9) == {3, 4, 5}
  assert numbers(1) == {5}
  assert len(list(tmp_path.glob('*.npz'))) == 5, 'files stay'


def test_start_continues_the_stream(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(n, 30) for n in range(3)])
  whole = [identify(w) for w in draw(tmp_path, 40, 10, 4, seed=7)]
  again = [identify(w) for w in draw(tmp_path, 20, 10, 4, seed=7, start=2)]
  other = [identify(w) for w in draw(tmp_path, 40, 10, 4, seed=8)]
  assert whole[20:] == again
  assert whole != other
  assert whole[:10] != whole[10:20]


def test_new_episodes_are_seen_at_the_next_block(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 5)])
  generator = tools.load_episodes(tmp_path, 20, 3)
  first = next(generator)
  tools.save_episodes(tmp_path, [make_episode(2, 5)])
  rest = [first, *(next(generator) for _ in range(19))]
  assert {identify(w)[0] for w in rest} == {1}
  block = [next(generator) for _ in range(20)]
  assert {identify(w)[0] for w in block} == {1, 2}


def test_episodes_of_the_2020_release(tmp_path):
  # Compressed, float16, without the keys that came later.
  episode = make_episode(1, 6, np.float16)
  del episode['position']
  name = '20200101T000000-0123456789abcdef0123456789abcdef-6.npz'
  np.savez_compressed(tmp_path / name, **episode)
  tools.save_episodes(tmp_path, [make_episode(2, 6)])
  windows = draw(tmp_path, 60, 20, 4)
  assert {identify(w)[0] for w in windows} == {1, 2}
  for window in windows:
    number = identify(window)[0]
    expected = np.float16 if number == 1 else np.float32
    assert window['action'].dtype == expected
  assert tools.count_episodes(tmp_path) == (2, 10)


def broken_truncated(path):
  np.savez(path, **make_episode(9, 6))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_empty(path):
  path.write_bytes(b'')


def broken_garbage(path):
  path.write_bytes(bytes(range(256)) * 8)


def broken_pickle(path):
  objects = np.array([{}] * 6, object)
  np.savez(path, **make_episode(9, 6), extra=objects)


def broken_pickle_compressed(path):
  objects = np.array([{}] * 6, object)
  np.savez_compressed(path, **make_episode(9, 6), extra=objects)


def broken_key(path):
  episode = make_episode(9, 6)
  del episode['reward']
  np.savez(path, **episode)


def broken_key_compressed(path):
  episode = make_episode(9, 6)
  del episode['reward']
  np.savez_compressed(path, **episode)


def broken_length(path):
  np.savez(path, **make_episode(9, 5))


def broken_length_of_one_key(path):
  episode = make_episode(9, 6)
  episode['discount'] = episode['discount'][:-1]
  np.savez(path, **episode)


def broken_scalar(path):
  np.savez(path, **make_episode(9, 6), extra=np.float32(1))


def broken_order(path):
  # Rows are not together in the file: a window read from it would be wrong.
  episode = make_episode(9, 6)
  episode['position'] = np.asfortranarray(episode['position'])
  np.savez(path, **episode)


def broken_member(path):
  # A stored member that is not an array.
  np.savez(path, **make_episode(9, 6))
  path.write_bytes(path.read_bytes().replace(b'\x93NUMPY', b'\x93NOMPY'))


def broken_compressed_bytes(path):
  np.savez_compressed(path, **make_episode(9, 6))
  content = bytearray(path.read_bytes())
  content[60:90] = b'\xff' * 30
  path.write_bytes(content)


def broken_bit(path):
  large = dict(make_episode(9, 6), image=np.zeros((6, 64, 64, 3), np.uint8))
  np.savez(path, **large)
  content = bytearray(path.read_bytes())
  content[content.index(bytes(5000)) + 4000] ^= 4  # in an image
  path.write_bytes(content)


def broken_dtype(path):
  episode = make_episode(9, 6)
  np.savez(path, **dict(episode, image=episode['image'].astype(np.float32)))


def broken_reward(path):
  episode = make_episode(9, 6)
  episode['reward'][:] = np.nan
  np.savez(path, **episode)


def broken_reward_shape(path):
  np.savez(path, **dict(make_episode(9, 6), reward=np.zeros((6, 1))))


def broken_bomb(path):
  # 64 MB of zeros in 300 KB, which say that they are 6 GiB.
  np.savez_compressed(path, **make_episode(9, 6))
  array = np.lib.format
  header = dict(descr='|u1', fortran_order=False, shape=(6, 2**30))
  with (
    zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED, compresslevel=1) as z,
    z.open('bomb.npy', 'w', force_zip64=True) as file,
  ):
    array.write_array_header_2_0(file, header)
    file.write(bytes(2**26))


def broken_path(path):
  np.savez(path, **{'../../evil': np.zeros(6)}, **make_episode(9, 6))


def broken_name_twice(path):
  np.savez(path, **make_episode(9, 6))
  with (
    warnings.catch_warnings(action='ignore'),
    zipfile.ZipFile(path, 'a') as archive,
  ):
    archive.writestr('reward.npy', archive.read('reward.npy'))


def broken_folder(path):
  path.mkdir()


BROKEN = [v for k, v in sorted(globals().items()) if k.startswith('broken_')]


@pytest.mark.parametrize('spoil', BROKEN, ids=lambda f: f.__name__[7:])
def test_broken_files_are_set_aside(tmp_path, capsys, spoil):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  path = tmp_path / '20260101T000000000000-broken-6.npz'
  spoil(path)
  windows = draw(tmp_path, 30, 30, 4)
  # Sampling goes on, within the same block, and the number is the same.
  assert {identify(w)[0] for w in windows} == {1}
  assert not path.exists()
  aside = path.with_suffix('.npz.broken')
  assert aside.exists()
  out, err = capsys.readouterr()
  assert out.count('Warning') == 1 and aside.name in out
  assert err == ''
  assert tools.count_episodes(tmp_path) == (1, 5)


def test_file_that_is_cut_short_later(tmp_path, capsys):
  good, bad = tools.save_episodes(
    tmp_path, [make_episode(1, 6), make_episode(9, 6)]
  )
  generator = tools.load_episodes(tmp_path, 1000, 6)
  seen = {identify(next(generator))[0] for _ in range(30)}
  assert seen == {1, 9}
  bad.write_bytes(bad.read_bytes()[:300])
  seen = {identify(next(generator))[0] for _ in range(30)}
  assert seen == {1}
  assert bad.name in capsys.readouterr().out
  assert good.exists() and not bad.exists()


def test_episode_that_is_deleted_later(tmp_path):
  _, gone = tools.save_episodes(
    tmp_path, [make_episode(1, 6), make_episode(9, 6)]
  )
  generator = tools.load_episodes(tmp_path, 1000, 6)
  next(generator)
  gone.unlink()
  assert {identify(next(generator))[0] for _ in range(30)} == {1}


@pytest.mark.parametrize('key', ['image', 'action'])
def test_rows_of_another_shape_are_set_aside(tmp_path, key, capsys):
  tools.save_episodes(tmp_path, [make_episode(1, 6), make_episode(2, 6)])
  odd = make_episode(9, 6)
  odd[key] = odd[key][..., :1]
  (path,) = tools.save_episodes(tmp_path, [odd])
  shapes = dict(image=(4, 4, 3), action=(2,))
  windows = tools.load_episodes(tmp_path, 20, 3, shapes=shapes)
  assert {identify(next(windows))[0] for _ in range(60)} == {1, 2}
  assert path.with_suffix('.npz.broken').exists()
  assert f'{key} has shape' in capsys.readouterr().out


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / 'a-x-6.npz', **make_episode(1, 6))
  episode = tools.EpisodeFile(tmp_path / 'a-x-6.npz')
  monkeypatch.setattr(tools.EpisodeFile, 'LARGEST', 1000)
  with pytest.raises(ValueError, match='unpacks to more'):
    episode.read(0, 3)


def test_check_finds_broken_structure_before_anything_is_read(tmp_path, capsys):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  broken_truncated(tmp_path / 'a-x-6.npz')
  broken_length(tmp_path / 'b-x-999999999.npz')
  tools.Replay(tmp_path).check()
  assert tools.count_episodes(tmp_path) == (1, 5)
  out = capsys.readouterr().out
  assert 'a-x-6.npz.broken' in out and 'b-x-999999999.npz.broken' in out


@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_damage_is_noticed_or_harmless(data):
  """Bytes changed, cut out or put in: a broken file, or the same rows."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'a-x-6.npz'
    save = np.savez_compressed if data.draw(strategies.booleans()) else np.savez
    episode = make_episode(1, 6)
    if data.draw(strategies.booleans()):  # more than is read ahead
      episode['image'] = np.tile(episode['image'], (1, 16, 16, 1))
    save(path, **episode)
    content = bytearray(path.read_bytes())
    place = data.draw(strategies.integers(0, len(content) - 1))
    kind = data.draw(strategies.sampled_from(['flip', 'cut', 'insert']))
    if kind == 'flip':
      content[place] ^= data.draw(strategies.integers(1, 255))
    elif kind == 'cut':
      del content[place : place + data.draw(strategies.integers(1, 5000))]
    else:
      content[place:place] = data.draw(strategies.binary(min_size=1))
    path.write_bytes(content)
    try:
      rows = tools.EpisodeFile(path).read(1, 4)
    except ValueError:
      return
    for key in set(rows) & set(episode):
      np.testing.assert_array_equal(rows[key], episode[key][1:4])
    assert {'image', 'action', 'reward', 'discount'} <= set(rows)


def test_names_sort_by_age_even_if_the_clock_goes_back(tmp_path):
  (late,) = tools.save_episodes(tmp_path, [make_episode(1, 3)])
  future = tmp_path / '29990101T000000000000-x-3.npz'
  late.rename(future)
  paths = [tools.save_episodes(tmp_path, [make_episode(1, 3)])[0]]
  paths += tools.save_episodes(tmp_path, [make_episode(1, 3)] * 2)
  assert sorted(tmp_path.glob('*.npz')) == [future, *paths]


def test_all_broken_is_a_user_error(tmp_path):
  broken_empty(tmp_path / 'x-y-6.npz')
  with pytest.raises(tools.UserError):
    draw(tmp_path, 1, 1, 4)


def test_too_short_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 5), make_episode(2, 3)])
  with pytest.raises(tools.UserError, match='batch_length 6 .* 5 rows'):
    draw(tmp_path, 1, 1, 6)
  # A window may be as long as the episode; the shorter one is passed over.
  windows = draw(tmp_path, 20, 10, 5)
  assert {identify(w) for w in windows} == {(1, (0, 1, 2, 3, 4))}


def test_short_episode_between_long_ones(tmp_path):
  episodes = [make_episode(1, 6), make_episode(2, 2), make_episode(3, 6)]
  tools.save_episodes(tmp_path, episodes)
  assert {identify(w)[0] for w in draw(tmp_path, 50, 10, 4)} == {1, 3}
  # It is not broken, only short.
  assert tools.count_episodes(tmp_path)[0] == 3


def test_unfinished_writes_are_not_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  (tmp_path / '.2026-x-6.npz.123.tmp').write_bytes(b'half')
  assert tools.count_episodes(tmp_path) == (1, 5)
  draw(tmp_path, 10, 5, 4)


def test_atomic_write(tmp_path):
  path = tmp_path / 'file'
  with tools.atomic_write(path) as file:
    file.write(b'old')
  assert path.read_bytes() == b'old'
  with pytest.raises(RuntimeError), tools.atomic_write(path) as file:
    file.write(b'half of the ne')
    raise RuntimeError
  assert path.read_bytes() == b'old'
  with pytest.raises(RuntimeError), tools.atomic_write(tmp_path / 'b') as file:
    raise RuntimeError
  with tools.atomic_write(path) as file:
    file.write(b'new')
    file.flush()
    assert path.read_bytes() == b'old', 'seen before it was whole'
  assert path.read_bytes() == b'new'
  assert list(tmp_path.iterdir()) == [path], 'nothing else is left'


def private_memory():
  """Bytes of this process that are no pages of files."""
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])


def test_replay_stays_out_of_private_memory(tmp_path):
  """120 episodes of 100 rows are 150 MB; a twentieth of it may stay."""
  episode = {
    'image': np.zeros((101, 64, 64, 3), np.uint8),
    'action': np.zeros((101, 2), np.float32),
    'reward': np.zeros(101, np.float32),
    'discount': np.ones(101, np.float32),
  }
  tools.save_episodes(tmp_path, [episode] * 120)
  del episode
  windows = tools.load_episodes(tmp_path, 50, 50)
  for _ in range(50):
    next(windows)
  before = private_memory()
  for _ in range(1000):
    next(windows)
  assert private_memory() - before < 8e6


def test_prefetch_keeps_the_order_and_passes_errors_on():
  def count():
    yield from range(3)
    raise tools.UserError('no more')

  numbers = tools.prefetch({'x': np.float32(i)} for i in count())
  assert [float(next(numbers)['x']) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(tools.UserError, match='no more'):
    next(numbers)


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


# --- Logging ----------------------------------------------------------------


def make_frames(count=7):
  """Frames that stay different in a GIF's palette."""
  frames = np.zeros((count, 16, 24, 3), np.uint8)
  for index in range(count):
    frames[index, :, 3 * index : 3 * index + 3] = [255, 40 * (index % 4), 0]
  return frames


def test_encode_gif():
  frames = make_frames()
  content = tools.encode_gif(frames, fps=20)
  assert content[:6] in (b'GIF89a', b'GIF87a')
  decoded = imageio.imread(io.BytesIO(content), extension='.gif', index=None)
  assert decoded.shape == frames.shape
  difference = np.abs(decoded.astype(int) - frames)
  assert difference.max() <= 8, 'frames come back in order'
  meta = imageio.immeta(io.BytesIO(content), extension='.gif', index=0)
  assert meta['duration'] == 50 and meta['loop'] == 0


def read_events(folder):
  values = []
  for path in sorted(pathlib.Path(folder).glob('events.*')):
    for record in tf.data.TFRecordDataset(str(path)):
      event = tf.compat.v1.Event.FromString(record.numpy())
      values += [(event.step, value) for value in event.summary.value]
  return values


@pytest.mark.parametrize('floating', [False, True])
def test_video_summary(tmp_path, floating):
  frames = make_frames()
  video = np.stack([frames, frames[::-1]])
  writer = tf.summary.create_file_writer(str(tmp_path))
  with writer.as_default():
    given = (video / 255).astype(np.float32) if floating else video
    tools.video_summary('openl', given, step=12)
  writer.close()
  ((step, value),) = read_events(tmp_path)
  assert (step, value.tag) == (12, 'openl')
  assert (value.image.height, value.image.width) == (16, 48)
  assert value.image.colorspace == 3
  decoded = imageio.imread(
    value.image.encoded_image_string, extension='.gif', index=None
  )
  expected = np.concatenate([frames, frames[::-1]], 2)
  assert decoded.shape == expected.shape
  assert np.abs(decoded.astype(int) - expected).max() <= 8


def test_logger(tmp_path, capsys):
  logger = tools.Logger(tmp_path, total=100)
  logger.scalars(10, {'loss': np.float32(0.5), 'norm': tf.constant(2.0)})
  logger.scalars(20, {'train/return': 3, 'div': 4, 'actor_grad_norm': 5})
  logger.say('a line')
  logger.progress(20, 3)
  logger.video(20, 'clip', make_frames()[None])
  logger.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 10, 'loss': 0.5, 'norm': 2.0},
    {'step': 20, 'train/return': 3.0, 'div': 4.0, 'actor_grad_norm': 5.0},
  ]
  events = [(step, value.tag) for step, value in read_events(tmp_path)]
  assert events == [
    (10, 'loss'),
    (10, 'norm'),
    (20, 'train/return'),
    (20, 'world_model/div'),
    (20, 'optimizers/actor_grad_norm'),
    (20, 'clip'),
  ]
  out, err = capsys.readouterr()
  assert out == 'a line\n' and err == ''


@pytest.mark.parametrize('half', ['{"step": 20, "lo', '{"step": 20}'])
def test_logger_cuts_half_a_line(tmp_path, half):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 10}\n' + half)
  logger = tools.Logger(tmp_path, total=100, step=10)
  logger.scalars(30, {'loss': 1})
  logger.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [10, 30]


def test_logger_keeps_whole_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 10}\n{"step": 20}\n')
  tools.Logger(tmp_path, total=100).close()
  assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


# --- Checkpoints and signals ------------------------------------------------


def make_objects(scaling=True):
  layer = keras.layers.Dense(3)
  layer.build((None, 2))
  optimizer = tools.Adam('opt', [layer], 0.1, loss_scaling=scaling)
  objects = {
    'layer': layer,
    'optimizer': optimizer.optimizer,
    'every': tools.Every(10),
    'generator': tf.random.Generator.from_seed(3),
  }
  return objects, optimizer


def dense_step(objects, optimizer, step):
  """One update and one step of everything; returns all that it gave."""
  x = objects['generator'].normal([4, 2])
  with tf.GradientTape() as tape:
    loss = tf.reduce_mean(objects['layer'](x) ** 2)
  optimizer(tape, loss)
  weights = [v.numpy().tolist() for v in objects['layer'].variables]
  slots = [v.numpy().tolist() for v in objects['optimizer'].variables]
  return weights, slots, objects['every'](step), float(loss)


def test_checkpoint_round_trip(tmp_path):
  objects, optimizer = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  assert checkpoints.restore() is None
  for step in (3, 8):
    dense_step(objects, optimizer, step)
  path = checkpoints.save(2)
  expected = [dense_step(objects, optimizer, s) for s in (12, 13, 14)]

  fresh, fresh_optimizer = make_objects()
  fresh['generator'].normal([7])
  restored = tools.Checkpoints(tmp_path, **fresh).restore()
  assert restored == path
  # Weights, slots, loss scale, schedule and noise go on as if unbroken.
  actual = [dense_step(fresh, fresh_optimizer, s) for s in (12, 13, 14)]
  assert actual == expected
  assert [a[2] for a in actual] == [False, True, False]


def test_checkpoints_keep_the_newest_two(tmp_path):
  objects, _ = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  for number in (1, 5, 9):
    checkpoints.save(number)
  kept = sorted(p.stem for p in tmp_path.glob('*.index'))
  assert kept == ['ckpt-5', 'ckpt-9']
  assert checkpoints.restore().endswith('ckpt-9')


def test_checkpoint_that_lacks_something_is_refused(tmp_path):
  objects, _ = make_objects()
  tools.Checkpoints(tmp_path, **objects).save(1)
  head = keras.layers.Dense(3)
  head.build((None, 2))
  with pytest.raises(tools.UserError, match='not made by this version'):
    tools.Checkpoints(tmp_path, head=head, **objects).restore()


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
@pytest.mark.parametrize('damage', ['cut', 'empty', 'flip', 'gone'])
def test_broken_checkpoint_gives_way_to_the_one_before(
  tmp_path, part, damage, capsys
):
  objects, optimizer = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  expected = []
  for number in (1, 2):
    dense_step(objects, optimizer, number)
    expected.append(objects['layer'].get_weights())
    checkpoints.save(number)
  path = tmp_path / f'ckpt-2.{part}'
  content = path.read_bytes()
  middle = len(content) // 2
  flipped = bytes([content[middle] ^ 1])
  if damage == 'gone':
    path.unlink()
  else:
    path.write_bytes(
      dict(
        cut=content[:middle],
        empty=b'',
        flip=content[:middle] + flipped + content[middle + 1 :],
      )[damage]
    )
  (tmp_path / 'checkpoint').write_text('nonsense')
  fresh, fresh_optimizer = make_objects()
  again = tools.Checkpoints(tmp_path, **fresh)
  assert again.restore(repair=True) == str(tmp_path / 'ckpt-1')
  for a, b in zip(fresh['layer'].get_weights(), expected[0], strict=True):
    np.testing.assert_array_equal(a, b)
  if (part, damage) not in (('index', 'gone'), ('index', 'empty')):
    assert 'ckpt-2 is broken' in capsys.readouterr().out
    # What is set aside was read; what is not whole may be on its way here.
    aside = {p.name for p in tmp_path.glob('ckpt-2.*.broken')}
    assert len(aside) == (0 if damage == 'gone' else 2)
  whole = damage == 'gone' and part != 'index'
  assert (tmp_path / 'ckpt-2.index').exists() == whole
  # And it goes on from there.
  dense_step(fresh, fresh_optimizer, 3)
  again.save(1)
  assert again.restore(repair=True).endswith('ckpt-3' if whole else 'ckpt-2')


NAMES = ['a [1]*? ~ü:%s', 'exp[1]', 'back\\slash', 'new\nline', '{a,b}.zip']


@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_in_folders_of_any_name(tmp_path, name, capfd):
  objects, optimizer = make_objects()
  folder = tmp_path / name / 'saved'
  folder.parent.mkdir()
  checkpoints = tools.Checkpoints(folder, **objects)
  assert checkpoints.restore(repair=True) is None
  for number in (1, 2, 3):
    expected = dense_step(objects, optimizer, number)[0]
    assert checkpoints.save(number) == str(folder / f'ckpt-{number}')
  fresh, _ = make_objects()
  again = tools.Checkpoints(folder, **fresh)
  assert again.restore(repair=True) == str(folder / 'ckpt-3')
  for a, b in zip(fresh['layer'].get_weights(), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  names = {p.name for p in folder.iterdir()}
  kinds = ('index', 'data-00000-of-00001')
  expected = {f'ckpt-{n}.{kind}' for n in (2, 3) for kind in kinds}
  assert names == {'checkpoint', *expected}
  # Other tools find the newest.
  state = tf.train.get_checkpoint_state(str(tmp_path / name / 'saved'))
  assert state.model_checkpoint_path.endswith('ckpt-3')
  assert capfd.readouterr() == ('', '')
  # A broken one is told from a path that TensorFlow does not like.
  path = folder / 'ckpt-3.index'
  path.write_bytes(path.read_bytes()[:-9])
  assert again.restore(repair=True) == str(folder / 'ckpt-2')
  out = capfd.readouterr().out
  assert f'{folder / "ckpt-3"} is broken' in out and '/proc/' not in out
  assert again.newest_trace() == 3


def test_a_path_that_tensorflow_cannot_take_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / 'a*'
  folder.mkdir()
  assert tools.plain_path(tmp_path) == (str(tmp_path), None)
  exists = pathlib.Path.exists
  monkeypatch.setattr(  # as where there is no /proc
    pathlib.Path, 'exists', lambda p: exists(p) and str(p)[:5] != '/proc'
  )
  with pytest.raises(cli.UserError, match=r'without any of \[ \] \* \?'):
    tools.plain_path(folder)


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
def test_a_checkpoint_that_cannot_be_read_stays(tmp_path, part):
  """Only wrong bytes are set aside; here there is a folder in their place."""
  objects, optimizer = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  for number in (1, 2):
    dense_step(objects, optimizer, number)
    checkpoints.save(number)
  path = tmp_path / f'ckpt-2.{part}'
  path.rename(tmp_path / 'kept')
  path.mkdir()
  (path / 'file').write_text('')
  before = {p.name for p in tmp_path.rglob('*')}
  with pytest.raises(cli.UserError, match=f'{path} cannot be read'):
    checkpoints.restore(repair=True)
  assert {p.name for p in tmp_path.rglob('*')} == before
  (path / 'file').unlink()
  path.rmdir()
  (tmp_path / 'kept').rename(path)
  assert checkpoints.restore(repair=True).endswith('ckpt-2')


def test_traces_of_checkpoints(tmp_path):
  checkpoints = tools.Checkpoints(tmp_path / 'saved', **make_objects()[0])
  assert checkpoints.newest_trace() == 0
  for number in (0, 12, 9):
    checkpoints.save(number)
  assert checkpoints.newest_trace() == 13
  for path in (tmp_path / 'saved').glob('*.index'):
    path.unlink()
  # Without any index nothing is whole, and nothing is swept away.
  assert checkpoints.restore(repair=True) is None
  assert checkpoints.newest_trace() == 13


def test_restore_sweeps_what_a_killed_run_left(tmp_path):
  objects, _ = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  for number in (4, 5):
    checkpoints.save(number)
  (tmp_path / 'backup').mkdir()  # what others put there stays
  (tmp_path / 'backup/ckpt-1.index').write_text('x')
  (tmp_path / 'ckpt-notes.txt').write_text('x')
  before = {p.name for p in tmp_path.iterdir()}
  (tmp_path / 'ckpt-6_temp').mkdir()
  (tmp_path / 'ckpt-6_temp/part-0').write_text('x')
  (tmp_path / 'ckpt-6.data-00000-of-00001').write_text('x')
  (tmp_path / 'checkpoint.tmp123').write_text('x')
  for name in ('index', 'data-00000-of-00001'):
    shutil.copy(tmp_path / f'ckpt-4.{name}', tmp_path / f'ckpt-3.{name}')
  checkpoints.restore()
  assert len(list(tmp_path.iterdir())) == len(before) + 5  # reading only
  assert checkpoints.restore(repair=True).endswith('ckpt-5')
  assert {p.name for p in tmp_path.iterdir()} == before


def test_checkpoints_never_write_over_each_other(tmp_path):
  objects, _ = make_objects()
  checkpoints = tools.Checkpoints(tmp_path, **objects)
  paths = [checkpoints.save(7) for _ in range(3)]
  assert [p.rsplit('-', 1)[1] for p in paths] == ['7', '8', '9']


def test_run_state_round_trip(tmp_path):
  held = dict(metrics=dict(loss=[0.1, 2.5]), count=3)
  state = tools.RunState(lambda: held)
  tools.Checkpoints(tmp_path, run=state).save(1)
  fresh = tools.RunState(dict)
  tools.Checkpoints(tmp_path, run=fresh).restore()
  assert fresh.restored == held


def test_lock_names_its_holder(tmp_path, capsys):
  lock = tools.Lock(tmp_path)
  with pytest.raises(tools.UserError, match=f'use by process {os.getpid()} on'):
    tools.Lock(tmp_path)
  lock.release()
  tools.Lock(tmp_path).release()
  assert capsys.readouterr().out == ''


def test_lock_of_a_killed_process_is_taken_over(tmp_path, capsys):
  code = 'import os, sys, tools; lock = tools.Lock(sys.argv[1]); '
  code += 'os.kill(os.getpid(), 9)'
  root = pathlib.Path(tools.__file__).parent
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=root)
  tools.Lock(tmp_path).release()
  assert 'which did not end properly' in capsys.readouterr().out


@pytest.fixture
def stop():
  numbers = signal.SIGINT, signal.SIGTERM
  before = [signal.getsignal(n) for n in numbers]
  stop = tools.StopSignal()
  stop.install()
  yield stop
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_until_checked(stop, number):
  stop.check()
  os.kill(os.getpid(), number)
  with pytest.raises(tools.Stopped):
    stop.check()


def test_signal_in_an_immediate_part_raises_at_once(stop):
  with pytest.raises(tools.Stopped), stop.immediate():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
      pass
    pytest.fail('the signal did not end this part')


def test_signal_before_an_immediate_part_raises_at_its_start(stop):
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(tools.Stopped), stop.immediate():
    pytest.fail('this part should not have begun')


def test_second_signal_raises_anywhere(stop):
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(tools.Stopped):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
      pass


# --- Small things -----------------------------------------------------------


def test_attr_dict():
  config = tools.AttrDict(a=1)
  config.b = 2
  assert (config.a, config['b']) == (1, 2)
  with pytest.raises(AttributeError):
    config.missing  # noqa: B018


def test_nearest():
  choices = ['batch_size', 'batch_length', 'horizon']
  assert 'horizon' in cli.nearest('horizen', choices)
  assert cli.nearest('zzz', choices) == ''


def test_stopwatch_leaves_the_first_call_out(monkeypatch):
  # Call 1 is not timed; then one second and three.
  clock = iter([0.0, 100.0, 101.0, 200.0, 203.0])
  fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
  monkeypatch.setattr(tools, 'time', fake)
  watch = tools.Stopwatch()
  assert watch.mean == 0
  for _ in range(3):
    with watch():
      pass
  assert watch.count == 3
  assert watch.mean == 2
