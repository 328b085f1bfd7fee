"""The world model: what agents learn to predict (Eq. 1, 9 to 12).

Symbols of the paper are at the top of dreamer.py.

Letters in shapes: B batch, T time, A action, F feature, D numbers
of all vectors, N images side by side.
"""

import functools
import pkgutil

import numpy as np
import tensorflow as tf

import configs
import distribute
import models
import spaces
import tools
from spaces import IMAGE_ONLY, TRANSITION_KEYS

CONTEXT = 5  # images that a prediction sees


def preprocess(obs, config, inputs=IMAGE_ONLY):
  """Observations as the model sees them.

  Args:
    obs: dictionary of tensors [..., *shape].
    config: from `define_config`.
    inputs: {name: shape} of the observations that the agent sees.

  Returns:
    Images in [-0.5, 0.5], all vectors as one, float32 `vector` [..., D], and
    action, reward and discount where they are in `obs`.
  """
  data = {k: tf.convert_to_tensor(obs[k]) for k in TRANSITION_KEYS if k in obs}
  if 'reward' in data:
    clip = dict(none=lambda x: x, tanh=tf.tanh)[config.clip_rewards]
    data['reward'] = clip(tf.cast(data['reward'], tf.float32))
  vectors = []
  for name, shape in inputs.items():
    value = tf.cast(tf.convert_to_tensor(obs[name]), tf.float32)
    if spaces.is_image(name):
      data[name] = value / 255.0 - 0.5
    else:
      batch = distribute.dims(value)[: value.shape.rank - len(shape)]
      vectors.append(tf.reshape(value, [*batch, int(np.prod(shape))]))
  if vectors:
    scale = dict(none=lambda x: x, symlog=tools.symlog)[config.vector_scale]
    data['vector'] = scale(tf.concat(vectors, -1))
  return data


