"""Returns, scans, distributions, optimizer, schedules, and the simulation loop.

Letters in shapes: B batch, T time, H horizon, A action, E environments.
Units: an *environment step* is one step of the simulator, an *agent step* is
one action (`action_repeat` environment steps), an *update* is one gradient
step of all optimizers.
"""

import re

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd
from tensorflow_probability import random as tfr

import distribute
from cli import AttrDict as AttrDict
from episode_files import count_episodes as count_episodes
from episode_files import save_episodes as save_episodes
from logger import encode_gif as encode_gif
from logger import video_summary as video_summary
from replay import load_episodes as load_episodes

# --- Schedules --------------------------------------------------------------


class Every(tf.Module):
  """True at the first call and then once for every `every` steps passed.

  Steps that were skipped are made up for: after a jump of 3 * every, three
  calls in a row are true. The state is a variable, so checkpoints hold it.
  """

  def __init__(self, every):
    super().__init__()
    self._every = int(every)
    self._last = tf.Variable(-1, dtype=tf.int64, trainable=False)

  def due(self, step):
    """Whether a call would be true; changes nothing."""
    last = int(self._last.numpy())
    return last < 0 or (self._every > 0 and step >= last + self._every)

  def __call__(self, step):
    if not self.due(step):
      return False
    last = int(self._last.numpy())
    self._last.assign(step if last < 0 else last + self._every)
    return True

  def until(self, step):
    """Steps from `step`, after a call there, until one is true; 1 or more."""
    last = int(self._last.numpy())
    return self._every if last < 0 else max(1, last + self._every - step)

  def catch_up(self, step):
    """As if it had been called at `step` until it was false."""
    if self.due(step):
      last, every = int(self._last.numpy()), self._every
      self._last.assign(step if last < 0 else step - (step - last) % every)

  def skip(self, step):
    """As if it had been true at `step`."""
    self._last.assign(step)

  def go_back(self, step):
    """As if it had not been true after `step`."""
    self._last.assign(tf.minimum(self._last, step))

  def repeat_from(self, step):
    """True again where steps after `step` are made again; keeps its places."""
    last = int(self._last.numpy())
    if self._every and last > step:
      self._last.assign(last - (last - step) // self._every * self._every)


class Once(tf.Module):
  """True at the first call of a run, resumed or not, and never again."""

  def __init__(self):
    super().__init__()
    self._fresh = tf.Variable(True, trainable=False)

  def __call__(self):
    fresh = bool(self._fresh.numpy())
    self._fresh.assign(False)
    return fresh


# --- Scans and returns ------------------------------------------------------


def keep_rows(tensors, keep):
  """Nested tensors [E, ...], zero in the rows where `keep` [E] is false."""

  def mask(x):
    rows = tf.reshape(tf.cast(keep, x.dtype), [-1, *[1] * (len(x.shape) - 1)])
    return x * rows

  return tf.nest.map_structure(mask, tensors)


def static_scan(fn, inputs, start, reverse=False, unroll=False):
  """Runs `carry = fn(carry, inputs[t])` over the leading axis.

  Args:
    fn: maps (carry, input at one time) to the next carry, same structure.
    inputs: nested tensors, each [T, ...].
    start: nested tensors, the carry before the first input.
    reverse: run from the last input to the first.
    unroll: without a loop of TensorFlow, if T is known: faster on a CPU, and
      slower to compile.

  Returns:
    The carries, stacked: nested [T, ...], in the order of the inputs.
  """
  length = tf.nest.flatten(inputs)[0].shape[0]
  if not unroll or not length:
    return tf.scan(fn, inputs, start, reverse=reverse)
  times = zip(*map(tf.unstack, tf.nest.flatten(inputs)), strict=True)
  times, carries = list(times)[:: -1 if reverse else 1], []
  for flat in times:
    start = fn(start, tf.nest.pack_sequence_as(inputs, flat))
    carries.append(start)
  carries = carries[:: -1 if reverse else 1]
  return tf.nest.map_structure(lambda *x: tf.stack(x), *carries)


def lambda_return(reward, value, pcont, bootstrap, lambda_, axis, unroll=False):
  """V_lambda of Eq. 6, computed backwards.

      index            0      1     ...    N-1
      reward          r_0    r_1    ...  r_{N-1}
      pcont           g_0    g_1    ...  g_{N-1}
      value           v_0    v_1    ...  v_{N-1}   bootstrap = v_N

      V(n) = r_n + g_n * ((1 - lambda) * v_{n+1} + lambda * V(n+1)),  V(N) = v_N

  Unrolled, this is Eq. 6: the (1 - lambda) lambda^{k-1} weighted mean of the
  k-step estimates V_N^k of Eq. 5, the longest of which takes the remaining
  weight. Special cases: `lambda_=1` gives V_N^k to the end of the horizon
  (Eq. 5 with the largest k), `lambda_=0` gives V_N^1; `lambda_=1, pcont=1`
  and a zero bootstrap give V_R (Eq. 4), the plain sum of rewards.

  Args:
    reward, value: float tensors of one shape, N along `axis`.
    pcont: the discount at each index, a tensor of the same shape or a number.
    bootstrap: the value after the last index, without `axis`; None is zero.
    lambda_: number in [0, 1].
    axis: the time axis.
    unroll: as of `static_scan`.

  Returns:
    Tensor of the shape of `reward`.
  """
  if np.ndim(pcont) == 0:
    pcont = pcont * tf.ones_like(reward)
  order = list(range(reward.shape.rank))
  order.insert(0, order.pop(axis))
  reward, value, pcont = (
    tf.transpose(x, order) for x in (reward, value, pcont)
  )
  if bootstrap is None:
    bootstrap = tf.zeros_like(value[-1])
  next_value = tf.concat([value[1:], bootstrap[None]], 0)
  one_step = reward + pcont * (1 - lambda_) * next_value
  returns = static_scan(
    lambda carry, x: x[0] + x[1] * lambda_ * carry,  # Eq. 6
    (one_step, pcont),
    bootstrap,
    reverse=True,
    unroll=unroll,
  )
  return tf.transpose(returns, np.argsort(order))


def symlog(x):
  """sign(x) ln(1 + |x|): small numbers as they are, large ones squeezed.

  Of DreamerV3 (Hafner et al., 2023).
  """
  return tf.sign(x) * tf.math.log1p(tf.abs(x))


# --- Randomness and distributions -------------------------------------------


def make_seeds(count, generator=None):
  """Draws `count` seeds for stateless sampling: int32 [count, 2].

  From `generator`, whose state a checkpoint holds, or else from TensorFlow's
  global one.
  """
  draw = generator.uniform if generator else tf.random.uniform
  return draw([count, 2], tf.int32.min, tf.int32.max, dtype=tf.int32)


class TanhBijector(tfb.Bijector):
  """y = tanh(x), with finite log-probabilities for saturated actions.

  In floating point tanh(x) is exactly 1 from x = 9 or so on, and its inverse
  infinite. The inverse clips to the largest number below 1, so that any
  action in [-1, 1] has a finite log-probability.
  """

  def __init__(self, validate_args=False, name='tanh'):
    super().__init__(
      forward_min_event_ndims=0, validate_args=validate_args, name=name
    )

  def _forward(self, x):
    return tf.tanh(x)

  def _inverse(self, y):
    limit = np.nextafter(y.dtype.as_numpy_dtype(1), y.dtype.as_numpy_dtype(0))
    return tf.atanh(tf.clip_by_value(y, -limit, limit))

  def _forward_log_det_jacobian(self, x):
    # ln(1 - tanh(x)^2), in a form that does not round to ln(0).
    return 2.0 * (np.log(2.0).astype(np.float32) - x - tf.nn.softplus(-2.0 * x))


class SampleDist:
  """A distribution with mean, mode and entropy estimated from samples.

  For tanh-transformed Gaussians, which have none of the three in closed form.
  """

  def __init__(self, dist, samples=100):
    self._dist = dist
    self._samples = samples

  def __getattr__(self, name):
    return getattr(self._dist, name)

  def mean(self, seed=None):
    return tf.reduce_mean(self._dist.sample(self._samples, seed=seed), 0)

  def mode(self, seed=None):
    """For each batch entry, the most likely of its own samples."""
    sample = self._dist.sample(self._samples, seed=seed)  # [S, ..., A]
    best = tf.argmax(self._dist.log_prob(sample), 0)  # [...]
    sample = tf.experimental.numpy.moveaxis(sample, 0, -2)  # [..., S, A]
    return tf.gather(sample, best, axis=-2, batch_dims=best.shape.rank)

  def entropy(self, seed=None):
    sample = self._dist.sample(self._samples, seed=seed)
    return -tf.reduce_mean(self._dist.log_prob(sample), 0)


class Normal(tfd.Normal):
  """A Gaussian over [N, ...] with the noise of `normal`."""

  def _sample_n(self, n, seed=None):
    shape = [n, *distribute.dims(self.loc + self.scale)]
    noise = distribute.normal(shape, tfr.sanitize_seed(seed), axis=1)
    return self.loc + self.scale * noise


class UnitNormal(tfd.Independent):
  """A Gaussian of unit variance (q(o_t | s_t) of Eq. 9).

  TFP's own goes over images some ten times for a log-probability with its
  gradient, this one four times.

  Args:
    mean: float [..., *event].
    dims: rank of the event.
  """

  def __init__(self, mean, dims):
    super().__init__(tfd.Normal(mean, 1.0), dims)
    self._parameters = dict(mean=mean, dims=dims)
    self._dims = dims

  def _log_prob(self, value):
    """-1/2 |x - mean|^2 - n/2 ln 2 pi, [...]; x has the shape of the mean."""
    dims, scale = self._dims, 0.5 * np.log(2.0 * np.pi)

    @tf.custom_gradient
    def like(mean, value):
      error = value - mean
      axes = list(range(error.shape.rank - dims, error.shape.rank))
      constant = scale * int(np.prod([error.shape[i] for i in axes]))

      def grad(dy):
        dy = tf.reshape(dy, [*tf.unstack(tf.shape(dy)), *[1] * dims]) * error
        return dy, -dy

      return -0.5 * tf.reduce_sum(tf.square(error), axes) - constant, grad

    return like(self.distribution.loc, value)


class OneHotDist(tfd.OneHotCategorical):
  """One-hot categorical with straight-through gradients (section 3).

  Samples are one-hot; their gradient is that of the probabilities.
  """

  def __init__(self, logits=None, probs=None):
    super().__init__(logits=logits, probs=probs, dtype=tf.float32)
    self._parameters = dict(logits=logits, probs=probs)

  @classmethod
  def _parameter_properties(cls, dtype, num_classes=None):
    return super()._parameter_properties(dtype, num_classes)

  def _sample_n(self, n, seed=None):
    """By the largest of logits and Gumbel noise, which is a draw of them."""
    logits = self.logits_parameter()
    shape = [n, *distribute.dims(logits)]
    noise = distribute.uniform(shape, tfr.sanitize_seed(seed), axis=1)
    noise = -tf.math.log(-tf.math.log(noise))
    return tf.one_hot(tf.argmax(logits + noise, -1), logits.shape[-1])

  def mode(self):
    probs = self.probs_parameter()
    hard = tf.one_hot(tf.argmax(probs, -1), probs.shape[-1])
    return tf.stop_gradient(hard - probs) + probs

  def sample(self, sample_shape=(), seed=None):
    hard = tf.stop_gradient(super().sample(sample_shape, seed=seed))
    probs = tf.broadcast_to(self.probs_parameter(), tf.shape(hard))
    return tf.stop_gradient(hard - probs) + probs


class FactoredOneHotDist:
  """Independent choices side by side, each with an `OneHotDist`.

  Args:
    logits: float [..., A].
    choices: how many of the A belong to each choice.
  """

  def __init__(self, logits, choices):
    self._choices = choices
    self._dists = [OneHotDist(part) for part in self._split(logits)]

  def sample(self, sample_shape=(), seed=None):
    seeds = tfr.split_seed(seed, len(self._dists))
    pairs = zip(self._dists, seeds, strict=True)
    return tf.concat([d.sample(sample_shape, s) for d, s in pairs], -1)

  def mode(self):
    return tf.concat([d.mode() for d in self._dists], -1)

  def log_prob(self, value):
    pairs = zip(self._dists, self._split(value), strict=True)
    return tf.add_n([dist.log_prob(part) for dist, part in pairs])

  def entropy(self):
    return tf.add_n([dist.entropy() for dist in self._dists])

  def _split(self, vector):
    return tf.split(vector, self._choices, -1)


# --- Optimizer --------------------------------------------------------------


class _KerasAdam(keras.optimizers.Adam):
  """Keras' Adam, each variable's step in one operation of TensorFlow.

  And without its own sum over replicas, which would be after clipping.
  """

  def _all_reduce_sum_gradients(self, grads_and_vars):
    return grads_and_vars

  def update_step(self, gradient, variable, learning_rate):
    index = self._get_variable_index(variable)
    step = tf.cast(self.iterations + 1, tf.float32)
    tf.raw_ops.ResourceApplyAdam(
      var=variable.handle,
      m=self._momentums[index].value.handle,
      v=self._velocities[index].value.handle,
      beta1_power=tf.pow(self.beta_1, step),
      beta2_power=tf.pow(self.beta_2, step),
      lr=learning_rate,
      beta1=self.beta_1,
      beta2=self.beta_2,
      epsilon=self.epsilon,
      grad=gradient,
    )


class Adam:
  """Adam with global norm clipping, decoupled weight decay and loss scaling.

  Args:
    name: prefix of the metrics.
    modules: Keras layers, built; their trainable variables are optimized.
    lr: learning rate.
    clip: gradients are scaled down to this global norm; None for no limit.
    wd: decoupled weight decay (AdamW), 0 for none.
    wdpattern: regular expression; only variables whose path matches decay.
    eps: Adam's epsilon.
    loss_scaling: scale the loss dynamically, for float16.
  """

  def __init__(
    self,
    name,
    modules,
    lr,
    clip=None,
    wd=None,
    wdpattern=r'.*',
    eps=1e-7,
    loss_scaling=False,
  ):
    self._name = name
    self.variables = [v for m in modules for v in m.trainable_variables]
    # Clipping belongs into the inner optimizer: LossScaleOptimizer divides
    # by the scale inside `apply`, so outside the norm is still scaled.
    adam = _KerasAdam(
      lr,
      epsilon=eps,
      global_clipnorm=clip or None,
      weight_decay=wd or None,
      name=name,
    )
    if wd:
      skip = [v for v in self.variables if not re.search(wdpattern, v.path)]
      adam.exclude_from_weight_decay(skip)
    # What checkpoints hold has a loss scale in every precision, so that a run
    # can resume in another one.
    self.optimizer = keras.optimizers.LossScaleOptimizer(adam)
    self.optimizer.build(self.variables)
    self._scaling = loss_scaling
    self._active = self.optimizer if loss_scaling else adam

  def set_learning_rate(self, value):
    """For the updates to come."""
    self._active.learning_rate = value

  def gradient(self, tapes, loss):
    """Gradients of the loss, times the loss scale where there is one.

    With several replicas, this one's share, the sum of which is the gradient
    of the mean of their losses.

    Args:
      tapes: `layers.Tapes`, of which one group is the variables.
      loss: float32 scalar, computed within them.
    """
    assert loss.dtype == tf.float32 and loss.shape == (), loss
    scale = (
      self._active.scale_loss(tf.ones_like(loss)) / distribute.replica()[1]
    )
    return tapes.gradient(loss, self.variables, scale)

  def apply(self, grads):
    """Moves the variables; returns the norm before clipping as a metric.

    The gradients are those of the whole batch, alike on every replica.
    """
    scale = self._active.scale_loss(tf.constant(1.0))
    norm = tf.linalg.global_norm(grads) / scale
    metrics = {f'{self._name}_grad_norm': norm}
    if self._scaling:
      finite = tf.math.is_finite(norm)
      metrics[f'{self._name}_loss_scale'] = scale
      metrics[f'{self._name}_skipped'] = 1.0 - tf.cast(finite, tf.float32)
    self._active.apply(grads, self.variables)
    return metrics


# --- Simulation -------------------------------------------------------------


def simulate(agent, envs, steps=0, episodes=0, state=None):
  """Runs an agent in environments, all of them at the same time.

  Stops when the episodes that ended hold `steps` agent steps and `episodes` of
  them ended; what is under way then goes on at the next call with the state
  returned here. Episodes with `info['lost']`, whose worker died, do not count.

  Args:
    agent: maps (obs, reset, agent_state) to (action, agent_state), where obs
      is a dictionary of arrays [E, ...], reset [E] is true where an episode
      begins, and action is [E, A].
    envs: E environments whose `reset` and `step` take `blocking=False` and
      then return a function that waits for the result.
    steps: agent steps; 0 waits for none.
    episodes: episodes; 0 waits for none.
    state: what the last call returned, or None to begin anew.

  Returns:
    The state: surplus over the limits, and where each environment is.
  """
  if state is None:
    state = (0, 0, np.ones(len(envs), bool), [0] * len(envs), {}, None)
  step, episode, done, length, obs, agent_state = state
  while (steps and step < steps) or (episodes and episode < episodes):
    waiting = {i: envs[i].reset(blocking=False) for i in np.flatnonzero(done)}
    obs.update({i: promise() for i, promise in waiting.items()})
    batch = {k: np.stack([obs[i][k] for i in range(len(envs))]) for k in obs[0]}
    action, agent_state = agent(batch, done, agent_state)
    action = np.asarray(action)
    assert len(action) == len(envs), (action.shape, len(envs))
    waiting = [
      e.step(a, blocking=False) for e, a in zip(envs, action, strict=True)
    ]
    for index, promise in enumerate(waiting):
      obs[index], _, done[index], info = promise()
      length[index] += 1
      if done[index]:
        if not info.get('lost'):
          step, episode = step + length[index], episode + 1
        length[index] = 0
  step = max(0, step - steps) if steps else 0
  episode = max(0, episode - episodes) if episodes else 0
  return step, episode, done, length, obs, agent_state
