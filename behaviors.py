"""Ways to choose actions (`--behavior`), each a class.

Each owns its networks, acts on model states, and has the losses of its networks
on states that the world model imagines. configs.BEHAVIORS names them, and those
of evolution.py.

Letters in shapes: B batch, T time, H horizon, N = B * T starts of imagination,
A action, E environments, F feature.
"""

import tensorflow as tf
from tensorflow_probability import distributions as tfd

import distribute
import models
import tools


class Behavior:
  """A way to choose actions; without networks of its own.

  Args:
    config: from `commandline.parse_flags`, actions resolved.
    world: `world_model.WorldModel`.
    actions: A.
    choices: of discrete actions, how many of the A belong to each; else None.

  Attributes:
    networks: {name in checkpoints: Keras layer}.
    state: {name in checkpoints: variable or list of them}, what else resumes.
  """

  def __init__(self, config, world, actions, choices=None):
    self._c, self._world = config, world
    self._actions, self._choices = actions, choices
    self.networks = {}
    self.state = {}

  @property
  def learned(self):
    """Names of the networks that `losses` and optimizers are for."""
    return list(self.networks)

  def build(self, feat):
    """Makes the variables, from a feature [1, F]."""
    for network in self.networks.values():
      network(feat)

  def act(self, latent, seed, training):
    """Actions before exploration.

    Args:
      latent: model states {...: [E, ...]}.
      seed: int32 [2].
      training: sample the action (or `--collect_action mode`), else mode.

    Returns:
      [E, A] in [-1, 1], or one-hot.
    """
    raise NotImplementedError

  def losses(self, post, seeds):
    """Objectives of the networks, negated.

    Args:
      post: posterior states {...: [B, T, ...]}.
      seeds: int32 [2 * H, 2], of imagination.

    Returns:
      {name of a network: scalar}, metrics.
    """
    return {}, {}

  def learning_rate(self, name, updates):
    """Of one of the networks in `learned`, after so many updates."""
    return self._c[f'{name}_lr']

  def before_update(self, delayed):
    """Not compiled; `delayed` says that `--actor_delay` is not over."""

  def after_update(self, metrics):
    """Not compiled; returns the metrics of the update, all of them scalars."""
    return metrics

  def before_action(self, reset):
    """In training, not compiled; `reset` [E]: where an episode begins."""

  def after_episode(self, index, episode):
    """Called when an episode of training ended, that of environment `index`.

    Returns:
      Metrics to be logged now.
    """
    return {}

  def starts(self, post, seed):
    """Where imagination starts (section 3), without gradient.

    At every state of the batch, N = B * T (with `pcont` without the last of
    each sequence, which may be terminal), or at `--imag_starts` of them.

    Args:
      post: posterior states {...: [B, T, ...]}.
      seed: int32 [2].

    Returns:
      States {...: [N, ...]}.
    """
    if self._c.pcont:
      post = {k: v[:, :-1] for k, v in post.items()}
    start = {
      k: tf.reshape(tf.stop_gradient(v), [-1, *v.shape[2:]])
      for k, v in post.items()
    }
    return distribute.some_rows(start, self._c.imag_starts, seed)


class Planning(Behavior):
  """The first action of a plan by imagined rewards, as PlaNet (section 6)."""

  def act(self, latent, seed, training):
    c = self._c
    count = distribute.dims(latent['deter'])[0]
    starts = {k: tf.repeat(v, c.plan_candidates, 0) for k, v in latent.items()}
    seeds = tf.random.experimental.stateless_split(seed, c.plan_horizon + 1)

    def score(actions):
      actions = tf.reshape(actions, [-1, c.plan_horizon, self._actions])
      states = self._world.dynamics.imagine(actions, starts, seeds[1:])
      feat = self._world.dynamics.get_feat(states)
      reward = self._world.reward(feat).mean()
      chance = tf.math.cumprod(
        self._world.continuation(feat), 1, exclusive=True
      )
      reward *= chance  # to get there
      # V_R (Eq. 4) of each plan.
      return tf.reshape(tf.reduce_sum(reward, 1), [count, c.plan_candidates])

    plan = cross_entropy_method(
      score,
      [count, c.plan_horizon, self._actions],
      c.plan_candidates,
      c.plan_best,
      c.plan_iterations,
      seeds[0],
    )
    return plan[:, 0]


