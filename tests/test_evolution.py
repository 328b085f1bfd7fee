"""Evolution: CMA-ES as arrays, controllers in imagination and environments."""

import cma
import numpy as np
import pytest

from evolution import Search

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
def test_goes_on_from_an_array_as_the_library_without_interruption(full):
  search = Search(8, 12, 0.5, seed=1, full=full)
  search.begin(np.zeros(8))

  def noise(*shape):
    return np.random.default_rng([1, whole.countiter]).normal(size=shape)

  options = dict(search.options(), randn=noise)
  whole = cma.CMAEvolutionStrategy(np.zeros(8), 0.5, options)
  for generation in range(60):
    state = search.state()
    search = Search(8, 12, 0.5, seed=1, full=full)
    search.restore(state)
    assert state.shape == (search.length,) and state.dtype == np.float64
    population, expected = search.ask(), np.array(whole.ask())
    np.testing.assert_array_equal(population, expected)
    assert search.generation == generation == whole.countiter
    fitness = [ellipsoid(x) for x in population]
    search.tell(population, fitness)
    whole.tell(list(expected), [-f for f in fitness])
  assert search.std == pytest.approx(np.mean(whole.stds))


def test_many_weights_have_a_diagonal_covariance():
  few, many = Search(500, 8, 1.0, 0), Search(501, 8, 1.0, 0)
  assert few.shapes['covariance'] == (500, 500)
  assert 'covariance' not in many.shapes and many.length < 3000
