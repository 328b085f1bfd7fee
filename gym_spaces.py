"""Spaces of Gym or Gymnasium, and what of them an agent can see."""

import dataclasses
import functools
import re
import typing

import numpy as np

import spaces
from spaces import gym


def is_kind(space, kind):
  """Whether a space is of a kind, by its name, in either library."""
  return any(c.__name__ == kind for c in type(space).__mro__)


def sizes_of(space):
  """Kind and sizes of an action space; its bounds may be others."""
  kinds = 'Discrete', 'MultiDiscrete', 'MultiBinary', 'Box'
  names = 'n', 'nvec', 'shape', 'start'
  sizes = [np.ravel(getattr(space, name, None)).tolist() for name in names]
  return [is_kind(space, kind) for kind in kinds], sizes


def flatten(space, path=()):
  """{keys: space} of all within a space; the keys lead to its part."""
  if is_kind(space, 'Dict'):
    items = space.spaces.items()
  elif is_kind(space, 'Tuple'):
    items = enumerate(space.spaces)
  else:
    return {path: space}
  parts = {}
  for key, part in items:
    parts.update(flatten(part, (*path, key)))
  return parts


@dataclasses.dataclass(frozen=True)
class Source:
  """Where an observation comes from.

  Attributes:
    path: keys that lead to its part of the environment's own observation.
    text: what it is, in words.
    layout: of an image; None for one that is rendered.
    space, convert: of a vector: what it is, and the function to it.
  """

  path: tuple | None
  text: str
  layout: spaces.Layout | None = None
  space: gym.spaces.Box | None = None
  convert: typing.Callable | None = None

  def find(self, obs):
    """Its part of an observation; ValueError if there is none."""
    part = obs
    for key in self.path:
      try:
        part = part[key]
      except (KeyError, IndexError, TypeError):
        raise ValueError(
          f'The observation has no {key!r}, which its space has: it is a '
          f'{type(part).__name__}.'
        ) from None
    return part


MOST_CHOICES = 10_000  # of a discrete observation, as each is a number
LONGEST = 60_000  # bytes of a name; the file of an episode holds a few more
# What episodes hold besides, and what `numpy.savez` takes for itself.
RESERVED = (*spaces.TRANSITION_KEYS, 'file', 'allow_pickle')


def find_vectors(parts, images, unusable):
  """{name: Source} of what is made of numbers, and in words what is not.

  Images that are `unusable`, a set of paths, are not taken for vectors.
  """
  found, others = {}, []
  taken = [source.path for source in images.values()]
  for path, space in parts.items():
    if path in taken:
      continue
    box, convert = _vector(space)
    if not box or path in unusable:
      others.append(f'{called(path)} ({_outline(space)})')
      continue
    name = _array_name(path)
    while name in found:
      name += '_'
    text = f'{called(path)} ({_outline(space)})'
    found[name] = Source(path, text, space=box, convert=convert)
  return found, others


def _array_name(path):
  """What the part of an observation is called as a flag and in a file."""
  name = '/'.join(map(str, path)).replace('\\', '/')
  name = re.sub(r'[\0-\x1f\x7f]', ' ', name)  # a name in a file ends at \0
  name = name.encode('utf8', 'replace')[:LONGEST].decode('utf8', 'ignore')
  name = re.sub(r'\.{2,}', '.', name).strip('/ ') or 'state'
  if name in RESERVED or spaces.is_image(name) or ',' in name:
    name = f'obs/{name.replace(",", "/")}'
  return name


def _vector(space):
  """The Box of a space as float32, and the function to it; (None, None)."""
  for kind, count in (('Discrete', 'n'), ('MultiDiscrete', 'nvec')):
    if is_kind(space, kind) and np.sum(getattr(space, count)) <= MOST_CHOICES:
      box = spaces.OneHotBox(getattr(space, count))
      start = np.ravel(getattr(space, 'start', 0))
      return box, functools.partial(_one_hot, box=box, start=start)
  if is_kind(space, 'Box') or is_kind(space, 'MultiBinary'):
    box = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    return box, functools.partial(_array, shape=space.shape)
  return None, None


def _one_hot(value, box, start):
  return box.encode(np.ravel(value) - start)


def _array(value, shape):
  """A float32 copy, as many an environment writes over what it gave."""
  array = np.array(value, np.float32)
  if array.shape != shape:
    raise ValueError(
      f'An observation has shape {array.shape}; its space says {shape}.'
    )
  return array


def called(path):
  name = '/'.join(map(str, path))
  return f'the observation {name!r}' if path else 'the observation'


def _outline(space):
  """Kind and size of a space, shortly."""
  if is_kind(space, 'Box'):
    return f'{space.dtype} {list(space.shape)}'
  if is_kind(space, 'Discrete'):
    return f'one of {space.n}'
  return type(space).__name__
