"""Actions and images of users' environments, of all kinds and bounds."""

import functools

import numpy as np
import pytest

import spaces
import suites
import wrappers
from user_envs import PIXELS, Base, S, make, variant
from worker_calls import TaskError

pytestmark = pytest.mark.slow


# --- Actions ----------------------------------------------------------------

TOP = np.finfo(np.float32).max
HALF = np.float16


def box(low, high, dtype=np.float32):
  low, high = np.array(low, dtype), np.array(high, dtype)
  return S.Box(low, high, dtype=dtype)


@pytest.mark.parametrize(
  'space, least, middle, most',
  [
    (box([-2, 0], [4, 10]), [-2, 0], [1, 5], [4, 10]),
    # Each finite side counts by itself.
    (box([0, -np.inf], [np.inf, 3]), [0, -1], [1, 1], [2, 3]),
    (box([-7, 5], [np.inf, np.inf]), [-7, 5], [-3, 6], [1, 7]),
    (box([-np.inf] * 2, [-4, 0]), [-6, -2], [-5, -1], [-4, 0]),
    # Bounds this large are none.
    (box([-TOP, -1e9], [TOP, 1e9]), [-1, -1], [0, 0], [1, 1]),
    (box([-65504], [65504], HALF), [-1], [0], [1]),
    (box([-1e30], [1e300], np.float64), [-1], [0], [1]),
    # The range of these two is beyond float32, or rounded to nothing in it.
    (box([-9e8], [9e8]), [-9e8], [0], [9e8]),
    (box([0.1], [0.7]), [0.1], [0.4], [0.7]),
    (box([[1], [2]], [[3], [6]]), [[1], [2]], [[2], [4]], [[3], [6]]),
  ],
)
def test_boxes_of_all_bounds(space, least, middle, most):
  to = spaces.BoxMap(space)
  rng = np.random.default_rng(0)
  for sign, expected in ((-1, least), (0, middle), (1, most)):
    action = np.full(space.shape, sign, np.float32)
    np.testing.assert_allclose(to(action), expected, rtol=1e-3)
  for scale in (1, 1, 3):  # beyond [-1, 1] as well
    action = to(scale * rng.uniform(-1, 1, space.shape).astype(np.float32))
    assert space.contains(action) and np.isfinite(action).all()


def test_boxes_contain_their_rounded_ends():
  rng = np.random.default_rng(0)
  for dtype in (np.float16, np.float32, np.float64):
    for _ in range(300):
      ends = np.sort(rng.normal(0, 10, (2, 3)).astype(dtype), 0)
      space = S.Box(ends[0], ends[1], dtype=dtype)
      for sign in (-1.0, 1.0):
        assert space.contains(spaces.BoxMap(space)(np.full(3, sign, 'f')))


@pytest.mark.parametrize(
  'low, high, dtype, values',
  [
    (0, 3, np.int64, [0, 1, 2, 3]),
    (-1, 1, np.int8, [-1, 0, 1]),
    (250, 255, np.uint8, range(250, 256)),
    (-(2**63), 2**63 - 1, np.int64, [-1, 0, 1]),
    (5, 2**63 - 1, np.int64, [5, 6, 7]),
  ],
)
def test_integer_boxes_are_equal_bins(low, high, dtype, values):
  space = S.Box(low, high, (1,), dtype)
  to = spaces.BoxMap(space)
  actions = [to(np.array([x])) for x in np.linspace(-1, 1, 60_001)]
  assert all(map(space.contains, actions))
  found, counts = np.unique(actions, return_counts=True)
  assert found.tolist() == list(values)
  assert np.ptp(counts) <= 2


class Mirror(Base):
  """The action comes back as the reward, in digits."""

  def reward(self):
    return digits(np.ravel(self.actions[-1]))


def digits(numbers):
  return float(sum(n * 10**i for i, n in enumerate(numbers)))