class WorldModel:
  """Latent dynamics, learned from batches of the replay (Eq. 1, 9 to 12).

  Args:
    config: from `define_config`.
    actions: A.
    inputs: {name: shape} of the observations that the agent sees.

  Attributes:
    encoders: {image, or 'vector' for all vectors: Keras layer}.
    dynamics: Keras layer.
    representation: one of representations.py.
    heads: {name: Keras layer}, what is predicted from features.
    networks: {name in checkpoints: Keras layer}, all of them.
  """

  def __init__(self, config, actions, inputs=IMAGE_ONLY):
    self._c = c = config
    self.inputs = dict(inputs)
    images = [name for name in inputs if spaces.is_image(name)]
    vectors = [inputs[name] for name in inputs if name not in images]
    self._size = sum(int(np.prod(shape)) for shape in vectors)
    self.encoders = self._make_encoders(images)
    self.dynamics = models.RSSM(
      c.stoch_size, c.deter_size, c.deter_size, c.dense_act, name='dynamics'
    )
    method = configs.REPRESENTATIONS[c.representation]
    self.representation = pkgutil.resolve_name(method.path)(c, images)
    self.heads = self._make_heads()
    self.networks = dict(
      **{_encoder_name(k): v for k, v in self.encoders.items()},
      dynamics=self.dynamics,
      **self.representation.networks,
      **self.heads,
    )
    self._build(actions)

  def _make_encoders(self, images):
    c, encoders = self._c, {}
    for name in images:
      encoders[name] = models.ConvEncoder(
        c.cnn_depth, c.cnn_act, name=name.replace('image', 'encoder')
      )
    if self._size:
      encoders['vector'] = models.DenseEncoder(
        c.vector_layers, c.num_units, c.dense_act, name='encoder_vector'
      )
    return encoders

  def _make_heads(self):
    c = self._c
    head = functools.partial(
      models.DenseDecoder, units=c.num_units, act=c.dense_act
    )
    heads = dict(reward=head((), c.reward_layers, name='reward'))
    if c.pcont:
      heads['pcont'] = head((), c.pcont_layers, dist='binary', name='pcont')
    if self._size:
      size, layers = (self._size,), c.vector_layers
      heads['vector'] = head(size, layers, std=c.vector_std, name='vector')
    return heads

  @property
  def reward(self):
    """Head of rewards, q_theta(r_t|s_t)."""
    return self.heads['reward']

  @property
  def pcont(self):
    """Head of discounts, None if they are not predicted."""
    return self.heads.get('pcont')

  def continuation(self, feat):
    """Probability that the episode continues after states [..., F].

    That is pcont / discount, as the head predicts their product (Appendix A);
    1 without it.
    """
    if not self.pcont:
      return tf.ones(tf.shape(feat)[:-1])
    return self.chance(self.pcont(feat).mean())

  def chance(self, pcont):
    """Probability that an episode continues, from outputs of `pcont`.

    These estimate the product with the discount, and may exceed it.
    """
    return tf.minimum(pcont / self._c.discount, 1.0)

  @property
  def vector(self):
    """Head of vectors, q_theta(o_t|s_t); None if there are none."""
    return self.heads.get('vector')

  def embed(self, data):
    """Embeddings [..., embed] of preprocessed observations, side by side."""
    parts = [encoder(data[name]) for name, encoder in self.encoders.items()]
    if len(parts) == 1:
      return parts[0]
    return tf.concat([tf.cast(x, tf.float32) for x in parts], -1)

  def preprocess(self, obs):
    """See `preprocess`."""
    return preprocess(obs, self._c, self.inputs)

  def _build(self, actions):
    """Makes the variables: runs every network once, on zeros."""
    zeros = {k: tf.zeros([1, *shape]) for k, shape in self.inputs.items()}
    embed = self.embed(self.preprocess(zeros))
    start, action = self.dynamics.initial(1), tf.zeros([1, actions])
    post, _ = self.dynamics.obs_step(start, action, embed)
    self.example = self.dynamics.get_feat(post)
    self.representation.build(self.example, embed)
    for head in self.heads.values():
      head(self.example)

  def losses(self, data, seeds):
    """Objective J_REC of Eq. 10, or J_NCE of Eq. 12, negated.

        action[t], image[t], reward[t] are one row: image and reward came
        after the action.

        image     o_0    o_1    o_2   ...        row 0: the reset, with zero
        action    a_0 -> a_1 -> a_2 -> ...              action and reward
        state     s_0 -> s_1 -> s_2 -> ...       s_t sees a_0..a_t, o_0..o_t
        predicts o_0,r_0 o_1,r_1 o_2,r_2

    Args:
      data: preprocessed batch, [B, T, ...].
      seeds: int32 [T, 2].

    Returns:
      {'model': scalar}, metrics, posterior states {...: [B, T, ...]}.
    """
    c = self._c
    embed = self.embed(data)
    post, prior = self.dynamics.observe(embed, data['action'], seed=seeds)
    feat = self.dynamics.get_feat(post)
    # Another stream than those of the states.
    likes = self.representation.likes(feat, embed, data, seeds[0] + 1)
    like = self.reward(feat).log_prob(data['reward'])  # J_R
    likes['reward'] = c.reward_scale * like
    if self.pcont:  # soft labels 0 and gamma (Appendix A)
      like = self.pcont(feat).log_prob(c.discount * data['discount'])
      likes['pcont'] = c.pcont_scale * like
    if self.vector:  # J_O, too
      likes['vector'] = self.vector(feat).log_prob(data['vector'])
    likes = {k: tf.reduce_mean(v) for k, v in likes.items()}
    div, cost = self.divergence(post, prior)
    prior_dist = self.dynamics.get_dist(prior)
    post_dist = self.dynamics.get_dist(post)
    metrics = dict(
      prior_ent=tf.reduce_mean(prior_dist.entropy()),
      post_ent=tf.reduce_mean(post_dist.entropy()),
      div=div,
      **{f'{k}_loss': -v for k, v in likes.items()},
    )
    # Eq. 10, or Eq. 12 with J_S among the terms.
    loss = c.kl_scale * cost - sum(likes.values())
    return dict(model=loss), dict(metrics, model_loss=loss), post

  def divergence(self, post, prior):
    """KL divergence of posterior from prior, in nats, for J_D of Eq. 10.

    Args:
      post, prior: states {...: [B, T, ...]}.

    Returns:
      (KL for the log, loss), scalars. The loss is max(KL, free nats); with
      `--kl_balance` b it is b times that with gradients to the prior alone,
      plus 1 - b times that with gradients to the posterior alone (Hafner et
      al., 2021, Algorithm 2).
    """
    balance, free = self._c.kl_balance, self._c.free_nats

    def nats(post, prior):
      post, prior = map(self.dynamics.get_dist, (post, prior))
      return distribute.global_mean(tf.reduce_mean(post.kl_divergence(prior)))

    div = nats(post, prior)
    if not balance:
      return div, tf.maximum(div, free)
    fixed_post, fixed_prior = (
      {k: tf.stop_gradient(v) for k, v in state.items()}
      for state in (post, prior)
    )
    of_prior = tf.maximum(nats(fixed_post, prior), free)
    of_post = tf.maximum(nats(post, fixed_prior), free)
    return div, balance * of_prior + (1.0 - balance) * of_post

  @tf.function(autograph=False)
  def open_loop(self, data):
    """Prediction as in Figure 5: 5 images of context, then imagination.

    Args:
      data: batch of `load_dataset`, [B, T, ...].

    Returns:
      Video, about in [0, 1] (not clipped), float32 [B, T, 3 * 64, N * 64, 3]:
      truth, model, error of N images side by side.
    """
    data, columns = self.preprocess(data), []
    feat = self._predict(data)
    for name, decoder in self.representation.decoders.items():
      model, truth = decoder(feat).mean() + 0.5, data[name] + 0.5
      error = (model - truth + 1.0) / 2.0
      columns.append(tf.concat([truth, model, error], 2))
    return tf.concat(columns, 3)

  @tf.function(autograph=False)
  def open_loop_curves(self, data):
    """As `open_loop`, of numbers: true and predicted rewards and vectors.

    Args:
      data: batch of `load_dataset`, [B, T, ...].

    Returns:
      {'reward': two float32 [B, T], 'vector', if there is one: two [B, T, D]},
      as the model sees them.
    """
    data = self.preprocess(data)
    feat = self._predict(data)
    heads = {k: self.heads[k] for k in ('reward', 'vector') if k in self.heads}
    return {k: (data[k], head(feat).mean()) for k, head in heads.items()}

  @staticmethod
  def context(length):
    """Steps with observations in a prediction of `length` steps."""
    return min(CONTEXT, length - 1)

  def _predict(self, data):
    """Features [B, T, F] from 5 steps of context and the actions alone."""
    context = self.context(data['action'].shape[1])
    embed = self.embed({k: data[k][:, :context] for k in self.encoders})
    action = data['action']
    post, _ = self.dynamics.observe(embed, action[:, :context])
    last = {k: v[:, -1] for k, v in post.items()}
    prior = self.dynamics.imagine(action[:, context:], last)
    return tf.concat([self.dynamics.get_feat(x) for x in (post, prior)], 1)


def _encoder_name(name):
  """Of an encoder in checkpoints: encode, encode_2, ..., encode_vector."""
  if spaces.is_image(name):
    return name.replace('image', 'encode')
  return f'encode_{name}'
