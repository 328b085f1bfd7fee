"""Observations and actions, as environments have them and as the agent does.

The agent sees images, uint8 [64, 64, 3], and vectors, and acts in [-1, 1]^A, or
by one-hot vectors side by side. Environments show images in many layouts, and
take actions from boxes of any bounds and type, or from several sets of choices.
"""

import dataclasses
import re
import types
import typing

import numpy as np
import PIL.Image

from cli import nearest, quiet_stderr
from worker_calls import TaskError

with quiet_stderr():
  import gym.spaces

# --- Observations -----------------------------------------------------------

IMAGE_SHAPE = (64, 64, 3)  # as the agent sees them
IMAGE_ONLY = types.MappingProxyType(dict(image=IMAGE_SHAPE))  # default inputs
TRANSITION_KEYS = ('action', 'reward', 'discount')  # what is no observation


def is_image(name):
  """Whether an observation is an image: image, image_2, image_3, ..."""
  return re.fullmatch(r'image(_\d+)?', name) is not None


def dtype(name):
  """What an observation of this name is stored as."""
  return np.uint8 if is_image(name) else np.float32


def odd_images(inputs):
  """Names of the images of {name: shape} that no agent can see."""
  return [k for k, v in inputs.items() if is_image(k) and v != IMAGE_SHAPE]


def image_name(index):
  """Name of an environment's image number `index`, from 0."""
  return f'image_{index + 1}' if index else 'image'


def names_image(inputs):
  """Whether `--inputs`, a text, asks for an image."""
  return any(map(is_image, inputs.split(',')))


class Offer(typing.NamedTuple):
  """An observation that an environment can show: its space, and in words."""

  space: gym.spaces.Box
  text: str


class View:
  """What is shown of all that an environment has to show.

  Args:
    task: its name, for errors.
    offers: {name: Offer}.
    inputs: what the agent sees, names with commas between them; `state` stands
      for all that are no images.
    record: what is shown besides, to be stored, likewise; may be empty.
    others: in words what there is besides, but cannot be shown.

  Attributes:
    names: what is shown, a list: images first, and both by their names.
    about: in words what the agent sees, and what not, a list of sentences.

  Raises:
    TaskError: there is no such observation, or no number in any of them.
  """

  def __init__(self, task, offers, inputs='image', record='', others=()):
    used = choose(task, offers, inputs, others=others)
    filled = [k for k in in_order(offers) if np.prod(offers[k].space.shape)]
    if not {*used} & {*filled}:
      hint = f'; choose among {", ".join(filled)}' if filled else ''
      raise TaskError(
        f'--inputs {inputs}: there is no number in {_listed(used, offers)} of '
        f'{task}{hint}'
      )
    kept = choose(task, offers, record, 'record', others) if record else []
    self.names = in_order({*used, *kept})
    self.space = gym.spaces.Dict({k: offers[k].space for k in self.names})
    self.about = [f'The agent sees {_listed(used, offers)}.']
    unused = in_order(offers.keys() - used)
    if unused:
      self.about.append(f'Not used: {_listed(unused, offers)}.')
    if others:
      self.about.append(f'Cannot be used: {", ".join(others)}.')


def choose(task, offers, wanted, flag='inputs', others=()):
  """The observations that a flag names, in order; see `View`."""
  vectors = [name for name in offers if not is_image(name)]
  chosen = set()
  for word in wanted.split(','):
    if word == 'state' and vectors:
      chosen.update(vectors)
    elif word in offers:
      chosen.add(word)
    else:
      names = dict.fromkeys(in_order(offers) + (['state'] if vectors else []))
      unusable = f'; cannot be used: {", ".join(others)}' if others else ''
      raise TaskError(
        f'--{flag} {word}: {task} has no such observation'
        f'{nearest(word, names)}; it has {", ".join(names)}{unusable}'
      )
  return in_order(chosen)


def in_order(names):
  """Images first, and both by their names."""
  return sorted(names, key=lambda name: (not is_image(name), name))


def _listed(names, offers):
  return ', '.join(offers[name].text for name in names)


# --- Images -----------------------------------------------------------------

SIDE = 16  # pixels; what is smaller is no image, and fewer are channels
EXPECTED = (
  'an image is uint8, or a float in [0, 1], of shape [height, width, 3], with '
  f'at least {SIDE} pixels a side; gray, RGBA, channels first and stacks of '
  'frames are understood'
)


def image_space(size=(64, 64)):
  return gym.spaces.Box(0, 255, (*size, 3), np.uint8)


