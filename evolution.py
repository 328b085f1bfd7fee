"""CMA-ES whose whole state is one array (`--behavior evolution`).

The arithmetic is that of the package `cma` (Hansen, 2016, "The CMA Evolution
Strategy: A Tutorial"). What of its object matters for the next generation is
written as numbers and read back, so that nothing is unpickled; the random
numbers of a generation follow from the seed and its number. No TensorFlow.

Letters in shapes: P population, n weights.
"""

import numpy as np

FULL = 500  # weights; above, the covariance is diagonal: n numbers, not n^2


class Search:
  """Looks for the weights of the largest fitness, by generations.

  Args:
    size: n.
    population: P.
    std: standard deviation of each weight in the first generation.
    seed: int.
    full: a full covariance; None: up to `FULL` weights.
  """

  def __init__(self, size, population, std, seed, full=None):
    self._size, self._population = size, population
    self._std, self._seed = std, seed
    self._full = size <= FULL if full is None else full
    self._es = None

  @property
  def generation(self):
    """Generations so far; None before `begin` and `restore`."""
    return self._es and self._es.countiter

  @property
  def mean(self):
    """Of the distribution: the answer so far, float64 [n]."""
    return self._es.mean

  @property
  def std(self):
    """Standard deviation of the distribution, mean over the weights."""
    es = self._es
    scale = es.sm.variances**0.5 * es.sigma_vec.scaling
    return float(es.sigma * np.mean(scale))

  def options(self):
    """Of `cma.CMAEvolutionStrategy`."""
    import cma  # slow to load

    return dict(
      popsize=self._population,
      randn=self._normal,
      CMA_diagonal=not self._full,
      CMA_mirrors=False,  # would look at the generation before
      AdaptSigma=cma.sigma_adaptation.CMAAdaptSigmaCSA,
      conditioncov_alleviate=None,  # would change what the weights are
      seed=np.nan,
      verbose=-9,
      verb_log=0,
    )

  def begin(self, mean):
    """The first generation will be around `mean` [n]."""
    import cma

    mean = np.asarray(mean, np.float64)
    self._es = cma.CMAEvolutionStrategy(mean, self._std, self.options())

  def _normal(self, *shape):
    """Noise of this generation."""
    return np.random.default_rng([self._seed, self.generation]).normal(
      size=shape
    )

  def ask(self):
    """The population of this generation, float64 [P, n]."""
    return np.array(self._es.ask())

  def tell(self, population, fitness):
    """Ends a generation.

    Args:
      population: what `ask` gave.
      fitness: [P], larger is better.
    """
    costs = [-float(x) for x in fitness]
    self._es.tell(list(population), costs, check_points=False)
    if self._full:  # products round by the layout: that of what is restored
      model = self._es.sm
      model.B, model.C = map(np.ascontiguousarray, (model.B, model.C))

  # The state

  @property
  def shapes(self):
    """{name: shape} of the parts of a state, in its order."""
    n = self._size
    shapes = dict(counters=(5,), mean=(n,), path=(n,), sigma_path=(n,))
    if self._full:
      return dict(shapes, axes=(n,), covariance=(n, n), eigenvectors=(n, n))
    return dict(shapes, scales=(n,))

  @property
  def length(self):
    """Of a state."""
    return sum(int(np.prod(shape)) for shape in self.shapes.values())

  def state(self):
    """What the next `ask` needs, float64 [length]; between generations."""
    es, model = self._es, self._es.sm
    counters = [1.0, es.countiter, es.sigma, 0.0, 0.0]
    parts = dict(mean=es.mean, path=es.pc, sigma_path=es.adapt_sigma.ps)
    if self._full:
      counters[3:] = model.last_update, model.count_eigen
      parts.update(axes=model.D, covariance=model.C, eigenvectors=model.B)
    else:
      parts.update(scales=es.sigma_vec.scaling * np.ones(self._size))
    parts.update(counters=np.array(counters))
    return np.concatenate([parts[name].ravel() for name in self.shapes])

  def restore(self, state):
    """Goes on from a `state`; the same search, bit for bit."""
    import cma

    parts, start = {}, 0
    for name, shape in self.shapes.items():
      end = start + int(np.prod(shape))
      parts[name] = np.array(state[start:end]).reshape(shape)
      start = end
    self.begin(parts['mean'])
    es, model = self._es, self._es.sm
    _, es.countiter, es.sigma, *updates = map(float, parts['counters'])
    es.countiter = int(es.countiter)
    es.mean_old, es.timer = es.mean, cma.utilities.utils.ElapsedWCTime()
    es.pc, es.adapt_sigma.ps = parts['path'], parts['sigma_path']
    if self._full:
      model.last_update, model.count_eigen = map(int, updates)
      model.count_tell = es.countiter
      model.D, model.C = parts['axes'], parts['covariance']
      model.B = parts['eigenvectors']
      es._updateBDfromSM(model)
    else:
      scales = cma.transformations.DiagonalDecoding(parts['scales'])
      es.sigma_vec = scales
