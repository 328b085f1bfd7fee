"""Ways to choose actions (`--behavior`), each a class.

Each owns its networks, acts on model states, and has the losses of its networks
on states that the world model imagines. configs.BEHAVIORS names them.

Letters in shapes: B batch, T time, H horizon, N = B * T starts of imagination,
A action, E environments, F feature, P population, n weights of a controller.
"""

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import distribute
import evolution
import models
import tools


class Behavior:
  """A way to choose actions; without networks of its own.

  Args:
    config: from `commandline.parse_flags`, actions resolved.
    world: `dreamer.WorldModel`.
    actions: A.
    choices: of discrete actions, how many of the A belong to each; else None.

  Attributes:
    networks: {name in checkpoints and of its optimizer: Keras layer}.
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

  def before_update(self, waits):
    """Not compiled; `waits` says that `--actor_delay` is not over."""

  def after_update(self, metrics):
    """Not compiled; returns the metrics of the update, all of them scalars."""
    return metrics

  def before_action(self, reset):
    """In training, not compiled; `reset` [E]: where an episode begins."""

  def hear(self, index, episode):
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
      k: tf.reshape(tf.stop_gradient(v), [-1, v.shape[-1]])
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
      if c.pcont:
        pcont = self._world.pcont(feat).mean()
        reward *= tf.math.cumprod(pcont, 1, exclusive=True)
      return tf.reshape(tf.reduce_sum(reward, 1), [count, c.plan_candidates])

    plan = tools.cross_entropy_method(
      score,
      [count, c.plan_horizon, self._actions],
      c.plan_candidates,
      c.plan_best,
      c.plan_iterations,
      seeds[0],
    )
    return plan[:, 0]


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
      state, _ = carry
      dist = self.actor(tf.stop_gradient(dynamics.get_feat(state)))
      action = dist.sample(seed=seeds[0])  # Eq. 3
      return dynamics.img_step(state, action, seeds[1]), self._entropy(
        dist, action
      )

    states, entropy = tools.static_scan(
      step,
      tf.reshape(seeds, [self._c.horizon, 2, 2]),
      (start, tf.zeros_like(start['stoch'][:, 0])),
      unroll=dynamics.unroll,
    )
    return dynamics.get_feat(states), entropy

  def _entropy(self, dist, action):
    """Of the action model in nats [N], by one sample where there is no form."""
    if self._c.action_dist == 'onehot' and self._c.actor_entropy:
      return dist.entropy()
    logprob = dist.log_prob(action)
    return -(logprob if self._c.actor_entropy else tf.stop_gradient(logprob))

  def actor_loss(self, post, seeds):
    """Objective of the action model, negated (Eq. 7).

        start   s_0   a posterior state of the batch, not part of imag_feat
        index    0      1     ...   H-2    H-1
        state   s_1    s_2    ...  s_{H-1} s_H      imag_feat [H, N, F]
        reward  r_1    r_2    ...  r_{H-1}  -       of the state it is at
        value   v_1    v_2    ...  v_{H-1}  v_H     v_H is the bootstrap
        pcont   g_1    g_2    ...  g_{H-1}  -
        return  V_1    V_2    ...  V_{H-1}  -       [H-1, N]
        weight   1     g_1    ... g_1..g_{H-2}      chance to get there

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
    chance = pcont / self._c.discount if self._c.pcont else 1.0
    chance *= tf.ones_like(reward)
    zeros = tf.zeros_like(reward)
    returns = tools.lambda_return(reward, zeros, chance, None, 1.0, 0)  # Eq. 4
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

  def before_update(self, waits):
    if self._slow and not self._follows.numpy():
      self._follow(tf.constant(1.0))
      self._follows.assign(True)

  def after_update(self, metrics):
    if self._slow:
      self._follow(tf.constant(self._c.slow_value, tf.float32))
    return metrics

  @tf.function(autograph=False)
  def _follow(self, share):
    """The slow copy goes a share of the way to the value model."""
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

    With `--slow_value` the values in Eq. 6 are those of the slow copy.
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