def cross_entropy_method(score, shape, candidates, best, iterations, seed):
  """Plans actions in [-1, 1], as PlaNet does (Hafner et al., 2018).

  Draws candidates from a Gaussian, at first the standard one, and fits the
  Gaussian to the best of them, again and again.

  Args:
    score: function from actions [E, N, H, A] to expected returns [E, N].
    shape: (E, H, A).
    candidates: N.
    best: how many of them the Gaussian is fitted to.
    iterations: number of fits.
    seed: int32 [2].

  Returns:
    The mean of the last Gaussian, float32 [E, H, A].
  """
  envs, *rest = shape

  def fit(gaussian, seed):
    mean, std = (x[:, None] for x in gaussian)
    noise = tf.random.stateless_normal([envs, candidates, *rest], seed)
    actions = tf.clip_by_value(mean + std * noise, -1.0, 1.0)
    index = tf.math.top_k(score(actions), best).indices
    actions = tf.gather(actions, index, batch_dims=1)
    mean, variance = tf.nn.moments(actions, 1)
    return mean, tf.sqrt(variance)

  seeds = tf.random.experimental.stateless_split(seed, iterations)
  means, _ = tools.static_scan(fit, seeds, (tf.zeros(shape), tf.ones(shape)))
  return means[-1]


class ActorOnly(Behavior):
  """The action model, by imagined rewards alone (Eq. 4, 7; "no value")."""

  def __init__(self, config, world, actions, choices=None):
    super().__init__(config, world, actions, choices)
    self.actor = models.ActionDecoder(
      actions,
      config.actor_layers,
      config.num_units,
      config.action_dist,
      config.dense_act,
      init_std=config.action_init_std,
      choices=choices,
      name='actor',
    )
    self.networks = dict(actor=self.actor)

  def act(self, latent, seed, training):
    dist = self.actor(self._world.dynamics.get_feat(latent))
    if training and self._c.collect_action == 'sample':
      return dist.sample(seed=seed)
    if self._c.action_dist == 'onehot':
      return dist.mode()
    return dist.mode(seed=seed)

  def learning_rate(self, name, updates):
    if name == 'actor' and updates < self._c.actor_delay:
      return 0.0
    return super().learning_rate(name, updates)

  def losses(self, post, seeds):
    loss, _, metrics = self.actor_loss(post, seeds)
    return dict(actor=loss), metrics

  def imagine(self, post, seeds):
    """Imagined features [H, N, F] from posterior states (section 3).

    Those of `starts` are not part of the result. Also returns the entropy of
    the action model at the states acted in, s_0 to s_{H-1}, [H, N].
    """
    dynamics = self._world.dynamics
    start = self.starts(post, tf.bitwise.invert(seeds[0]))

    def step(carry, seeds):
      state, *_ = carry
      feat = tf.stop_gradient(dynamics.get_feat(state))
      outputs = self.actor.outputs(feat)
      action, drawn = self.actor.draw(outputs, seeds[0])  # Eq. 3
      return dynamics.img_step(state, action, seeds[1]), outputs, drawn

    # A scan returns what it carries, so outputs and what was drawn ride along:
    # the entropy is computed once for all steps.
    count = distribute.dims(start['stoch'])[0]
    outputs, drawn = (
      tf.zeros([count, n]) for n in (self.actor.outputs_size, self._actions)
    )
    states, outputs, drawn = tools.static_scan(
      step,
      tf.reshape(seeds, [self._c.horizon, 2, 2]),
      (start, outputs, drawn),
      unroll=dynamics.unroll,
    )
    entropy = self._entropy(outputs, drawn)
    return dynamics.get_feat(states), entropy

  def _entropy(self, outputs, drawn):
    """Of the action model in nats [H, N]; by one sample if no form is known."""
    if self._c.action_dist == 'onehot' and self._c.actor_entropy:
      return self.actor.dist(outputs).entropy()
    logprob = self.actor.log_prob(outputs, drawn)
    return -(logprob if self._c.actor_entropy else tf.stop_gradient(logprob))

  def actor_loss(self, post, seeds):
    """Objective of the action model, negated (Eq. 7).

        start   s_0   a posterior state of the batch, not part of imag_feat
        index    0      1     ...     H-1
        state   s_1    s_2    ...     s_H        imag_feat [H, N, F]
        reward  r_1    r_2    ...     r_H        of the state it is at
        pcont   g_1    g_2    ...     g_H        its discount
        weight   1     g_1    ... g_1..g_{H-1}   of as many as `returns` gives

    Args:
      post: posterior states {...: [B, T, ...]}.
      seeds: int32 [2 * H, 2].

    Returns:
      Loss, what `value_loss` takes, metrics.
    """
    imag_feat, entropy = self.imagine(post, seeds)
    reward = self._world.reward(imag_feat).mean()
    if self._c.pcont:
      pcont = self._world.pcont(imag_feat).mean()
    else:
      pcont = self._c.discount * tf.ones_like(reward)
    returns, value = self.returns(imag_feat, reward, pcont)
    weights = tf.concat([tf.ones_like(pcont[:1]), pcont], 0)
    weights = weights[: tf.shape(returns)[0]]
    weights = tf.stop_gradient(tf.math.cumprod(weights, 0))
    loss = -tf.reduce_mean(weights * returns)  # Eq. 7
    if self._c.actor_entropy:
      # s_0 and s_1 are reached for certain, s_2 with g_1, ...
      acted = tf.concat([weights[:1], weights], 0)[: self._c.horizon]
      bonus = tf.reduce_mean(acted * entropy)  # of s_0 to s_{H-1}
      loss -= self._c.actor_entropy * bonus
    action_ent = tf.reduce_mean(entropy)
    metrics = dict(
      actor_loss=loss,
      action_ent=action_ent,
      action_ent_each=action_ent / len(self._choices or range(self._actions)),
      imag_reward=tf.reduce_mean(reward),
      imag_return=tf.reduce_mean(returns),
    )
    imag = dict(returns=tf.stop_gradient(returns), weights=weights)
    return loss, dict(imag, value=value), metrics

  def returns(self, feat, reward, pcont):
    """Value estimates of imagined states.

    Args:
      feat: imagined features [H, N, F].
      reward, pcont: of these states, [H, N].

    Returns:
      V_R [H, N] of Eq. 4, which stops where episodes do, and None for values.
    """
    returns = tools.lambda_return(  # Eq. 4
      reward,
      tf.zeros_like(reward),
      self._world.chance(pcont),
      bootstrap=None,
      lambda_=1.0,
      axis=0,
      unroll=self._world.dynamics.unroll,
    )
    return returns, None


