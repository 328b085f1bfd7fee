"""Linear controllers by evolution (`--behavior evolution`), as World Models.

Letters in shapes: B batch, T time, H horizon, N starts of imagination, A
action, E environments, F feature, P population, n weights of a controller.
"""

import numpy as np
import tensorflow as tf

import behaviors
import cmaes
import distribute
import models
import tools


class Evolution(behaviors.Behavior):
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
    search = cmaes.Search(size, population, c.evolve_std, c.seed)
    self._generations = cmaes.Generations(search, population, c.evolve_episodes)
    self._saved = tf.Variable(self._generations.blank(), trainable=False)
    self.state = dict(search=self._saved)
    self._delayed = tf.Variable(False, trainable=False)
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
      self._delayed,
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
    members = population.shape[0]

    def each(tensor):  # [P * N, ...] as [P, N, ...]
      return tf.reshape(tensor, [members, count, tensor.shape[-1]])

    def step(carry, seed):
      state, chance, total = carry
      action = self._control(population, each(self._inputs(state)))
      action = tf.reshape(action, [members * count, self._actions])
      state = dynamics.img_step(state, action, seed)
      noise = tf.tile(distribute.normal([count, size], seed), [members, 1])
      spread = c.temperature**0.5 * state['std']  # variance times temperature
      state = dict(state, stoch=state['mean'] + spread * noise)
      feat = dynamics.get_feat(state)
      total += chance * world.reward(feat).mean()  # Eq. 4
      return state, chance * world.continuation(feat), total

    state = {k: tf.tile(v, [members, 1]) for k, v in starts.items()}
    zeros = tf.zeros([members * count])
    _, _, total = tf.foldl(step, seeds, (state, tf.ones_like(zeros), zeros))
    return tf.reduce_mean(tf.reshape(total, [members, count]), 1)

  def before_update(self, delayed):
    if self._c.evolve == 'imagination':
      self._load_once()
    self._delayed.assign(delayed)

  def after_update(self, metrics):
    fitness = metrics.pop('fitness', None)
    if fitness is None or self._delayed.numpy():
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

  def after_episode(self, index, episode):
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
    """The answer so far becomes the controller, and the search is saved.

    The search is in one variable, of which a checkpoint never holds half.
    """
    mean = self._generations.search.mean
    kernel, bias = np.split(mean, [-self._actions])
    self.controller.weights[0].assign(kernel.reshape([-1, self._actions]))
    self.controller.weights[1].assign(bias)
    self.population.assign(self._generations.population)
    self._saved.assign(self._generations.state())