@pytest.mark.parametrize(
  'space, choices, start',
  [
    (S.MultiDiscrete([3, 2]), (3, 2), 0),
    (S.MultiDiscrete([[3], [2]]), (3, 2), 0),
    (S.MultiDiscrete([3, 2], start=[4, 5]), (3, 2), [4, 5]),
    (S.MultiBinary(3), (2, 2, 2), 0),
    (S.MultiBinary([2, 1]), (2, 2), 0),
    (S.Discrete(3, start=2), (3,), 2),
  ],
)
def test_choices_are_one_hot_vectors_side_by_side(space, choices, start):
  env = make(variant(Mirror, action_space=space))
  assert env.action_space.choices == choices and env.action_space.discrete
  assert env.action_space.shape == (sum(choices),)
  env.reset()
  for number in range(12):
    index = np.array([number // 2**i % n for i, n in enumerate(choices)])
    parts = [np.eye(n)[i] for i, n in zip(index, choices, strict=True)]
    action = np.concatenate(parts).astype(np.float32)
    np.testing.assert_array_equal(env.action_space.encode(index), action)
    _, reward, _, _ = env.step(action)
    assert reward == digits(index + start)
  with pytest.raises(ValueError, match='not one-hot'):
    env.step(np.ones(sum(choices), np.float32))


def test_one_hot_space_of_several_choices():
  space = spaces.OneHotBox([3, 2])
  samples = np.stack([space.sample() for _ in range(400)])
  assert all(map(space.contains, samples)) and samples.dtype == np.float32
  np.testing.assert_allclose(
    samples.mean(0), [1 / 3] * 3 + [1 / 2] * 2, atol=0.1
  )
  for wrong in ([1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0.5, 0.5, 0, 1, 0]):
    assert not space.contains(np.array(wrong))
  many = space.encode(np.array([[2, 0], [1, 1]]))
  assert many.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
  assert space.decode(many[1]).tolist() == [1, 1]
  assert space.decode(many).tolist() == [[2, 0], [1, 1]]
  batch = many[None].repeat(3, 0)
  np.testing.assert_array_equal(space.encode(space.decode(batch)), batch)


# --- Images -----------------------------------------------------------------


def colors(height=64, width=48):
  """An image in which each pixel and channel has a number of its own."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGE = colors()
GRAY = IMAGE[..., :1]
OTHER = 255 - IMAGE
UNIT = IMAGE / np.float32(255)
ALPHA = np.full((64, 48, 1), 7, np.uint8)


def stack(*images, axis=-1):
  return np.concatenate(images, axis)


@pytest.mark.parametrize(
  'array, high, expected, words',
  [
    (IMAGE, 255, IMAGE, '64x48x3'),
    (GRAY, 255, GRAY, 'gray'),
    (GRAY[..., 0], 255, GRAY, '64x48, gray'),
    (IMAGE.transpose(2, 0, 1), 255, IMAGE, 'channels first'),
    (GRAY.transpose(2, 0, 1), 255, GRAY, 'channels first, gray'),
    (UNIT, 1, IMAGE, 'from 0 to 1'),
    (UNIT.transpose(2, 0, 1), 1, IMAGE, 'channels first, from 0 to 1'),
    (IMAGE.astype(np.float64), 255, IMAGE, '64x48x3'),
    (IMAGE.astype(np.int64), 255, IMAGE, '64x48x3'),
    (IMAGE > 127, 1, 255 * (IMAGE > 127), 'from 0 to 1'),
    (stack(IMAGE, ALPHA), 255, IMAGE, 'RGBA without its alpha'),
    (stack(OTHER, OTHER, IMAGE), 255, IMAGE, 'the newest of 3 frames'),
    (
      stack(OTHER, IMAGE).transpose(2, 0, 1),
      *(255, IMAGE, 'channels first, the newest of 2 frames'),
    ),
    (
      stack(IMAGE, GRAY).transpose(2, 0, 1),
      *(255, GRAY, 'gray, the newest of 4 frames'),
    ),
    (np.stack([OTHER, IMAGE]), 255, IMAGE, 'the newest of 2 frames'),
  ],
)
def test_images_of_all_layouts(array, high, expected, words):
  layout = spaces.image_layout(array.shape, array.dtype, 0, high)
  np.testing.assert_array_equal(layout.read(array), expected)
  assert layout.read(array).dtype == np.uint8
  assert words in str(layout)


FLOATS = IMAGE.astype(np.float32)


@pytest.mark.parametrize(
  'dtype, high, array, expected',
  [
    (np.uint8, 255, UNIT, None),
    (np.uint8, 255, IMAGE > 127, None),
    (np.uint8, 255, FLOATS, IMAGE),
    (np.uint8, 255, FLOATS / 2, np.rint(FLOATS / 2)),
    (np.uint8, 255, 0 * FLOATS, 0 * IMAGE),
    (np.uint8, 255, IMAGE.astype(np.int64), IMAGE),
    (np.float32, 1, IMAGE, None),
    (np.uint8, 1, IMAGE, None),
    (np.float32, 1, IMAGE > 127, 255 * (IMAGE > 127)),
    (np.float32, 1, IMAGE // 128, 255 * (IMAGE // 128)),
    (np.float32, 255, FLOATS, IMAGE),
    (np.float32, 255, FLOATS / 2, np.rint(FLOATS / 2)),
    (np.float32, 255, IMAGE, IMAGE),
  ],
)
def test_images_of_other_types_than_announced(dtype, high, array, expected):
  layout = spaces.image_layout(array.shape, dtype, 0, high)
  if expected is None:
    words = f'is {array.dtype}, .*says {np.dtype(dtype)}, up to {high}'
    with pytest.raises(ValueError, match=words):
      layout.read(array)
  else:
    np.testing.assert_array_equal(layout.read(array), expected)


@pytest.mark.parametrize(
  'dtype, high, array',
  [
    (np.float32, 1, FLOATS),
    (np.float32, 1, FLOATS / 255 - 0.5),
    (np.float32, 1, FLOATS / 200),
    (np.float32, 255, FLOATS - 128),
    (np.int64, 255, IMAGE.astype(np.int64) + 60),
    (np.float32, 1, np.full_like(FLOATS, np.nan)),
  ],
)
def test_images_beyond_their_bounds_are_errors(dtype, high, array):
  layout = spaces.image_layout(array.shape, dtype, 0, high)
  with pytest.raises(ValueError, match='where 0 to|not finite'):
    layout.read(array)


def test_a_depth_beside_an_image_is_not_used():
  """It is no image of 0 to 1 or 255, and no vector of a robot."""
  kind = dictionary(
    rgb=PIXELS,
    depth=S.Box(0, 10, (64, 64, 1), np.float32),
    pose=S.Box(-1, 1, (3,), np.float32),
  )
  env = make(kind, inputs='image,state')
  assert {*env.observation_space.spaces} == {'image', 'pose', 'reward'}
  assert "Cannot be used: the observation 'depth'" in ' '.join(env.about)


def test_frames_of_floats_a_little_above_one_stay_bright():
  near = np.full((64, 64, 3), 0.5, np.float32)
  near[0, 0] = 1.05
  kind = variant(
    observation_space=S.Box(-1, 1, (2,), np.float32),
    obs=lambda self: np.zeros(2, np.float32),
    render=lambda self: near if self.time % 2 else np.minimum(near, 1),
  )
  env = make(kind)
  env.reset()
  for _ in range(4):
    image = env.step(np.zeros(2, np.float32))[0]['image']
    assert image[9, 9].tolist() == [128] * 3 and image[0, 0, 0] == 255


def test_images_a_little_beyond_their_bounds_are_clipped():
  near = FLOATS / 255 * 1.1 - 0.05
  layout = spaces.image_layout(near.shape, np.float32, 0, 1)
  read = layout.read(near)
  assert read.min() == 0 and read.max() == 255
  np.testing.assert_allclose(read, np.clip(near * 255, 0, 255), atol=0.51)


@pytest.mark.parametrize(
  'shape, dtype, low, high',
  [
    ((128,), np.uint8, 0, 255),
    ((7, 7, 3), np.uint8, 0, 255),  # MiniGrid's, which are no pixels
    ((20, 30), np.float32, -np.inf, np.inf),
    ((20, 30), np.int64, 0, 10),  # a map of what is where
    ((19, 19), np.uint8, 0, 2),  # a board
    ((20, 30), np.float32, 0, 5),
    ((5, 3), np.float32, 0, 1),
  ],
)
def test_what_is_no_image(shape, dtype, low, high):
  assert spaces.image_layout(shape, dtype, low, high) is None


@pytest.mark.parametrize(
  'space',
  [
    S.Box(-np.inf, np.inf, (64, 64, 3), np.float32),
    S.Box(-1, 1, (3, 64, 64), np.float32),
    S.Box(0, 5, (64, 64, 1), np.float32),  # a depth, perhaps
    S.Box(0, 254, (64, 64, 3), np.int64),
    S.Box(0, 255, (64, 64, 40), np.uint8),
    S.Box(0, 255, (2, 2, 64, 64, 3), np.uint8),
  ],
)
def test_other_images_are_an_error_and_not_rendered(space):
  with pytest.raises(TaskError) as error:
    make(variant(observation_space=space))
  text = str(error.value)
  assert '[height, width, 3]' in text and 'channels first' in text
  assert str(space.shape) in text or f'{space.dtype} from' in text


def dictionary(**parts):
  """An environment with a dictionary of observations."""
  return variant(
    observation_space=S.Dict(parts),
    obs=lambda self: {k: v.sample() for k, v in parts.items()},
  )


def test_which_observation_is_the_image():
  small = S.Box(0, 255, (32, 32, 3), np.uint8)
  env = make(dictionary(front=small, image=PIXELS, speed=S.Box(-1, 1, (2,))))
  assert env.about == [
    "The agent sees the observation 'image', 64x64x3.",
    "Not used: the observation 'front' (image_2), "
    "the observation 'speed' (float32 [2]).",
  ]
  env = make(dictionary(left=small, goal=S.Discrete(4)))
  assert env.about == [
    "The agent sees the observation 'left', 32x32x3; resized to 64x64.",
    "Not used: the observation 'goal' (one of 4).",
  ]


def test_images_within_dictionaries_and_tuples():
  space = S.Dict(
    {'camera': S.Dict({'rgb': PIXELS}), 'pair': S.Tuple([S.Discrete(2)])}
  )
  env = make(
    variant(
      observation_space=space,
      obs=lambda self: {
        'camera': {'rgb': np.full((64, 64, 3), self.time, np.uint8)},
        'pair': (0,),
      },
    )
  )
  assert env.reset()['image'][0, 0, 0] == 0
  assert env.step(np.zeros(2))[0]['image'][0, 0, 0] == 1
  assert "the observation 'camera/rgb'" in env.about[0]
  assert "'pair/0' (one of 2)" in env.about[1]


def test_an_image_of_another_shape_than_announced_is_an_error():
  kind = variant(obs=lambda self: np.zeros((32, 64, 3), np.uint8))
  words = r'the observation: An image .*\(32, 64, 3\), not \(64, 64, 3\)'
  with pytest.raises(TaskError, match=words):
    make(kind)


def test_the_suite_says_what_is_not_used():
  env = wrappers.Async(
    functools.partial(suites.make_task, 'dmc_walker_walk', 2, 100)
  )
  try:
    assert env.about[0] == 'The agent sees camera 0, 64x64.'
    for name in ('orientations [14]', 'height []', 'velocity [9]'):
      assert name in env.about[1]
  finally:
    env.close()