class ActorCritic(ActorOnly):
  """The action model and the value model: Dreamer (Eq. 2 to 8)."""

  def __init__(self, config, world, actions, choices=None):
    super().__init__(config, world, actions, choices)
    self.networks['value'] = self.value = self._value_model('value')
    self._slow = config.slow_value and self._value_model('slow_value')

  def _value_model(self, name):
    c = self._c
    return models.DenseDecoder(
      (), c.value_layers, c.num_units, act=c.dense_act, name=name
    )

  def build(self, feat):
    super().build(feat)
    if self._slow:
      self._slow(feat)
      self._follows = tf.Variable(False, trainable=False)
      weights = list(self._slow.weights)
      self.state = dict(slow_value=weights, slow_value_follows=self._follows)

  def before_update(self, delayed):
    if self._slow and not self._follows.numpy():
      self._follow(tf.constant(1.0))
      self._follows.assign(True)

  def after_update(self, metrics):
    if self._slow:
      self._follow(tf.constant(self._c.slow_value, tf.float32))
    return metrics

  @tf.function(autograph=False)
  def _follow(self, share):
    """The target network goes a share of the way to the value model."""
    pairs = zip(self._slow.weights, self.value.weights, strict=True)
    for slow, fast in pairs:
      slow.assign(slow + share * (fast - slow))

  def losses(self, post, seeds):
    actor_loss, imag, metrics = self.actor_loss(post, seeds)
    value_loss, value_metrics = self.value_loss(**imag)
    losses = dict(actor=actor_loss, value=value_loss)
    return losses, {**metrics, **value_metrics}

  def returns(self, feat, reward, pcont):
    """V_lambda of Eq. 6 and the value model's v, [H-1, N] each.

        index    0      1     ...   H-2    H-1
        reward  r_1    r_2    ...  r_{H-1}  -
        pcont   g_1    g_2    ...  g_{H-1}  -
        value   v_1    v_2    ...  v_{H-1}  v_H     v_H is the bootstrap
        return  V_1    V_2    ...  V_{H-1}  -

    With `--slow_value` the values in Eq. 6 are those of the target network.
    """
    value = self.value(feat).mean()
    target = self._slow(feat).mean() if self._slow else value
    returns = tools.lambda_return(  # Eq. 6
      reward[:-1],
      target[:-1],
      pcont[:-1],
      bootstrap=target[-1],
      lambda_=self._c.disclam,
      axis=0,
      unroll=self._world.dynamics.unroll,
    )
    return returns, value[:-1]

  def value_loss(self, value, returns, weights):
    """Objective of the value model (Eq. 8), up to a constant.

        value   v_1  v_2 ... v_{H-1}      as computed in `actor_loss`
        target  V_1  V_2 ... V_{H-1}      `returns`, no gradient
        weight   1   g_1 ...              as in `actor_loss`

    The log-probability of a Gaussian of unit variance is -1/2 (v - V)^2. The
    gradient is by the value model's weights; its features are given.
    """
    like = tfd.Normal(value, 1.0).log_prob(returns)
    loss = -tf.reduce_mean(weights * like)  # Eq. 8
    metrics = dict(value_loss=loss, imag_value=tf.reduce_mean(value))
    return loss, metrics
