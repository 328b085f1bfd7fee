"""Dreamer: learning behaviors by latent imagination (Hafner et al., 2020).

    python dreamer.py --logdir ./logdir/walker --task dmc_walker_walk

Symbols of the paper and their names here:

  s_t   model state            `post`, `prior`: {mean, std, stoch, deter}
  o_t   image                  `data['image']`, `obs['image']`
  a_t   action                 `action`
  r_t   reward                 `reward`
  gamma discount               `config.discount`, per state `pcont`
  lambda                       `config.disclam`
  beta  KL scale               `config.kl_scale`
  H     imagination horizon    `config.horizon`
  p_theta(s_t|s_t-1,a_t-1,o_t) `self._dynamics.obs_step` and `self._encode`
  q_theta(s_t|s_t-1,a_t-1)     `self._dynamics.img_step`
  q_theta(o_t|s_t)             `self._decode`
  q_theta(r_t|s_t)             `self._reward`
  q_phi(a_t|s_t)               `self._actor`
  v_psi(s_t)                   `self._value`

Letters in shapes: B batch, T time, H horizon, A action, E environments, F
feature. Steps are environment steps; gradient steps are called updates.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import sys
import threading
import time

import numpy as np

import workers
import wrappers

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # before TensorFlow loads
with wrappers.quiet_stderr():
  import keras
  import tensorflow as tf
  from tensorflow_probability import distributions as tfd

  import configs
  import distribute
  import models
  import tools
  from configs import define_config as define_config

VIDEO = 1000  # images of an evaluation that are logged, at most

# Bad input: one clear message, exit code 2.
ERRORS = (*(tools.UserError, wrappers.RenderError, wrappers.WorkerError),)


# --- The agent --------------------------------------------------------------


def preprocess(obs, config):
  """Images from uint8 to [-0.5, 0.5] and rewards as the model sees them."""
  obs = {k: tf.convert_to_tensor(v) for k, v in obs.items()}
  obs['image'] = tf.cast(obs['image'], tf.float32) / 255.0 - 0.5
  if 'reward' in obs:
    clip = dict(none=lambda x: x, tanh=tf.tanh)[config.clip_rewards]
    obs['reward'] = clip(tf.cast(obs['reward'], tf.float32))
  return obs


class Dreamer(tf.Module):
  """The agent: acts, and learns by Algorithm 1.

  Args:
    config: from `define_config`.
    datadir: folder of training episodes; they exist before the first update.
    actspace: a `gym.spaces.Box` of shape [A] within [-1, 1], or of one-hot
      vectors, a `spaces.OneHotBox`.
    logger: `tools.Logger`, or None.
    stop: `tools.StopSignal`, or None.
    team: `distribute.Team`, or None for one device.
  """

  def __init__(
    self, config, datadir, actspace, logger=None, stop=None, team=None
  ):
    super().__init__()
    configs.resolve_actions(config, actspace)
    self._c = config
    self._datadir = datadir
    self._logger = logger
    self._stop = stop or tools.StopSignal()
    self._team = team or distribute.Team()
    self._actions = actspace.shape[0]
    self._choices = getattr(actspace, 'choices', None)  # of discrete actions
    self._random = tf.random.Generator.from_seed(self._team.seed(config.seed))
    counter = functools.partial(tf.Variable, dtype=tf.int64, trainable=False)
    self._step = counter(0)  # environment steps
    self._pending = counter(0)  # updates that are due
    with self._team.scope():
      self._updates = counter(0)  # seeds the noise of updates
    self._should_train = tools.Every(config.train_every)
    self._should_pretrain = tools.Once()
    self._should_log = tools.Every(config.log_every)
    self._metrics = {}
    self._timer = tools.Stopwatch()
    self._last_log = None
    self._dataset = None
    self._lock = threading.RLock()  # held while counters and metrics change
    self._learner = concurrent.futures.ThreadPoolExecutor(1, 'learner')
    self._learning = None  # future of the updates under way
    self._halted = False
    self.after_update = lambda: None  # called between updates
    jit = dict(auto=bool(tf.config.list_physical_devices('GPU')))
    jit = jit.get(config.jit, config.jit == 'True')
    self._compile(jit)
    with self._team.scope():
      self._build_model()

  def _compile(self, jit):
    """Makes graphs of what is called often, and XLA programs with `jit`.

    XLA cannot compile what replicas exchange, so with several of them it
    compiles the parts between: there the mean KL is known only by computing
    it before, and images of other replicas are not known at all.
    """
    spread = self._team.replicas > 1
    self.policy = tf.function(self.policy, jit_compile=jit)
    self.train = tf.function(self.train, jit_compile=jit and not spread)
    self._divergence = None
    if not (jit and spread):
      return
    compiled = functools.partial(tf.function, jit_compile=True)
    self._behavior_gradients = compiled(self._behavior_gradients)
    if self._c.representation != 'contrastive' or self._c.contrast != 'batch':
      self._divergence = compiled(lambda data: self._model_terms(data)[1])
      self._model_gradients = compiled(self._model_gradients)

  @property
  def step(self):
    """Environment steps so far."""
    return int(self._step.numpy())

  @step.setter
  def step(self, value):
    self._step.assign(value)

  @property
  def updates(self):
    """Updates so far."""
    return int(self._updates.numpy())

  @property
  def seconds_per_update(self):
    """Mean seconds of an update, None before the third."""
    return self._timer.mean if self._timer.count >= 3 else None

  def trackable(self):
    """What a checkpoint holds, by name."""
    names = ['_step', '_updates', '_pending', '_random']
    names += ['_should_train', '_should_pretrain', '_should_log']
    objects = {name.strip('_'): getattr(self, name) for name in names}
    for name in self._networks:  # Keras layers hide those in lists
      objects[name.strip('_')] = list(getattr(self, name).weights)
    for name, opt in self._opts.items():
      objects[f'{name}_opt'] = opt.optimizer
    return objects

  def receive(self):
    """Takes weights, optimizers and schedules from the chief's process."""
    objects = dict(self.trackable())
    del objects['random']  # each explores with noise of its own
    variables = []
    for item in objects.values():
      if isinstance(item, tf.Variable):
        variables.append(item)
      else:  # a list, a module or an optimizer
        variables += getattr(item, 'variables', item)
    self._team.broadcast(variables)
    if not self._team.chief:
      seed = self._team.seed(self._c.seed + self.step)
      self._random.reset_from_seed(seed)

  def _build_model(self):
    c, units = self._c, self._c.num_units
    self._encode = models.ConvEncoder(c.cnn_depth, c.cnn_act, name='encoder')
    self._dynamics = models.RSSM(
      c.stoch_size, c.deter_size, c.deter_size, c.dense_act, name='dynamics'
    )
    head = functools.partial(models.DenseDecoder, (), units=units)
    self._networks = ['_encode', '_dynamics', '_reward']
    if c.representation == 'reconstruction':
      self._decode = models.ConvDecoder(c.cnn_depth, c.cnn_act, name='decoder')
      self._networks.insert(2, '_decode')
    self._reward = head(c.reward_layers, act=c.dense_act, name='reward')
    if c.representation == 'contrastive':
      size = c.stoch_size + c.deter_size
      self._state = models.StateModel(size, units, c.dense_act, name='state')
      self._networks.append('_state')
    if c.pcont:
      self._pcont = head(
        c.pcont_layers, dist='binary', act=c.dense_act, name='pcont'
      )
      self._networks.append('_pcont')
    model = list(self._networks)
    if c.behavior != 'planning':
      self._actor = models.ActionDecoder(
        self._actions,
        c.actor_layers,
        units,
        c.action_dist,
        c.dense_act,
        init_std=c.action_init_std,
        choices=self._choices,
        name='actor',
      )
      self._networks.append('_actor')
    if c.behavior == 'actor_critic':
      self._value = head(c.value_layers, act=c.dense_act, name='value')
      self._networks.append('_value')
    self._create_variables()
    adam = functools.partial(
      tools.Adam,
      clip=c.grad_clip,
      wd=c.weight_decay,
      wdpattern=c.weight_decay_pattern,
      eps=c.opt_eps,
      loss_scaling=keras.config.dtype_policy().compute_dtype == 'float16',
    )
    self._opts = {}
    for name, networks in (
      *(('model', model), ('actor', ['_actor']), ('value', ['_value'])),
    ):
      if set(networks) <= set(self._networks):
        modules = [getattr(self, n) for n in networks]
        self._opts[name] = adam(name, modules, c[f'{name}_lr'])

  def _create_variables(self):
    """Runs every network once, on zeros."""
    embed = self._encode(dict(image=tf.zeros([1, 1, 64, 64, 3])))
    action = tf.zeros([1, self._actions])
    post, _ = self._dynamics.obs_step(
      self._dynamics.initial(1), action, embed[:, 0]
    )
    feat = self._dynamics.get_feat(post)
    for name in self._networks:
      if name not in ('_encode', '_dynamics'):
        getattr(self, name)(embed[:, 0] if name == '_state' else feat)

  def count_parameters(self):
    """Number of parameters of the optimizers, by name."""
    return {
      name: sum(int(np.prod(v.shape)) for v in opt.variables)
      for name, opt in self._opts.items()
    }

  # Acting

  def __call__(self, obs, reset, state=None, training=True):
    """Learns if that is due, then acts.

    Args:
      obs: dictionary of arrays [E, ...], `image` uint8 among them.
      reset: bool [E], true where an episode begins.
      state: what the last call returned; None at the first.
      training: explore, count steps and learn; else only act.

    Returns:
      Actions [E, A] and the new state.
    """
    if training:
      self._learn_if_due()
    else:
      self._check_stop()
    if state is None:
      batch = len(reset)
      state = self._dynamics.initial(batch), tf.zeros([batch, self._actions])
    action, state = self.policy(
      dict(image=obs['image']), reset, state, self._noise(training), training
    )
    if training:
      agents = len(reset) * self._team.workers  # all collect as many
      self._step.assign_add(agents * self._c.action_repeat)
    return action.numpy(), state

  def policy(self, obs, reset, state, noise, training):
    """One action for each environment (Algorithm 1, interaction).

    Args:
      obs: {image: uint8 [E, 64, 64, 3]}.
      reset: bool [E].
      state: (model state {...: [E, ...]}, last action [E, A]).
      noise: float scalar, exploration amount.
      training: sample the action (or `--collect_action mode`), else mode.

    Returns:
      Action [E, A] and the new state.
    """
    keep = tf.cast(tf.logical_not(reset), tf.float32)[:, None]
    latent, action = tf.nest.map_structure(lambda x: x * keep, state)
    seeds = tools.make_seeds(3, self._random)
    embed = self._encode(preprocess(obs, self._c))
    latent, _ = self._dynamics.obs_step(latent, action, embed, seeds[0])
    action = self._act(latent, seeds[1], training)
    action = self._explore(action, noise, seeds[2])
    return action, (latent, action)

  def _act(self, latent, seed, training):
    """Actions [E, A] for model states, before exploration."""
    if self._c.behavior == 'planning':
      return self._plan(latent, seed)
    dist = self._actor(self._dynamics.get_feat(latent))
    if training and self._c.collect_action == 'sample':
      return dist.sample(seed=seed)
    if self._c.action_dist == 'onehot':
      return dist.mode()
    return dist.mode(seed=seed)

  def _plan(self, latent, seed):
    """The first action of a plan by imagined rewards, as PlaNet acts.

    Args:
      latent: model states {...: [E, ...]}.
      seed: int32 [2].

    Returns:
      Actions [E, A] in [-1, 1].
    """
    c = self._c
    count = latent['deter'].shape[0]
    starts = {k: tf.repeat(v, c.plan_candidates, 0) for k, v in latent.items()}
    seeds = tf.random.experimental.stateless_split(seed, c.plan_horizon + 1)

    def score(actions):
      actions = tf.reshape(actions, [-1, c.plan_horizon, self._actions])
      states = self._dynamics.imagine(actions, starts, seeds[1:])
      feat = self._dynamics.get_feat(states)
      reward = self._reward(feat).mean()
      if c.pcont:
        chance = tf.math.cumprod(self._pcont(feat).mean(), 1, exclusive=True)
        reward *= chance
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

  def _noise(self, training):
    """Exploration amount at this step, a float32 number."""
    c = self._c
    amount = c.expl_amount if training else c.eval_noise
    if training and c.expl_decay:
      amount = max(c.expl_min, amount * 0.5 ** (self.step / c.expl_decay))
    elif training and c.expl_ramp:
      passed = min(1.0, self.updates / c.expl_ramp)
      amount += passed * (c.expl_min - amount)
    return np.float32(amount)

  def _explore(self, action, noise, seed):
    """Adds exploration noise to actions [E, A]."""
    normal = tf.random.stateless_normal(tf.shape(action), seed)
    if self._c.expl == 'additive_gaussian':
      return tf.clip_by_value(action + noise * normal, -1.0, 1.0)
    uniform = tf.random.stateless_uniform(tf.shape(action), seed)
    if self._choices:  # of each, the largest number is a fair draw
      parts = tf.split(uniform, self._choices, -1)
      parts = [tf.one_hot(tf.argmax(x, -1), x.shape[-1]) for x in parts]
      random = tf.concat(parts, -1)
    else:
      random = 2.0 * uniform - 1.0
    if self._c.expl == 'completely_random':
      return tf.where(noise > 0, random, action)
    chance = tf.random.stateless_uniform(
      tf.shape(action)[:1], tf.bitwise.invert(seed)
    )
    return tf.where(chance[:, None] < noise, random, action)

  # Learning

  def _learn_if_due(self):
    """Begins the updates that are due by the number of steps.

    Acting goes on meanwhile until more are due (section 3: "interleaved or in
    parallel"), so the number of updates for each step is the same. The first
    updates are waited for, and with `--deterministic True` all.
    """
    self._check_stop()
    due, step = 0, self.step
    if self._team.workers > 1:  # which do not end at the same step
      step = min(step, self._c.steps)
    with self._lock:  # a checkpoint holds both the schedule and what is due
      while self._should_train(step):
        pretrain = self._should_pretrain()
        due += self._c.pretrain if pretrain else self._c.train_steps
      self._pending.assign_add(due)
    if due or not self._learning:
      self.catch_up()
      count = int(self._pending.numpy())
      if self._c.deterministic or not self._timer.count:
        self._make_updates(count)
      elif count:
        self._learning = self._learner.submit(self._make_updates, count)
    if self._should_log(self.step):
      self._write_summaries()

  def _check_stop(self):
    """Raises if the run is to end; several processes do so in updates only."""
    if self._team.workers == 1:
      self._stop.check()

  def _make_updates(self, count):
    for _ in range(count):
      if self._team.any(self._stop.requested):
        raise tools.Stopped
      if self._halted:
        return
      self._update()
      with self._lock:
        self._pending.assign_sub(1)
        self.after_update()

  def catch_up(self):
    """Waits for the updates under way; raises what they raised."""
    learning, self._learning = self._learning, None
    if learning:
      learning.result()

  def halt(self):
    """Ends learning, after the update under way."""
    self._halted = True
    self._learner.shutdown()

  def _update(self):
    """Draws a batch and makes one update; checks that it is finite."""
    if self._dataset is None:
      dataset = load_dataset(
        self._datadir,
        self._c,
        self.updates,
        self._actions,
        source=True,
        part=(self._team.index, self._team.workers),
      )
      place = self._team.place
      self._dataset = ((batch.pop('source'), place(batch)) for batch in dataset)
      if not self._c.deterministic:
        self._dataset = tools.prefetch(self._dataset)
    first = self._timer.count == 0
    self._set_learning_rates()
    source, batch = next(self._dataset)
    with self._timer(), self._team.errors():
      if first and self._team.workers == 1:
        with self._stop.immediate():  # tracing can take a minute
          metrics = self.train(batch)
      else:
        metrics = self.train(batch)
      metrics = {k: float(v) for k, v in metrics.items()}
    self._updates.assign_add(1)
    for name, value in metrics.items():
      scaled = name.endswith('_norm') and f'{name[:5]}_skipped' in metrics
      if not np.isfinite(value) and not scaled:
        path = self._write_suspects(metrics, source)
        raise tools.NonFiniteError(
          f'{name} became {value} in update {self.updates}; its batch is '
          f'listed in {path}'
        )
    with self._lock:
      for name, value in metrics.items():
        if np.isfinite(value):
          self._metrics.setdefault(name, []).append(value)
    if self._logger:
      self._logger.progress(self.step, self.updates)
      if first:
        self._logger.say('First update done.')

  def _write_suspects(self, metrics, source):
    """Writes which windows were in a batch, beside the replay."""
    part = '' if self._team.chief else f'-worker{self._team.index}'
    path = self._datadir.parent / f'nonfinite-{self.updates}{part}.json'
    windows = np.asarray(source).tolist()
    metrics = {k: str(v) for k, v in metrics.items()}
    with tools.atomic_write(path) as file:
      record = dict(update=self.updates, metrics=metrics, windows=windows)
      file.write((json.dumps(record, indent=2) + '\n').encode())
    return path

  def _set_learning_rates(self):
    """As the flags say, which a resumed run may change."""
    for name, opt in self._opts.items():
      waits = name == 'actor' and self.updates < self._c.actor_delay
      opt.set_learning_rate(0.0 if waits else self._c[f'{name}_lr'])

  def train(self, data):
    """One update of all parameters (Algorithm 1, learning).

    All losses are computed before any variable moves.

    Args:
      data: batch of `load_dataset`: image uint8 [B, T, 64, 64, 3], action
        [B, T, A], reward [B, T], discount [B, T]; as `Team.place` gives it.

    Returns:
      Metrics, a dictionary of float32 scalars.
    """
    return self._team.run(self._train_replica, data)

  def _train_replica(self, data):
    """As `train`, with the rows of the batch that this replica has."""
    data, div = preprocess(data, self._c), None
    if self._divergence:
      div = tools.mean_over_replicas(self._divergence(data))
    grads, post, metrics = self._model_gradients(data, div)
    if 'actor' in self._opts:
      behavior_grads, behavior_metrics = self._behavior_gradients(post)
      grads.update(behavior_grads)
      metrics.update(behavior_metrics)
    grads = tools.sum_over_replicas(grads)
    metrics = tools.mean_over_replicas(metrics)
    for name, opt in self._opts.items():
      metrics.update(opt.apply(grads[name]))
    return metrics

  def _model_gradients(self, data, div=None):
    """Gradients of the world model, by name, posterior and metrics."""
    opt = self._opts['model']
    with watch(opt.variables) as tape:
      loss, post, metrics = self._model_loss(data, div)
    return dict(model=opt.gradient(tape, loss)), post, metrics

  def _behavior_gradients(self, post):
    """Gradients of action and value model, by name, and metrics."""
    actor, value = self._opts['actor'], self._opts.get('value')
    with watch(value.variables if value else []) as value_tape:
      with watch(actor.variables) as actor_tape:
        actor_loss, imag, metrics = self._actor_loss(post)
      if value:
        value_loss, value_metrics = self._value_loss(**imag)
        metrics.update(value_metrics)
    grads = dict(actor=actor.gradient(actor_tape, actor_loss))
    if value:
      grads['value'] = value.gradient(value_tape, value_loss)
    return grads, metrics

  def _model_loss(self, data, div=None):
    """Objective J_REC of Eq. 10, or J_NCE of Eq. 12, negated.

        action[t], image[t], reward[t] are one row: image and reward came
        after the action.

        image     o_0    o_1    o_2   ...        row 0: the reset, with zero
        action    a_0 -> a_1 -> a_2 -> ...              action and reward
        state     s_0 -> s_1 -> s_2 -> ...       s_t sees a_0..a_t, o_0..o_t
        predicts o_0,r_0 o_1,r_1 o_2,r_2

    Args:
      data: preprocessed batch, [B, T, ...].
      div: the mean KL of all replicas in nats, a scalar, where it is known.

    Returns:
      Loss, posterior states {...: [B, T, ...]}, metrics.
    """
    likes, own_div, post, metrics = self._model_terms(data)
    # The value of the whole batch, the gradient of the part that is here.
    div = tools.mean_over_replicas(own_div) if div is None else div
    div = own_div + tf.stop_gradient(div - own_div)
    clipped = tf.maximum(div, self._c.free_nats)
    loss = self._c.kl_scale * clipped - sum(likes.values())  # Eq. 10, 12
    metrics.update({f'{k}_loss': -v for k, v in likes.items()})
    metrics.update(model_loss=loss, div=div)
    return loss, post, metrics

  def _model_terms(self, data):
    """Terms of `_model_loss`, means over the batch that is here.

    Returns:
      {name: scalar} of J_O or J_S, of J_R and of discounts; J_D in nats, a
      scalar; posterior states {...: [B, T, ...]}; metrics.
    """
    seeds = self._seeds(data['action'].shape[1], 0)
    embed = self._encode(data)
    post, prior = self._dynamics.observe(embed, data['action'], seed=seeds)
    feat = self._dynamics.get_feat(post)
    likes = self._image_term(feat, embed, data)
    likes['reward'] = self._reward(feat).log_prob(data['reward'])  # J_R
    if self._c.pcont:  # soft labels 0 and gamma (Appendix A)
      target = self._c.discount * data['discount']
      like = self._pcont(feat).log_prob(target)
      likes['pcont'] = self._c.pcont_scale * like
    likes = {k: tf.reduce_mean(v) for k, v in likes.items()}
    prior_dist = self._dynamics.get_dist(prior)
    post_dist = self._dynamics.get_dist(post)
    div = tf.reduce_mean(post_dist.kl_divergence(prior_dist))  # J_D of Eq. 10
    metrics = dict(
      prior_ent=tf.reduce_mean(prior_dist.entropy()),
      post_ent=tf.reduce_mean(post_dist.entropy()),
    )
    return likes, div, post, metrics

  def _seeds(self, count, stream):
    """Seeds int32 [count, 2] by the number of this update.

    Stream 0 is for the posterior, 1 for imagination. All replicas draw alike.
    """
    seed = tf.stack([self._c.seed, 2 * self._updates + stream])
    return tf.random.stateless_uniform([count, 2], seed, None, None, tf.int32)

  def _image_term(self, feat, embed, data):
    """What states should say of images, as `--representation` chooses.

    Args:
      feat: features of the posterior, [B, T, F].
      embed: embedded images, [B, T, E].
      data: preprocessed batch.

    Returns:
      {name: [B, T] or scalar}, empty where rewards alone are to be explained.
    """
    if self._c.representation == 'reconstruction':
      return dict(image=self._decode(feat).log_prob(data['image']))  # J_O
    if self._c.representation == 'contrastive':
      flat = [tf.reshape(x, [-1, x.shape[-1]]) for x in (feat, embed)]
      gaussian = self._state(flat[1])
      mask, first = self._negatives(*feat.shape[:2]), 0
      if mask is None:
        gaussian = [tools.gather(x) for x in gaussian]
        first = tools.replica()[0] * len(flat[0])
      like = tools.contrast(flat[0], *gaussian, mask, first)
      return dict(state=like)  # J_S, Eq. 12
    return {}

  def _negatives(self, batch, length):
    """Which images each state is held against: bool [B*T, B*T], or None."""
    if self._c.contrast == 'batch':
      return None
    sequence, time = np.divmod(np.arange(batch * length), length)
    mask = sequence[:, None] == sequence
    if self._c.contrast == 'window':
      mask &= abs(time[:, None] - time) <= self._c.contrast_window
    return mask

  def _imagine(self, post):
    """Imagined features [H, N, F] from posterior states (section 3).

    Starts at every state of the batch, N = B * T (with `pcont` without the
    last of each sequence, which may be terminal). The start is not part of
    the result. Also returns the actions' log-probabilities [H, N].
    """
    if self._c.pcont:
      post = {k: v[:, :-1] for k, v in post.items()}
    start = {
      k: tf.reshape(tf.stop_gradient(v), [-1, v.shape[-1]])
      for k, v in post.items()
    }
    seeds = self._seeds(2 * self._c.horizon, 1)

    def step(carry, seeds):
      state, _ = carry
      dist = self._actor(tf.stop_gradient(self._dynamics.get_feat(state)))
      action = dist.sample(seed=seeds[0])  # Eq. 3
      logprob = tf.stop_gradient(dist.log_prob(action))
      return self._dynamics.img_step(state, action, seeds[1]), logprob

    states, logprob = tools.static_scan(
      step,
      tf.reshape(seeds, [self._c.horizon, 2, 2]),
      (start, tf.zeros_like(start['stoch'][:, 0])),
    )
    return self._dynamics.get_feat(states), logprob

  def _actor_loss(self, post):
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

    Returns:
      Loss, what `_value_loss` takes, metrics.
    """
    imag_feat, logprob = self._imagine(post)
    reward = self._reward(imag_feat).mean()
    if self._c.pcont:
      pcont = self._pcont(imag_feat).mean()
    else:
      pcont = self._c.discount * tf.ones_like(reward)
    returns, value = self._returns(imag_feat, reward, pcont)
    weights = tf.concat([tf.ones_like(pcont[:1]), pcont], 0)[: len(returns)]
    weights = tf.stop_gradient(tf.math.cumprod(weights, 0))
    loss = -tf.reduce_mean(weights * returns)  # Eq. 7
    metrics = dict(
      actor_loss=loss,
      action_ent=-tf.reduce_mean(logprob),
      imag_reward=tf.reduce_mean(reward),
      imag_return=tf.reduce_mean(returns),
    )
    imag = dict(returns=tf.stop_gradient(returns), weights=weights)
    return loss, dict(imag, value=value), metrics

  def _returns(self, feat, reward, pcont):
    """Value estimates of imagined states, as `--behavior` chooses.

    Args:
      feat: imagined features [H, N, F].
      reward, pcont: of these states, [H, N].

    Returns:
      V_lambda and the value model's v [H-1, N]; or V_R [H, N] and None.
    """
    if self._c.behavior == 'actor':  # V_R, Eq. 4; it stops where episodes do
      chance = pcont / self._c.discount if self._c.pcont else 1.0
      chance *= tf.ones_like(reward)
      zeros = tf.zeros_like(reward)
      return tools.lambda_return(reward, zeros, chance, None, 1.0, 0), None
    value = self._value(feat).mean()
    returns = tools.lambda_return(  # Eq. 6
      reward[:-1],
      value[:-1],
      pcont[:-1],
      bootstrap=value[-1],
      lambda_=self._c.disclam,
      axis=0,
    )
    return returns, value[:-1]

  def _value_loss(self, value, returns, weights):
    """Objective of the value model (Eq. 8), up to a constant.

        value   v_1  v_2 ... v_{H-1}      as computed in `_actor_loss`
        target  V_1  V_2 ... V_{H-1}      `returns`, no gradient
        weight   1   g_1 ...              as in `_actor_loss`

    The log-probability of a Gaussian of unit variance is -1/2 (v - V)^2. The
    gradient is by the value model's weights; its features are given.
    """
    like = tfd.Normal(value, 1.0).log_prob(returns)
    loss = -tf.reduce_mean(weights * like)  # Eq. 8
    metrics = dict(value_loss=loss, imag_value=tf.reduce_mean(value))
    return loss, metrics

  # Logging

  def unlogged(self, metrics=None):
    """Metrics since the last log entry: {name: [values]}; or sets them."""
    with self._lock:
      if metrics is not None:
        self._metrics = metrics
      return {k: list(v) for k, v in self._metrics.items()}

  def finish(self):
    """Logs what came since the last log entry."""
    if self._metrics:
      self._write_summaries(images=False)

  def _write_summaries(self, images=True):
    now, step = time.time(), self.step
    with self._lock:
      metrics = {k: np.mean(v) for k, v in self._metrics.items()}
      self._metrics.clear()
    metrics = metrics if self._c.log_scalars else {}
    if self._last_log:
      metrics['fps'] = (step - self._last_log[1]) / (now - self._last_log[0])
    self._last_log = (now, step)
    if not self._logger:
      return
    self._logger.scalars(step, dict(metrics, updates=self.updates))
    if images and self._c.log_images and self._team.chief:
      batch = next(load_dataset(self._datadir, self._c, self.updates))
      batch = {k: v[:6] for k, v in batch.items()}
      if '_decode' in self._networks:
        video = self.open_loop(batch).numpy()
        self._logger.video(step, 'agent/openl', video)
      else:
        curves = [x.numpy() for x in self.open_loop_rewards(batch)]
        picture = tools.plot_rewards(*curves)
        self._logger.video(step, 'agent/openl_reward', picture[None, None])
    self._logger.flush()

  @tf.function
  def open_loop(self, data):
    """Prediction as in Figure 5: 5 images of context, then imagination.

    Args:
      data: batch of `load_dataset`, [B, T, ...].

    Returns:
      Video in [0, 1], float32 [B, T, 3 * 64, 64, 3]: truth, model, error.
    """
    data = preprocess(data, self._c)
    model = self._decode(self._predict(data)).mean() + 0.5
    truth = data['image'] + 0.5
    error = (model - truth + 1.0) / 2.0
    return tf.concat([truth, model, error], 2)

  @tf.function
  def open_loop_rewards(self, data):
    """As `open_loop`, where there is no decoder: true and predicted rewards.

    Args:
      data: batch of `load_dataset`, [B, T, ...].

    Returns:
      Two float32 [B, T], as the model sees rewards.
    """
    data = preprocess(data, self._c)
    return data['reward'], self._reward(self._predict(data)).mean()

  def _predict(self, data):
    """Features [B, T, F] from 5 images of context and the actions alone."""
    context = min(5, data['action'].shape[1] - 1)
    embed = self._encode(dict(image=data['image'][:, :context]))
    action = data['action']
    post, _ = self._dynamics.observe(embed, action[:, :context])
    last = {k: v[:, -1] for k, v in post.items()}
    prior = self._dynamics.imagine(action[:, context:], last)
    return tf.concat([self._dynamics.get_feat(x) for x in (post, prior)], 1)


def watch(variables):
  """A gradient tape on these variables alone."""
  tape = tf.GradientTape(watch_accessed_variables=False)

  class Watching:
    def __enter__(self):
      entered = tape.__enter__()
      for variable in variables:
        entered.watch(variable.value)
      return entered

    def __exit__(self, *args):
      return tape.__exit__(*args)

  return Watching()


# --- Data -------------------------------------------------------------------


def count_steps(datadir, config, folders=1):
  """Environment steps in the episodes of a folder, times as many folders."""
  return tools.count_episodes(datadir)[1] * config.action_repeat * folders


def load_dataset(
  directory, config, start=0, actions=None, source=False, part=(0, 1)
):
  """Yields batches of windows for ever: numpy arrays [B, T, ...].

  Images stay uint8; they become floats on the device, in the compiled step.

  Args:
    directory: folder of episodes.
    config: `batch_size` B, `batch_length` T, `dataset_balance`, `seed`,
      `replay_capacity`.
    start: index of the first batch; batch number n is the same however often
      the run was interrupted, as long as the episodes are.
    actions: A, if episodes with other actions are to be set aside.
    source: say where the windows are from, as `source`, strings [B].
    part: (index, number) of processes, each of which draws its share of B.
  """
  share = config.batch_size // part[1]
  capacity = -(-config.replay_capacity // config.action_repeat)
  windows = tools.load_episodes(
    directory,
    rescan=share,
    length=config.batch_length,
    balance=config.dataset_balance,
    seed=config.seed,
    stream=part[0],
    capacity=capacity,
    start=start,
    shapes=actions and dict(image=(64, 64, 3), action=(actions,)),
  )
  while True:
    batch = [next(windows) for _ in range(share)]
    data = {'image': np.stack([x['image'] for x in batch])}
    for key in ('action', 'reward', 'discount'):
      data[key] = np.stack([x[key] for x in batch]).astype(np.float32)
    if source:
      data['source'] = np.array([x['source'] for x in batch])
    yield data


def summarize_episode(episode, config, datadir, logger, prefix, folders=1):
  """Logs a finished episode; `prefix` is train or test."""
  episodes = tools.count_episodes(datadir)[0] * folders
  steps = count_steps(datadir, config, folders)
  length = (len(episode['reward']) - 1) * config.action_repeat
  score = float(episode['reward'].astype(np.float64).sum())
  name = dict(train='Episode', test='Evaluation')[prefix]
  logger.say(f'{name}: return {score:.1f} in {length} steps, at step {steps}.')
  metrics = {f'{prefix}/return': score, f'{prefix}/length': length}
  logger.scalars(steps, dict(metrics, episodes=episodes))
  if prefix == 'test' and config.log_images:
    logger.video(steps, 'test/policy', episode['image'][None, :VIDEO])


def make_env(
  config, index=0, prefix='train', callbacks=(), lost=None, log=None
):
  """Environment number `index` in its worker, recording episodes.

  Each has random streams of its own, from (seed, index) and the number of the
  episode; those of evaluations (`prefix` test) differ from those of training.
  `lost` is called with the error of a worker that had to be replaced; what
  workers print goes to `log`, from `workers.open_log`.
  """
  stream = [config.seed, index, int(prefix == 'test')]
  seed = int(np.random.SeedSequence(stream).generate_state(1)[0] >> 1)
  make = functools.partial(
    wrappers.make_task,
    config.task,
    config.action_repeat,
    config.time_limit,
    seed,
    prefix == 'test',
    config.env_args,
  )
  env = wrappers.Async(
    make,
    config.parallel,
    config.worker_timeout,
    config.start_timeout,
    log,
    f'{prefix} {index}',
  )
  tolerant = config.env_errors == 'drop'
  return wrappers.Collect(env, list(callbacks), lost=lost, tolerant=tolerant)


def random_agent(actspace, seed, number=0):
  """A policy that draws actions uniformly, as `simulate` takes it.

  Args:
    actspace: action space of the environments.
    seed: int; with the number of an episode it seeds that episode's actions.
    number: of the first episode.
  """
  rng = None

  def act(obs, reset, state=None):
    nonlocal number, rng
    if np.any(reset):
      rng = np.random.default_rng([seed, number])
      number += int(np.sum(reset))
    if getattr(actspace, 'discrete', False):
      size = (len(reset), len(actspace.choices))
      return actspace.encode(rng.integers(actspace.choices, size=size)), None
    size = (len(reset), *actspace.shape)
    return rng.uniform(-1, 1, size).astype(np.float32), None

  return act


# --- The run ----------------------------------------------------------------


def setup_precision(precision):
  """Sets the Keras dtype policy; returns its name."""
  if precision == 'auto':
    if tf.config.list_physical_devices('GPU'):
      precision = '16'
    else:
      precision = 'bfloat16' if _has_bfloat16() else '32'
  policy = {
    '16': 'mixed_float16',
    'bfloat16': 'mixed_bfloat16',
    '32': 'float32',
  }[precision]
  keras.config.set_dtype_policy(policy)
  return policy


def _has_bfloat16():
  """Whether this CPU multiplies bfloat16 in hardware."""
  try:
    flags = pathlib.Path('/proc/cpuinfo').read_text().split()
  except OSError:
    return False
  return 'avx512_bf16' in flags or 'amx_bf16' in flags


def setup_logdir(config, team=None):
  """Makes the logdir or checks that this run may resume there.

  Of several processes the chief does this, and the others only make the folder
  of their episodes, which may be the same.

  Returns:
    A `tools.Lock` on it.

  Raises:
    UserError: it cannot be written, another run is using it, it holds
      something else, or a run whose weights or replay have another shape.
  """
  logdir, team = config.logdir, team or distribute.Team()
  try:
    logdir.mkdir(parents=True, exist_ok=True)
    probe = logdir / f'writable{team.suffix}'
    with tools.atomic_write(probe) as file:
      file.write(b'')
    probe.unlink()
  except OSError as error:
    raise tools.UserError(
      f'cannot write to --logdir {logdir}: {error.strerror}'
    ) from None
  if team.chief:
    changes = configs.check_logdir(config)
    lock = tools.Lock(logdir)
    configs.write_config(config)
    if changes:
      print(f'Resuming with other flags: {", ".join(changes)}.', flush=True)
  else:
    lock = tools.Lock(logdir, f'lock{team.suffix}')
  for folder in (logdir, logdir / 'episodes'):
    folder.mkdir(exist_ok=True)
    if team.chief:
      tools.sweep(folder)
  return lock


def prefill_dataset(config, envs, logger, stop, team):
  """Fills the replay with episodes of random actions, to `--prefill` steps."""
  datadir = config.logdir / 'episodes'
  done = team.from_chief(count_steps(datadir, config, team.folders))
  missing = -(-(config.prefill - done) // team.workers)
  if missing <= 0:
    if not tools.count_episodes(datadir)[0]:
      raise tools.UserError(
        f'--prefill {config.prefill} with no episodes in {datadir}: learning '
        f'needs episodes, of --batch_length {config.batch_length} rows at '
        'least; choose --prefill 1 or more'
      )
    return
  logger.say(f'Prefill: {missing} environment steps of random actions.')
  episodes, _ = tools.count_episodes(datadir)
  seed = team.seed(config.seed)
  act = random_agent(envs[0].action_space, seed, episodes)

  def checked(*args):
    stop.check()
    return act(*args)

  tools.simulate(checked, envs, steps=-(-missing // config.action_repeat))


class _ShortEpisodes:
  """Says once, after the prefill, that episodes are too short to learn from."""

  def __init__(self, config, datadir, logger):
    self._config, self._datadir, self._logger = config, datadir, logger
    self._said = False

  def __call__(self, episode):
    """To be called after an episode was stored."""
    least = self._config.batch_length
    if self._said or count_steps(self._datadir, self._config) < (
      self._config.prefill
    ):
      return
    rows = [tools.episode_length(p) for p in self._datadir.glob('*.npz')]
    short = sum(n < least for n in rows)
    if 0 < short < len(rows):
      self._said = True
      self._logger.say(
        f'Warning: {short} of {len(rows)} episodes have fewer rows than '
        f'--batch_length {least}. These, and others so short, are not learned '
        'from; a smaller --batch_length may be given when the run resumes.'
      )


class _Estimate:
  """Says once, without a GPU and at release sizes, what a run takes here."""

  def __init__(self, agent, config, logger):
    self._agent, self._config, self._logger = agent, config, logger
    large = config.batch_size * config.batch_length >= 1000
    self._wanted = large and not tf.config.list_physical_devices('GPU')

  def __call__(self):
    seconds = self._agent.seconds_per_update
    if not self._wanted or seconds is None:
      return
    self._wanted = False
    c = self._config
    hours = seconds * c.train_steps * 1e5 / c.train_every / 3600
    self._logger.say(
      f'An update takes {seconds:.1f} s here, so 1e5 environment steps take '
      f'about {hours:.0f} hours of updates. --preset cpu (in a new logdir) has '
      'smaller networks and batches, for machines without a GPU.'
    )


def setup_devices(config):
  """What TensorFlow must know before it computes anything; returns the team."""
  if config.deterministic:
    tf.config.experimental.enable_op_determinism()
  if config.gpu_growth:
    for gpu in tf.config.list_physical_devices('GPU'):
      tf.config.experimental.set_memory_growth(gpu, True)
  team = distribute.make_team(config.strategy, config.batch_size)
  team.check_flags(config)
  return team


def run(config):
  """Trains, from an empty logdir or from where the last run stopped."""
  team = setup_devices(config)
  with team.chief_first():
    lock = setup_logdir(config, team)
  team.compare_folders(config.logdir)
  if team.folders > 1:
    tools.sweep(config.logdir / 'episodes')
  stop = tools.StopSignal()
  stop.install()
  datadir = config.logdir / 'episodes'
  step = count_steps(datadir, config, team.folders)
  logger = tools.Logger(config.logdir, config.steps, step, team.index)
  losses = _Losses(config, datadir, logger, team)
  output = workers.open_log(config.logdir / f'workers{team.suffix}.log')
  make = functools.partial(make_env, config, lost=losses, log=output)
  envs = []
  try:
    summarize = functools.partial(
      summarize_episode,
      config=config,
      datadir=datadir,
      logger=logger,
      folders=team.folders,
    )
    store = [
      lambda episode: tools.save_episodes(datadir, [episode]),
      functools.partial(summarize, prefix='train'),
      _ShortEpisodes(config, datadir, logger),
    ]
    first = team.index * config.envs
    envs += [make(first + i, 'train', store) for i in range(config.envs)]
    if team.chief:
      report = functools.partial(summarize, prefix='test')
      envs.append(make(0, 'test', [report]))
    test_env = envs[-1] if team.chief else None
    _train(config, datadir, envs[: config.envs], test_env, logger, stop, team)
  finally:
    for env in envs:
      env.close()
    output.close()
    logger.close()
    lock.release()


class _Losses:
  """Reports environments that were replaced, and counts them.

  Their workers died or hung, or they raised an error.
  """

  def __init__(self, config, datadir, logger, team):
    self._config, self._datadir, self._logger = config, datadir, logger
    self._folders = team.folders
    self._count = 0

  def __call__(self, error):
    self._count += 1
    if isinstance(error, wrappers.WorkerLost):
      text = str(error)
    else:
      text = f'The environment failed: {error}\n{error.traceback.rstrip()}'
    self._logger.say(
      f'Warning: {text}\nIts episode is dropped; a fresh worker takes over.'
    )
    step = count_steps(self._datadir, self._config, self._folders)
    self._logger.scalars(step, {'env_restarts': self._count})


def _train(config, datadir, train_envs, test_env, logger, stop, team):
  """The loop of Algorithm 1: collect, learn, evaluate, save.

  Of several processes only the chief evaluates and saves; the updates are made
  together, in which the others wait for it.
  """
  keras.utils.set_random_seed(config.seed)
  policy = setup_precision(config.precision)
  configs.resolve_actions(config, train_envs[0].action_space)
  if team.chief:
    configs.write_config(config)
    _announce(config, policy, logger)
    for line in train_envs[0].about:
      logger.say(line)
  logger.say(f'Training on {team}.')
  shapes = dict(image=(64, 64, 3), action=train_envs[0].action_space.shape)
  tools.Replay(datadir, shapes=shapes).check()
  _number_episodes(train_envs, datadir)
  prefill_dataset(config, train_envs, logger, stop, team)
  with stop.immediate():
    space = train_envs[0].action_space
    agent = Dreamer(config, datadir, space, logger, stop, team)
    for name, count in agent.count_parameters().items():
      logger.say(f'Found {count} {name} parameters.')
    progress = _Progress(config, agent, datadir, logger, team)
    progress.resume()
    _number_episodes(train_envs, datadir)
  made = agent.updates
  estimate = _Estimate(agent, config, logger)
  agent.after_update = lambda: (estimate(), progress.save_if_due())
  try:
    state = None
    while agent.step < config.steps:
      progress.evaluate_if_due(test_env)
      wanted = dict(episodes=1)
      if not progress.exact:
        steps = min(config.eval_every, config.steps - agent.step)
        share = config.action_repeat * team.workers
        wanted = dict(steps=-(-steps // share))
      state = tools.simulate(agent, train_envs, state=state, **wanted)
      agent.catch_up()
      progress.save()
    progress.evaluate_if_due(test_env)
    if progress.exact:
      progress.save()  # a longer run goes on as if it had not ended here
    agent.finish()
    if not progress.exact:
      progress.save()
    logger.say(_ending(agent, made))
    team.wait()  # to leave together
  except tools.Stopped:
    agent.halt()
    line = f'Stopped at step {agent.step}, {agent.updates} updates; '
    if progress.exact:
      line += 'what came after the last whole episode will be made again; '
    else:
      agent.finish()
      progress.save()
    logger.say(f'{line}saved to {config.logdir}. The same command resumes.')
  except distribute.PeerLost:
    progress.save()
    raise
  finally:
    agent.halt()


def _ending(agent, before):
  """What a run says when it has finished.

  Args:
    agent: as it is at the end.
    before: updates that it had at the start.
  """
  line = f'Finished at step {agent.step}, {agent.updates} updates.'
  if not agent.updates:
    return (
      f'{line} Nothing was learned, as the replay already holds --steps. To '
      f'learn from it, give --steps more than {agent.step}, and --pretrain the '
      'number of updates to begin with.'
    )
  if agent.updates == before:
    line += ' Nothing was left to do; a larger --steps goes on.'
  return line


def _number_episodes(envs, datadir):
  """Episode n starts alike, however often a run was interrupted before it."""
  for env in envs:
    env.number(tools.count_episodes(datadir)[0])


class _Progress:
  """What a run has done: its checkpoints, and the evaluations made.

  A run is exact with --deterministic and one environment: then checkpoints are
  made between episodes only, and a resumed run takes away what came after its
  checkpoint, in replay and metrics.jsonl, to make it again.
  """

  def __init__(self, config, agent, datadir, logger, team):
    self._config, self._agent, self._team = config, agent, team
    self._datadir, self._logger = datadir, logger
    alone = config.envs == team.workers == 1
    self.exact = config.deterministic and alone
    self._evaluations = 0
    self._should_eval = tools.Every(config.eval_every)
    self._state = tools.RunState(self._collect)
    self._checkpoints = tools.Checkpoints(
      config.logdir / 'checkpoints',
      should_eval=self._should_eval,
      run=self._state,
      **agent.trackable(),
    )
    self._saved = time.time()

  def _collect(self):
    return dict(
      exact=self.exact,
      evaluations=self._evaluations,
      episodes=tools.count_episodes(self._datadir)[0],
      metrics_size=self._logger.size(),
      metrics=self._agent.unlogged(),
    )

  def save(self):
    if self._team.chief:
      self._checkpoints.save(self._agent.updates)
    self._saved = time.time()

  def save_if_due(self):
    if self.exact:
      return
    if time.time() > self._saved + 60 * self._config.save_every:
      self.save()

  def evaluate_if_due(self, env):
    """One episode without learning, exploration noise or stored rows."""
    if not self._team.chief:
      return
    if not self._should_eval(self._agent.step):
      return
    env.number(self._evaluations)
    act = functools.partial(self._agent, training=False)
    tools.simulate(act, [env], episodes=1)
    self._evaluations += 1

  def resume(self):
    """Restores the newest checkpoint; steps are those of whole episodes."""
    restored = self._team.chief and self._checkpoints.restore(repair=True)
    agent, saved = self._agent, self._state.restored
    if self._team.chief:
      self._check_lost(restored)
    if restored and self.exact and saved['exact']:
      self._rewind(saved)
    before = agent.step
    agent.step = count_steps(self._datadir, self._config, self._team.folders)
    agent.receive()
    if not restored:
      # From now on, a run without a checkpoint is one that has lost it. And an
      # exact one can take back its first evaluation, too.
      self.save()
      return
    self._evaluations = saved['evaluations']
    if self.exact and saved['exact']:
      agent.unlogged(saved['metrics'])
    line = f'Resumed at step {agent.step}, {agent.updates} updates.'
    if agent.step < before:
      dropped = before - agent.step
      line += f' ({dropped} steps of unfinished episodes were dropped.)'
    self._logger.say(line)
    if not self.exact:
      self._logger.scalars(agent.step, dict(resumed=1, updates=agent.updates))
      if saved['exact']:
        self.save()  # or a later exact run would take back what comes now

  def _check_lost(self, restored):
    """UserError if the run has learned, and would begin anew now.

    Args:
      restored: path of the checkpoint that was restored, or None.
    """
    trace = self._checkpoints.newest_trace()
    if restored:
      number = int(restored.rpartition('-')[2])
      anew = self._agent.updates == 0 and trace > number
    else:
      anew = trace or self._logger.largest('updates')
    if anew:
      folder = self._config.logdir
      raise tools.UserError(
        f'--logdir {folder} holds a run that has learned, but no checkpoint '
        f'with its weights. Put whole files ckpt-* back into '
        f'{folder / "checkpoints"} (those ending in .broken have wrong bytes). '
        'To learn anew from its episodes, move checkpoints and metrics.jsonl '
        'out of the logdir'
      )

  def _rewind(self, saved):
    """Takes away what came after the checkpoint; it will be made again."""
    later = sorted(self._datadir.glob('*.npz'))[saved['episodes'] :]
    for path in later:
      path.unlink()
    if self._logger.size() > saved['metrics_size']:
      self._logger.rewind(saved['metrics_size'])
    if later:
      self._logger.say(f'{len(later)} episodes will be made again.')


def _announce(config, policy, logger):
  logger.say(
    f'Logdir {config.logdir}, task {config.task}, method '
    f'{configs.method_name(config)}, dtypes {policy}.'
  )
  defaults = define_config()
  changed = [
    f'{k}={v}'
    for k, v in config.items()
    if v != defaults[k] and k not in ('logdir', 'task')
  ]
  if changed:
    logger.say('Other than the defaults: ' + ', '.join(changed) + '.')


def main(argv=None):
  """Parses the command line, runs, and turns errors into exit codes.

  Returns:
    0 when finished or stopped on request, 2 for bad input, 1 for a run that
    cannot go on.
  """
  try:
    run(configs.parse_flags(argv))
    return 0
  except tools.Stopped:
    print('Stopped before the first update; the same command resumes.')
    return 0
  except ERRORS as error:
    where = ''
    if isinstance(error, wrappers.WorkerError):
      where = 'environment: '
      if error.traceback not in str(error):
        print(error.traceback, file=sys.stderr)
    print(f'dreamer.py: error: {where}{error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(
      f'dreamer.py: error: {error.filename or "logdir"}: {error.strerror}. '
      'What was saved before is intact; the same command resumes.',
      file=sys.stderr,
    )
    return 1
  except (tf.errors.ResourceExhaustedError, MemoryError) as error:
    reason = (str(error) or 'no more can be had').partition('\n')[0][:200]
    print(
      f'dreamer.py: error: out of memory ({reason}). Smaller --batch_size, '
      '--batch_length or networks need less; the last checkpoint is intact.',
      file=sys.stderr,
    )
    return 1
  except distribute.PeerLost as error:
    print(f'dreamer.py: error: {error}.', file=sys.stderr, flush=True)
    os._exit(1)  # TensorFlow would wait for the others to leave
  except tools.NonFiniteError as error:
    print(
      f'dreamer.py: error: {error}. The last checkpoint is intact.',
      file=sys.stderr,
    )
    return 1


if __name__ == '__main__':
  sys.exit(main())