class Evolution(Behavior):
  """A linear controller by CMA-ES: World Models (Ha and Schmidhuber, 2018).

      a = tanh(W [z, h] + b)        z `stoch`, h `deter`; one-hot where actions
                                    are discrete: the largest number of each

  Its weights are the mean of a search distribution. A generation:

      search --ask--> population [P, n] --> returns [P] --tell--> search: W, b

      --evolve imagination   An update is a generation. Each controller starts
                             at the same posterior states, with the same noise;
                             its return is V_R (Eq. 4), mean over the starts.
      --evolve environment   Each episode of training is of one controller; its
                             return is the mean over `--evolve_episodes`.

  The search lives in NumPy; its array is a variable (`state`), written when a
  generation ends and, with the returns so far, when an episode does. What
  resumes asks for the same population again.
  """

  learned = ()  # CMA-ES needs no gradient

  def __init__(self, config, world, actions, choices=None):
    super().__init__(config, world, actions, choices)
    self.controller = models.Output(
      actions, kernel_initializer='zeros', name='controller'
    )
    self.networks = dict(controller=self.controller)
    self._acting = None  # weights [E, n] of the controllers of this moment

  def build(self, feat):
    c, population = self._c, self._c.evolve_population
    state = self._world.dynamics.initial(1)
    self._features = self._inputs(state).shape[-1]
    self.controller.build([1, self._features])
    size = (self._features + 1) * self._actions
    search = evolution.Search(size, population, c.evolve_std, c.seed)
    self._generations = evolution.Generations(
      search, population, c.evolve_episodes
    )
    self._saved = tf.Variable(self._generations.blank(), trainable=False)
    self.state = dict(search=self._saved)
    self._waits = tf.Variable(False, trainable=False)
    self.population = tf.Variable(
      tf.zeros([population, size]), trainable=False, name='population'
    )

  # Acting

  def act(self, latent, seed, training):
    inputs = self._inputs(latent)
    acting = self._acting if training else None
    if acting is not None and acting.shape[0] == inputs.shape[0]:
      return self._control(acting, inputs[:, None])[:, 0]
    return self._action(self.controller(inputs))

  def _inputs(self, state):
    """What a controller sees of states: [..., F]."""
    if self._c.controller_inputs == 'z':
      return state['stoch']
    return self._world.dynamics.get_feat(state)

  def _action(self, outputs):
    """Actions of linear outputs [..., A]."""
    if self._choices:
      return tools.FactoredOneHotDist(outputs, self._choices).mode()
    return tf.tanh(outputs)

  def _control(self, weights, inputs):
    """Actions [P, N, A] of controllers [P, n] for inputs [P, N, F]."""
    size = self._features * self._actions
    kernel = tf.reshape(weights[:, :size], [-1, self._features, self._actions])
    return self._action(tf.matmul(inputs, kernel) + weights[:, None, size:])

  # Imagination

  def losses(self, post, seeds):
    if self._c.evolve == 'environment':
      return {}, {}
    fitness = tf.cond(
      self._waits,
      lambda: tf.zeros(self.population.shape[:1]),
      lambda: self.fitness(post, self.population, seeds[: self._c.horizon]),
    )
    return {}, dict(fitness=fitness)

  def fitness(self, post, population, seeds):
    """Returns of controllers in imagination.

        start   s_0   a posterior state of the batch
        state   s_1    s_2   ...   s_H       each controller's own
        reward  r_1    r_2   ...   r_H       of the state it is at
        chance   1     g_1   ...  g_1..g_{H-1}, to get there: pcont / discount
        noise   e_1    e_2   ...   e_H       the same for all controllers

    Args:
      post: posterior states {...: [B, T, ...]}.
      population: weights of the controllers, [P, n].
      seeds: int32 [H, 2].

    Returns:
      V_R (Eq. 4), mean over the starts, [P].
    """
    c, dynamics, world = self._c, self._world.dynamics, self._world
    starts = self.starts(post, tf.bitwise.invert(seeds[0]))
    count, size = starts['stoch'].shape
    people = population.shape[0]

    def each(tensor):  # [P * N, ...] as [P, N, ...]
      return tf.reshape(tensor, [people, count, tensor.shape[-1]])

    def step(carry, seed):
      state, chance, total = carry
      action = self._control(population, each(self._inputs(state)))
      action = tf.reshape(action, [people * count, self._actions])
      state = dynamics.img_step(state, action, seed)
      noise = tf.tile(distribute.normal([count, size], seed), [people, 1])
      spread = c.temperature**0.5 * state['std']  # variance times temperature
      state = dict(state, stoch=state['mean'] + spread * noise)
      feat = dynamics.get_feat(state)
      total += chance * world.reward(feat).mean()  # Eq. 4
      if c.pcont:
        chance *= world.pcont(feat).mean() / c.discount
      return state, chance, total

    state = {k: tf.tile(v, [people, 1]) for k, v in starts.items()}
    zeros = tf.zeros([people * count])
    _, _, total = tf.foldl(step, seeds, (state, tf.ones_like(zeros), zeros))
    return tf.reduce_mean(tf.reshape(total, [people, count]), 1)

  def before_update(self, waits):
    if self._c.evolve == 'imagination':
      self._load_once()
    self._waits.assign(waits)

  def after_update(self, metrics):
    fitness = metrics.pop('fitness', None)
    if fitness is None or self._waits.numpy():
      return metrics
    fitness = fitness.numpy()
    if np.isfinite(fitness).all():  # else what is logged ends the run
      self._generations.end(fitness)
      self._begin_generation()
    return dict(
      metrics,
      imag_return=fitness.mean(),
      imag_return_best=fitness.max(),
      evolve_std=self._generations.search.std,
    )

  # Episodes

  def before_action(self, reset):
    if self._c.evolve == 'imagination' or not np.any(reset):
      return
    self._load_once()
    if self._acting is None:
      shape = [len(reset), self.population.shape[1]]
      self._acting = tf.Variable(tf.zeros(shape), trainable=False)
    acting = self._acting.numpy()
    chosen = self._generations.begin_episodes(np.asarray(reset))
    for index, weights in chosen.items():
      acting[index] = weights
    self._acting.assign(acting)

  def hear(self, index, episode):
    if self._acting is None:
      return {}
    score = float(np.sum(episode['reward'], dtype=float))
    fitness = self._generations.end_episode(index, score)
    if fitness is None:
      self._saved.assign(self._generations.state())
      return {}
    self._begin_generation()
    return dict(
      generation=self._generations.search.generation,
      generation_return=fitness.mean(),
      generation_return_best=fitness.max(),
      evolve_std=self._generations.search.std,
    )

  # The search

  def _load_once(self):
    """Goes on from `state`, or begins at the controller's weights."""
    if self._generations.population is None:
      kernel, bias = (w.numpy() for w in self.controller.weights)
      mean = np.concatenate([kernel.ravel(), bias])
      self._generations.load(self._saved.numpy(), mean)
      self.population.assign(self._generations.population)

  def _begin_generation(self):
    """The answer so far becomes the controller, and all is saved.

    In one variable, of which a checkpoint never holds half.
    """
    mean = self._generations.search.mean
    kernel, bias = np.split(mean, [-self._actions])
    self.controller.weights[0].assign(kernel.reshape([-1, self._actions]))
    self.controller.weights[1].assign(bias)
    self.population.assign(self._generations.population)
    self._saved.assign(self._generations.state())
