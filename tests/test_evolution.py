"""Evolution: CMA-ES as arrays, controllers in imagination and environments."""

import cma
import numpy as np
import pytest
import tensorflow as tf
from test_dreamer import make_agent, model_losses, run_here
from test_faults import everything
from test_learning import read_metrics, train_toy

import spaces
import tools
from evolution import Search

SIZE = 42  # products of so many round by the layout in memory

# --- CMA-ES -------------------------------------------------------------------


def sphere(x):
  return -np.sum((x - 1.0) ** 2)


def ellipsoid(x):
  """Its axes differ by 100, and are not those of the coordinates."""
  n = len(x)
  turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
  return -np.sum(10 ** (4 * np.arange(n) / (n - 1)) * (turn @ (x - 1)) ** 2)


def run(search, fitness, generations):
  for _ in range(generations):
    population = search.ask()
    search.tell(population, [fitness(x) for x in population])
  return search


@pytest.mark.parametrize(
  'fitness, full, generations',
  [(sphere, True, 100), (sphere, False, 100), (ellipsoid, True, 250)],
)
def test_finds_the_optimum(fitness, full, generations):
  search = Search(8, 12, 0.5, seed=1, full=full)
  search.begin(np.zeros(8))
  run(search, fitness, generations)
  np.testing.assert_allclose(search.mean, 1, atol=1e-4)
  assert search.generation == generations and search.std < 0.01


@pytest.mark.parametrize('full', [True, False])
@pytest.mark.parametrize('population', [4, 12])
def test_goes_on_from_an_array_as_if_it_had_not_ended(full, population):
  def noise(*shape):
    return np.random.default_rng([1, whole.countiter]).normal(size=shape)

  search = Search(SIZE, population, 0.5, seed=1, full=full)
  options = dict(search.options(), randn=noise)
  whole = cma.CMAEvolutionStrategy(np.zeros(SIZE), 0.5, options)
  search.begin(np.zeros(SIZE))
  straight = search
  for generation in range(60):
    if generation % 3:
      state = search.state()
      search = Search(SIZE, population, 0.5, seed=1, full=full)
      search.restore(state)
      assert state.shape == (search.length,) and state.dtype == np.float64
    people, expected = search.ask(), np.array(whole.ask())
    if straight is not search:
      np.testing.assert_array_equal(people, straight.ask())
    np.testing.assert_allclose(people, expected, rtol=1e-6, atol=1e-9)
    assert search.generation == generation == whole.countiter
    fitness = [ellipsoid(x) for x in people]
    for each in {search, straight}:
      each.tell(people, fitness)
    whole.tell(list(expected), [-f for f in fitness])
  assert search.std == pytest.approx(np.mean(whole.stds))


def test_many_weights_have_a_diagonal_covariance():
  few, many = Search(500, 8, 1.0, 0), Search(501, 8, 1.0, 0)
  assert few.shapes['covariance'] == (500, 500)
  assert 'covariance' not in many.shapes and many.length < 3000


# --- In imagination -----------------------------------------------------------

SMALL = dict(behavior='evolution', evolve_population=6, precision='32')


def controllers(agent, seed=0, scale=0.5):
  rng = np.random.default_rng(seed)
  weights = scale * rng.normal(size=agent.behavior.population.shape)
  return weights.astype(np.float32)


def one_by_one(agent, post, population, seeds):
  """Returns of controllers, each in a loop of its own over time."""
  c, world, result = agent.config, agent.world, []
  if c.pcont:
    post = {k: v[:, :-1] for k, v in post.items()}
  start = {k: tf.reshape(v, [-1, v.shape[-1]]) for k, v in post.items()}
  for weights in population:
    kernel, bias = np.split(weights, [-agent.actions])
    state, reward, chance = start, [], []
    for seed in seeds:
      sees = [state['stoch'], state['deter']][
        : len(c.controller_inputs) // 2 + 1
      ]
      outputs = np.concatenate(sees, -1) @ kernel.reshape([-1, agent.actions])
      outputs += bias
      action = np.tanh(outputs)
      if agent.action_space.__class__ is spaces.OneHotBox:
        action = np.eye(agent.actions)[outputs.argmax(-1)]
      state = world.dynamics.img_step(state, np.float32(action), seed)
      noise = (state['stoch'] - state['mean']) / state['std']
      noise = noise * np.sqrt(c.temperature)
      state['stoch'] = state['mean'] + noise * state['std']
      feat = world.dynamics.get_feat(state)
      reward.append(world.reward(feat).mean())
      if c.pcont:
        chance.append(world.pcont(feat).mean() / c.discount)
    reward = tf.stack(reward)
    returns = tools.lambda_return(
      reward, 0 * reward, tf.stack(chance) if c.pcont else 1.0, None, 1.0, 0
    )
    result.append(np.mean(returns[0]))
  return np.array(result)