def resize(image, size):
  """Resizes uint8 [h, w, 1 or 3] to [*size, 3], bilinearly.

  Pillow widens the filter where an image shrinks, so that every pixel counts.
  """
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  if image.shape[:2] != size:
    picture = PIL.Image.fromarray(np.ascontiguousarray(image))
    image = picture.resize(size[::-1], PIL.Image.Resampling.BILINEAR)
  return np.array(image)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array holds an image; `str` says so.

  Attributes:
    shape: of the array.
    dtype: of the array, as its space says.
    stacked: the first axis is time, the newest frame last.
    first: channels come before height and width.
    start, stop: the channels to take.
    scale: factor to 0 .. 255.
    about: what is done with it, in words.
  """

  shape: tuple
  dtype: np.dtype
  stacked: bool
  first: bool
  start: int
  stop: int
  scale: int
  about: tuple

  def __str__(self):
    size = 'x'.join(map(str, self.shape))
    return ', '.join((size, *self.about))

  def read(self, array):
    """The image in an array of this layout, uint8 [h, w, 1 or 3]."""
    array = np.asarray(array)
    if array.shape != self.shape:
      raise ValueError(f'An image has shape {array.shape}, not {self.shape}.')
    if self.stacked:
      array = array[-1]
    if array.ndim == 2:
      array = array[..., None]
    if self.first:
      array = np.moveaxis(array, 0, -1)
    array = array[..., self.start : self.stop]
    if array.dtype == np.uint8 and self.scale == 1:
      return array
    if not np.isfinite(array).all():
      raise ValueError('An image has numbers that are not finite.')
    self._check_scale(array)
    self._check_bounds(array)
    return np.clip(np.rint(array * float(self.scale)), 0, 255).astype(np.uint8)

  def _check_scale(self, array):
    """ValueError where an array of another type may have another scale, too."""
    whole, top = array.dtype.kind in 'iu', array.max()
    if self.scale == 255:
      wrong = whole and top > 1
    else:
      wrong = self.dtype.kind in 'iu' and not whole and 0 < top <= 1
    if wrong:
      raise ValueError(
        f'An image is {array.dtype}, up to {top:g}; its space says '
        f'{self.dtype}, up to {255 // self.scale}: both must be alike.'
      )

  def _check_bounds(self, array):
    """ValueError far beyond the bounds; what is near is clipped."""
    most = 255 / self.scale
    low, high = array.min(), array.max()
    if low < -0.1 * most or high > 1.1 * most:
      raise ValueError(
        f'An image has numbers from {low:g} to {high:g}, where 0 to {most:g} '
        'is expected.'
      )


def image_layout(shape, dtype, low, high):
  """How arrays of a shape, type and bounds hold an image.

  Args:
    shape: tuple of integers.
    dtype: of NumPy.
    low, high: least and largest number in them.

  Returns:
    A `Layout`, or None for what is no image, such as a vector.

  Raises:
    ValueError: it seems to be an image, but not one that can be read.
  """
  found = _find_channels(shape)
  if not found:
    if np.dtype(dtype) == np.uint8 and sum(n >= SIDE for n in shape) >= 2:
      raise ValueError(f'it has shape {shape}; {EXPECTED}')
    return None
  stacked, first, count = found
  if count is None and not (high <= 1 or high == 255):
    return None  # a matrix: a map of what is where, perhaps
  is_bytes = np.dtype(dtype) == np.uint8
  if low < 0 or not (high <= 1 or high == 255 or (is_bytes and high < 255)):
    if count is None or stacked:  # a matrix of features, perhaps
      return None
    raise ValueError(f'it is {dtype} from {low:g} to {high:g}; {EXPECTED}')
  about = [f'the newest of {shape[0]} frames'] if stacked else []
  if first:
    about.append('channels first')
  start, stop, kind = _choose_channels(count or 1, first)
  about += [kind] if kind else []
  scale = 255 if high <= 1 else 1
  if scale == 255:
    about.append('from 0 to 1')
  dtype = np.dtype(dtype)
  return Layout(shape, dtype, stacked, first, start, stop, scale, tuple(about))


def _find_channels(shape):
  """(stacked, channels first, number of channels or None), None for neither."""
  if len(shape) == 4:
    found = _find_channels(shape[1:])
    return (True, *found[1:]) if found else None
  if len(shape) not in (2, 3):
    return None
  large = [n >= SIDE for n in shape]
  if large == [True, True]:
    return False, False, None
  if large == [True, True, False]:
    return False, False, shape[2]
  if large == [False, True, True]:
    return False, True, shape[0]
  return None


def _choose_channels(count, first):
  """(start, stop) of the channels that are the image, and what they are."""
  if count in (1, 3):
    return 0, count, 'gray' if count == 1 else ''
  if count == 4 and not first:
    return 0, 3, 'RGBA without its alpha'
  size = 1 if count % 3 else 3
  frames = f'the newest of {count // size} frames'
  return count - size, count, f'gray, {frames}' if size == 1 else frames


# --- Actions ----------------------------------------------------------------

LIMIT = 1e9  # bounds from here on stand for none, as in MuJoCo


class BoxMap:
  """Maps actions in [-1, 1] onto a box, so that the box contains them.

  The ends of [-1, 1] are the bounds. A side without one is 1 beyond zero, or
  2 from the other side, whichever is further. In boxes of whole numbers each
  number has an equal share of [-1, 1].

  Args:
    box: a Box of Gym or Gymnasium, of any shape.
  """

  def __init__(self, box):
    self._box = box
    low, high = (np.asarray(x, np.float64) for x in (box.low, box.high))
    none = LIMIT
    if box.dtype.kind == 'f':
      none = min(LIMIT, float(np.finfo(box.dtype).max))
    bounded, limited = low > -none, high < none
    least = np.where(limited, np.minimum(-1, high - 2), -1)
    most = np.where(bounded, np.maximum(1, low + 2), 1)
    self._low = np.where(bounded, low, least)
    self._high = np.where(limited, high, most)

  def __call__(self, action):
    """The action of the box for one in [-1, 1], both of its shape."""
    dtype, (low, high) = self._box.dtype, (self._low, self._high)
    share = (np.clip(np.asarray(action, np.float64), -1, 1) + 1) / 2
    if dtype.kind == 'f':
      value = low + share * (high - low)
    else:
      low, count = np.ceil(low), np.floor(high) - np.ceil(low) + 1
      value = low + np.minimum(np.floor(share * count), count - 1)
    # Rounding to fewer bits may pass a bound.
    return np.clip(value.astype(dtype), self._box.low, self._box.high)


LARGEST_ACTION = 10**6  # numbers


def action_record(space):
  """An action space of the agent as config.json keeps it."""
  if getattr(space, 'discrete', False):
    return dict(choices=list(space.choices))
  return dict(size=int(space.shape[0]))


def action_space(record):
  """The space that `action_record` wrote; ValueError for what it did not."""
  sizes = record.get('choices', [record.get('size')])
  if not sizes or any(type(n) is not int or n < 1 for n in sizes):
    raise ValueError(f'{record} is no space of actions')
  if sum(sizes) > LARGEST_ACTION:
    raise ValueError(f'{record} is more than {LARGEST_ACTION} numbers')
  if 'choices' in record:
    return OneHotBox(sizes)
  return gym.spaces.Box(-1.0, 1.0, (sizes[0],), np.float32)


def outline(shown, actions):
  """What environments of one run have in common, as text.

  Args:
    shown: space of observations, a Dict.
    actions: space of actions.
  """
  names = sorted(getattr(shown, 'spaces', {}).items())
  parts = [f'{name} {list(space.shape)}' for name, space in names]
  choices = getattr(actions, 'choices', None)
  size = list(choices or getattr(actions, 'shape', None) or ())
  return ', '.join([*parts, f'{"choices" if choices else "actions"} {size}'])


class OneHotBox(gym.spaces.Box):
  """Space of one-hot vectors, or of several side by side, float32.

  `discrete` tells it from other boxes, in workers and after pickling too.

  Args:
    choices: the number of choices, or a sequence of such numbers.
  """

  discrete = True

  def __init__(self, choices):
    self.choices = tuple(int(n) for n in np.ravel(choices))
    super().__init__(0.0, 1.0, (sum(self.choices),), np.float32)

  def encode(self, indices):
    """One-hot vectors [..., A] for the numbers of choices [..., K].

    Raises:
      ValueError: there is no such choice, or another number of them.
    """
    indices = np.asarray(indices)
    if indices.shape[-1] != len(self.choices):
      raise ValueError(
        f'There are {indices.shape[-1]} choices, not {len(self.choices)}.'
      )
    within = (indices >= 0) & (indices < self.choices)
    wrong = ~(within & (indices == np.floor(indices)))  # as NaN is, too
    if wrong.any():
      raise ValueError(
        f'{indices[wrong][0]} is none of the choices, which count from 0: '
        f'there are {", ".join(map(str, self.choices))}.'
      )
    parts = [
      indices[..., i, None] == np.arange(n) for i, n in enumerate(self.choices)
    ]
    return np.concatenate(parts, -1).astype(self.dtype)

  def decode(self, vector):
    """Numbers of choices, int64 [..., K], for one-hot vectors [..., A]."""
    vector = np.asarray(vector)
    return np.stack([part.argmax(-1) for part in self._split(vector)], -1)

  def sample(self, mask=None):
    return self.encode(self.np_random.integers(self.choices))

  def contains(self, x):
    x = np.asarray(x)
    if x.shape != self.shape or not np.isin(x, (0, 1)).all():
      return False
    return all(part.sum() == 1 for part in self._split(x))

  def _split(self, vector):
    return np.split(vector, np.cumsum(self.choices)[:-1], -1)


def check_action(action, space):
  """The action as an array; ValueError unless it is finite and of the shape."""
  action = np.asarray(action)
  if action.shape != space.shape:
    raise ValueError(
      f'Action of shape {action.shape} where {space.shape} is needed.'
    )
  if not np.isfinite(action).all():
    raise ValueError(f'Action {action} is not finite.')
  return action
