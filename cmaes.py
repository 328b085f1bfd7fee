"""CMA-ES whose whole state is one array (`--behavior evolution`).

The arithmetic is that of the package `cma` (Hansen, 2016, "The CMA Evolution
Strategy: A Tutorial"). What of its object matters for the next generation is
written as numbers and read back, so that nothing is unpickled; the random
numbers of a generation follow from the seed and its number. No TensorFlow.

Letters in shapes: P population, n weights.
"""

import warnings

import numpy as np

FULL = 500  # weights; above, the covariance is diagonal: n numbers, not n^2


class Search:
  """Looks for the weights of the largest fitness, by generations.

  Args:
    size: n.
    population: P.
    std: standard deviation of each weight in the first generation.
    seed: int; a state that is restored brings its own.
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

    # Said of a path that is long along one weight, which it then bounds.
    warnings.filterwarnings('ignore', message=r'elements of z2\[k\]')
    mean = np.asarray(mean, np.float64)
    self._es = cma.CMAEvolutionStrategy(mean, self._std, self.options())

  def _normal(self, *shape):
    """Noise of this generation."""
    stream = [self._seed, self.generation, 0, 2]  # another than training.STREAM
    return np.random.default_rng(stream).normal(size=shape)

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
    # The first is below 0: `Generations.blank` has 0 there.
    counters = [-1.0 - self._seed, es.countiter, es.sigma, 0.0, 0.0]
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
    mark, es.countiter, es.sigma, *updates = map(float, parts['counters'])
    if mark < 0:  # older code had 1 there
      self._seed = int(-1 - mark)
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


class Generations:
  """The generations of a search, whose controllers may have episodes.

  Args:
    search: `Search`.
    population: P.
    episodes: how many of each controller count in a generation, the first
      that it begins.

  Attributes:
    search: as given.
    population: weights of the controllers of this generation, float64 [P, n];
      None before `load`.
  """

  def __init__(self, search, population, episodes):
    self.search, self._count = search, episodes
    self._length = search.length + 2 * population
    self.population = None
    self._candidates = None  # of each environment its controller, or -1

  def blank(self):
    """The `state` that a new search begins from."""
    return np.zeros(self._length)

  def load(self, state, mean):
    """Goes on from a `state`, or begins around `mean` [n] if that is blank."""
    search, rest = np.split(np.array(state), [self.search.length])
    self._returns, self._episodes = np.split(rest, 2)
    if search[0]:
      self.search.restore(search)
    else:
      self.search.begin(mean)
    self._ask()

  def state(self):
    """What asks for the same population again, with its returns so far."""
    return np.concatenate([self._before, self._returns, self._episodes])

  def end(self, fitness):
    """Ends a generation whose controllers have a fitness [P]."""
    self.search.tell(self.population, fitness)
    self._returns[:] = self._episodes[:] = 0
    self._ask()

  def _ask(self):
    self._before = self.search.state()
    self.population = self.search.ask()

  def begin_episodes(self, reset):
    """Gives each environment whose episode begins a controller.

    It is the one with the fewest episodes, those under way counted. Where all
    have theirs, the episode does not count: the generation may end before it,
    and episodes that count because they are short would be the bad ones.

    Args:
      reset: bool [E].

    Returns:
      {index of an environment: weights [n]}.
    """
    if self._candidates is None:
      self._candidates = np.full(len(reset), -1)
    self._candidates[reset] = -1
    acting = {}
    for index in np.flatnonzero(reset):
      counts = self._episodes.copy()
      np.add.at(counts, self._candidates[self._candidates >= 0], 1)
      candidate = counts.argmin()
      if counts[candidate] < self._count:
        self._candidates[index] = candidate
      else:
        candidate = index % len(counts)
      acting[index] = self.population[candidate]
    return acting

  def end_episode(self, index, score):
    """Takes the return of the episode that environment `index` ended.

    Returns:
      Mean return of each controller [P] if that ended the generation, or None.
    """
    if self._candidates[index] < 0:
      return None  # it belongs to no generation
    candidate, self._candidates[index] = self._candidates[index], -1
    self._returns[candidate] += score
    self._episodes[candidate] += 1
    if self._episodes.min() < self._count:
      return None
    fitness = self._returns / self._episodes
    self.end(fitness)
    self._candidates[:] = -1  # nor does what is under way
    return fitness