@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    dict(controller_inputs='z', temperature=0.25),
    dict(pcont=True, temperature=2.0),
    dict(discrete=True),
  ],
)
def test_population_at_once_beside_one_controller_after_another(
  tmp_path, changes
):
  changes = dict(changes)
  discrete = changes.pop('discrete', False)
  agent = make_agent(tmp_path, **SMALL, **changes)
  if discrete:
    agent.action_space = spaces.OneHotBox([2])
    agent.behavior._choices = (2,)
  _, _, post = model_losses(agent)
  population = controllers(agent)
  seeds = agent.seeds(agent.config.horizon, 1)
  actual = agent.behavior.fitness(post, tf.constant(population), seeds)
  expected = one_by_one(agent, post, population, seeds)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)
  assert np.ptp(expected) > 1e-3 * np.abs(expected).max()


def test_temperature_is_a_factor_of_the_noise(tmp_path):
  agent = make_agent(tmp_path, **SMALL)
  _, _, post = model_losses(agent)
  population = tf.constant(controllers(agent))
  returns = {}
  for temperature in (0.0, 1.0):
    agent.config.temperature = temperature
    draws = [
      agent.behavior.fitness(post, population, agent.seeds(4, stream))
      for stream in (1, 2)
    ]
    returns[temperature] = np.array(draws)
  assert (returns[0.0][0] == returns[0.0][1]).all()
  assert (returns[1.0][0] != returns[1.0][1]).all()


# --- In the environment -------------------------------------------------------


def act_out(behavior, rng, episodes, envs=3):
  """Yields of each episode its weights, its return by them, and `hear`."""
  behavior.before_action(np.ones(envs, bool))
  for _ in range(episodes):
    index = rng.integers(envs)
    acted = behavior._acting.numpy()[index]
    score = sphere(acted)
    said = behavior.hear(index, dict(reward=np.array([0.5 * score] * 2)))
    yield acted, score, said
    behavior.before_action(np.arange(envs) == index)


def test_each_controller_has_its_episodes(tmp_path):
  agent = make_agent(tmp_path, **SMALL, evolve='environment', evolve_episodes=2)
  rng, said, stale = np.random.default_rng(0), [], 0
  scores, known = {}, set()
  for acted, score, end in act_out(agent.behavior, rng, 300):
    known = known or {w.tobytes() for w in agent.behavior.population.numpy()}
    if acted.tobytes() in known:
      scores.setdefault(acted.tobytes(), []).append(score)
    else:  # it began in the generation before
      stale += 1
    if not end:
      continue
    counts = [len(scores[weights]) for weights in known]
    assert min(counts) == 2 and max(counts) <= 3
    means = [np.mean(x) for x in scores.values()]
    assert end['generation_return'] == pytest.approx(np.mean(means))
    assert end['generation_return_best'] == pytest.approx(max(means))
    said.append(end)
    scores, known = {}, {w.tobytes() for w in agent.behavior.population.numpy()}
  assert [x['generation'] for x in said] == [*range(1, len(said) + 1)]
  assert len(said) > 15 and 0 < stale < 3 * len(said)
  assert said[-1]['generation_return'] > said[0]['generation_return'] + 1


def test_search_in_the_environment_goes_on_where_it_was_saved(tmp_path):
  """In the middle of a generation, with the returns so far."""
  flags = dict(SMALL, evolve='environment', evolve_episodes=2)
  first, again = (make_agent(tmp_path, **flags).behavior for _ in '12')
  rng, ends = np.random.default_rng(0), []
  list(act_out(first, rng, 17, envs=1))
  again.state['search'].assign(first.state['search'])
  for behavior in (first, again):
    list(act_out(behavior, rng, 30, envs=1))
    ends.append(behavior.state['search'].numpy())
  np.testing.assert_array_equal(*ends)
  assert ends[0][1] == 3 and ends[0][-6:].sum() == 11  # generations, episodes


# --- Whole runs ---------------------------------------------------------------

TINY = (
  *('--preset=debug', '--task=toy_reach', '--inputs=state', '--precision=32'),
  *('--behavior=evolution', '--evolve_population=4', '--evolve_episodes=2'),
  *('--parallel=none', '--deterministic=True', '--time_limit=10'),
  *('--prefill=60', '--train_every=20', '--train_steps=2', '--pretrain=2'),
)


@pytest.mark.slow
@pytest.mark.parametrize('evolve', ['imagination', 'environment'])
def test_run_goes_on_bit_for_bit(tmp_path, evolve):
  words = ['', *TINY, f'--evolve={evolve}']
  for name, parts in dict(whole=[200], parts=[100, 200]).items():
    for steps in parts:
      words[0] = f'--logdir={tmp_path / name}'
      assert run_here([*words, f'--steps={steps}']) == 0
  whole, parts = (everything(tmp_path / x) for x in ('whole', 'parts'))
  assert whole == parts
  (search,) = (v for k, v in whole[2].items() if k.startswith('search'))
  generations = np.frombuffer(search, np.float64)[1]
  assert generations == dict(imagination=14, environment=1)[evolve]


@pytest.mark.slow
def test_learns_toy_reach_in_imagination(tmp_path):
  """In half a minute: it ended at 44.5 of 47, where random earns 9."""
  flags = ('--inputs', 'state', '--behavior', 'evolution')
  train_toy(tmp_path / 'run', 'toy_reach', 3500, *flags)
  test = [
    x['test/return']
    for x in read_metrics(tmp_path / 'run')
    if 'test/return' in x
  ]
  assert test[-1] > 3 * 9
