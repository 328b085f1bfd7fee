"""Episodes on disk, damaged ones too, and windows drawn from them."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

import cli
import episode_files
import file_io
import replay
import tools

# --- Files and replay -------------------------------------------------------


def make_episode(number, length, dtype=np.float32):
  """Each row says, in every key, whose it is: (episode, row)."""
  row = np.arange(length)
  image = np.zeros((length, 4, 4, 3), np.uint8)
  image[..., 0] = number
  image[..., 1] = row[:, None, None]
  return {
    'image': image,
    'action': np.stack([row, 0 * row + number], 1).astype(dtype) / 1024,
    'reward': (row + 1000 * number).astype(np.float32),
    'discount': np.ones(length, dtype),
    'position': np.stack([row, row + number, row], 1).astype(np.float64),
  }


def identify(window):
  """(episode, rows) of a window; checks that its keys agree."""
  number = window['image'][0, 0, 0, 0]
  rows = window['image'][:, 0, 0, 1].astype(int)
  # One episode and rows in order, none lost and none twice.
  assert np.all(window['image'][..., 0] == number)
  np.testing.assert_array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
  np.testing.assert_array_equal(1024 * window['action'][:, 0], rows)
  # Before the first row there was no action, whatever the file says.
  numbers = 1024 * window['action'][:, 1]
  np.testing.assert_array_equal(numbers, np.where(rows > 0, number, 0))
  np.testing.assert_array_equal(window['reward'], rows + 1000.0 * number)
  if 'position' in window:
    np.testing.assert_array_equal(window['position'][:, 1], rows + number)
  return int(number), tuple(rows)


def draw(directory, count, *args, **kwargs):
  generator = tools.load_episodes(directory, *args, **kwargs)
  return [next(generator) for _ in range(count)]


def test_save_and_count_episodes(tmp_path):
  folder = tmp_path / 'a' / 'episodes'
  episodes = [make_episode(1, 5), make_episode(2, 8)]
  paths = tools.save_episodes(folder, episodes)
  assert sorted(folder.iterdir()) == sorted(paths)
  for path, episode in zip(paths, episodes, strict=True):
    stamp, unique, length = path.stem.split('-')
    assert path.suffix == '.npz'
    assert stamp[8] == 'T' and stamp.replace('T', '').isdigit()
    assert len(unique) == 32
    assert int(length) == len(episode['reward'])
    assert episode_files.episode_length(path) == int(length)
    with np.load(path, allow_pickle=False) as loaded:
      assert set(loaded.files) == set(episode)
      for key, value in episode.items():
        assert loaded[key].dtype == value.dtype
        np.testing.assert_array_equal(loaded[key], value)
  # The row of the reset is no agent step.
  assert tools.count_episodes(folder) == (2, 4 + 7)
  assert tools.count_episodes(tmp_path / 'a') == (0, 0)


@pytest.mark.parametrize('kind', ['plain', 'compressed', 'by columns'])
@pytest.mark.parametrize('balance', [False, True])
def test_every_row_comes_back_in_order(tmp_path, kind, balance):
  lengths = {1: 4, 2: 7, 3: 9}
  for number, length in lengths.items():
    episode = make_episode(number, length)
    path = tmp_path / f'2020-x{number}-{length}.npz'
    if kind == 'plain':
      tools.save_episodes(tmp_path, [episode])
    elif kind == 'compressed':
      np.savez_compressed(path, **episode)
    else:  # as of a transposed array: rows are not together in the file
      np.savez(path, **{k: np.asfortranarray(v) for k, v in episode.items()})
  windows = draw(tmp_path, 400, 100, 4, balance)
  for window in windows:
    name, _, row = window.pop(replay.SOURCE).partition(', row ')
    number = identify(window)[0]
    assert name.endswith(f'-{lengths[number]}.npz')
    assert int(row) == identify(window)[1][0]
    assert set(window) == set(make_episode(1, 4))
    assert all(len(v) == 4 for v in window.values())
    assert window['image'].dtype == np.uint8
    assert window['position'].dtype == np.float64
  seen = {identify(w) for w in windows}
  # All windows that fit: first rows, last rows, none across episodes.
  assert seen == {
    (number, tuple(range(start, start + 4)))
    for number, length in lengths.items()
    for start in range(length - 4 + 1)
  }


def test_whole_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 2), make_episode(2, 6)])
  seen = {identify(w) for w in draw(tmp_path, 50, 10)}
  assert seen == {(1, (0, 1)), (2, (0, 1, 2, 3, 4, 5))}


def test_balance_favours_the_ends(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 10)])
  shares = {}
  for balance in (False, True):
    starts = [identify(w)[1][0] for w in draw(tmp_path, 2000, 100, 5, balance)]
    shares[balance] = np.bincount(starts, minlength=6) / len(starts)
  np.testing.assert_allclose(shares[False], [1 / 6] * 6, atol=0.04)
  # Draws 0..10, of which 5..10 count as the last window.
  expected = [1 / 11] * 5 + [6 / 11]
  np.testing.assert_allclose(shares[True], expected, atol=0.04)


def test_capacity_drops_the_oldest(tmp_path):
  # Four agent steps in each.
  tools.save_episodes(tmp_path, [make_episode(n, 5) for n in range(1, 6)])

  def numbers(capacity):
    windows = draw(tmp_path, 200, 50, 3, capacity=capacity)
    return {identify(w)[0] for w in windows}

  assert numbers(0) == {1, 2, 3, 4, 5}
  assert numbers(8) == {4, 5}
  assert numbers(9) == {3, 4, 5}
  assert numbers(1) == {5}
  assert len(list(tmp_path.glob('*.npz'))) == 5, 'files stay'


def test_start_continues_the_stream(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(n, 30) for n in range(3)])
  whole = [identify(w) for w in draw(tmp_path, 40, 10, 4, seed=7)]
  again = [identify(w) for w in draw(tmp_path, 20, 10, 4, seed=7, start=2)]
  other = [identify(w) for w in draw(tmp_path, 40, 10, 4, seed=8)]
  assert whole[20:] == again
  assert whole != other
  assert whole[:10] != whole[10:20]


def test_new_episodes_are_seen_at_the_next_block(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 5)])
  generator = tools.load_episodes(tmp_path, 20, 3)
  first = next(generator)
  tools.save_episodes(tmp_path, [make_episode(2, 5)])
  rest = [first, *(next(generator) for _ in range(19))]
  assert {identify(w)[0] for w in rest} == {1}
  block = [next(generator) for _ in range(20)]
  assert {identify(w)[0] for w in block} == {1, 2}


def test_episodes_of_the_2020_release(tmp_path):
  # Compressed, float16, without the keys that came later.
  episode = make_episode(1, 6, np.float16)
  del episode['position']
  name = '20200101T000000-0123456789abcdef0123456789abcdef-6.npz'
  np.savez_compressed(tmp_path / name, **episode)
  tools.save_episodes(tmp_path, [make_episode(2, 6)])
  windows = draw(tmp_path, 60, 20, 4)
  assert {identify(w)[0] for w in windows} == {1, 2}
  for window in windows:
    number = identify(window)[0]
    expected = np.float16 if number == 1 else np.float32
    assert window['action'].dtype == expected
  assert tools.count_episodes(tmp_path) == (2, 10)


def broken_truncated(path):
  np.savez(path, **make_episode(9, 6))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_empty(path):
  path.write_bytes(b'')


def broken_garbage(path):
  path.write_bytes(bytes(range(256)) * 8)


def broken_pickle(path):
  objects = np.array([{}] * 6, object)
  np.savez(path, **make_episode(9, 6), extra=objects)


def broken_pickle_compressed(path):
  objects = np.array([{}] * 6, object)
  np.savez_compressed(path, **make_episode(9, 6), extra=objects)


def broken_key(path):
  episode = make_episode(9, 6)
  del episode['reward']
  np.savez(path, **episode)


def broken_key_compressed(path):
  episode = make_episode(9, 6)
  del episode['reward']
  np.savez_compressed(path, **episode)


def broken_length(path):
  np.savez(path, **make_episode(9, 5))


def broken_longer(path):
  np.savez(path, **make_episode(9, 7))


def broken_length_of_one_key(path):
  episode = make_episode(9, 6)
  episode['discount'] = episode['discount'][:-1]
  np.savez(path, **episode)


def broken_scalar(path):
  np.savez(path, **make_episode(9, 6), extra=np.float32(1))


def broken_actions(path):
  # No agent can choose them; the absolute value of -128 is -128 in one byte.
  action = np.full((6, 2), -128, np.int8)
  np.savez(path, **dict(make_episode(9, 6), action=action))


def broken_pipe(path):
  os.mkfifo(path)


def broken_member(path):
  # A stored member that is not an array.
  np.savez(path, **make_episode(9, 6))
  path.write_bytes(path.read_bytes().replace(b'\x93NUMPY', b'\x93NOMPY'))


def broken_compressed_bytes(path):
  np.savez_compressed(path, **make_episode(9, 6))
  content = bytearray(path.read_bytes())
  content[60:90] = b'\xff' * 30
  path.write_bytes(content)


def broken_bit(path):
  large = dict(make_episode(9, 6), image=np.zeros((6, 64, 64, 3), np.uint8))
  np.savez(path, **large)
  content = bytearray(path.read_bytes())
  content[content.index(bytes(5000)) + 4000] ^= 4  # in an image
  path.write_bytes(content)


def broken_dtype(path):
  episode = make_episode(9, 6)
  np.savez(path, **dict(episode, image=episode['image'].astype(np.float32)))


def broken_reward(path):
  episode = make_episode(9, 6)
  episode['reward'][:] = np.nan
  np.savez(path, **episode)


def broken_reward_shape(path):
  np.savez(path, **dict(make_episode(9, 6), reward=np.zeros((6, 1))))


def broken_bomb(path):
  # 64 MB of zeros in 300 KB, which say that they are 6 GiB.
  np.savez_compressed(path, **make_episode(9, 6))
  array = np.lib.format
  header = dict(descr='|u1', fortran_order=False, shape=(6, 2**30))
  with (
    zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED, compresslevel=1) as z,
    z.open('bomb.npy', 'w', force_zip64=True) as file,
  ):
    array.write_array_header_2_0(file, header)
    file.write(bytes(2**26))


def broken_path(path):
  np.savez(path, **{'../../evil': np.zeros(6)}, **make_episode(9, 6))


def broken_name_twice(path):
  np.savez(path, **make_episode(9, 6))
  with (
    warnings.catch_warnings(action='ignore'),
    zipfile.ZipFile(path, 'a') as archive,
  ):
    archive.writestr('reward.npy', archive.read('reward.npy'))


def broken_folder(path):
  path.mkdir()


BROKEN = [v for k, v in sorted(globals().items()) if k.startswith('broken_')]


@pytest.mark.parametrize('spoil', BROKEN, ids=lambda f: f.__name__[7:])
def test_broken_files_are_set_aside(tmp_path, capsys, spoil):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  path = tmp_path / '20260101T000000000000-broken-6.npz'
  spoil(path)
  windows = draw(tmp_path, 30, 30, 4)
  # Sampling goes on, within the same block, and the number is the same.
  assert {identify(w)[0] for w in windows} == {1}
  assert not path.exists()
  aside = path.with_suffix('.npz.broken')
  assert aside.exists()
  out, err = capsys.readouterr()
  assert out.count('Warning') == 1 and aside.name in out
  assert err == ''
  assert tools.count_episodes(tmp_path) == (1, 5)


def test_file_that_is_cut_short_later(tmp_path, capsys):
  good, bad = tools.save_episodes(
    tmp_path, [make_episode(1, 6), make_episode(9, 6)]
  )
  generator = tools.load_episodes(tmp_path, 1000, 6)
  seen = {identify(next(generator))[0] for _ in range(30)}
  assert seen == {1, 9}
  bad.write_bytes(bad.read_bytes()[:300])
  seen = {identify(next(generator))[0] for _ in range(30)}
  assert seen == {1}
  assert bad.name in capsys.readouterr().out
  assert good.exists() and not bad.exists()


def test_episode_that_is_deleted_later(tmp_path):
  _, gone = tools.save_episodes(
    tmp_path, [make_episode(1, 6), make_episode(9, 6)]
  )
  generator = tools.load_episodes(tmp_path, 1000, 6)
  next(generator)
  gone.unlink()
  assert {identify(next(generator))[0] for _ in range(30)} == {1}


@pytest.mark.parametrize('key', ['image', 'action'])
def test_rows_of_another_shape_are_set_aside(tmp_path, key, capsys):
  tools.save_episodes(tmp_path, [make_episode(1, 6), make_episode(2, 6)])
  odd = make_episode(9, 6)
  odd[key] = odd[key][..., :1]
  (path,) = tools.save_episodes(tmp_path, [odd])
  shapes = dict(image=(4, 4, 3), action=(2,))
  windows = tools.load_episodes(tmp_path, 20, 3, shapes=shapes)
  assert {identify(next(windows))[0] for _ in range(60)} == {1, 2}
  assert path.with_suffix('.npz.broken').exists()
  assert f'{key} has shape' in capsys.readouterr().out


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / 'a-x-6.npz', **make_episode(1, 6))
  episode = episode_files.EpisodeFile(tmp_path / 'a-x-6.npz')
  monkeypatch.setattr(episode_files.EpisodeFile, 'LARGEST', 1000)
  with pytest.raises(ValueError, match='unpacks to more'):
    episode.read(0, 3)
  (path,) = tools.save_episodes(tmp_path, [make_episode(1, 6)])
  assert len(episode_files.EpisodeFile(path).read(0, 3)['reward']) == 3


def test_check_finds_broken_structure_before_anything_is_read(tmp_path, capsys):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  broken_truncated(tmp_path / 'a-x-6.npz')
  broken_length(tmp_path / 'b-x-999999999.npz')
  replay.Replay(tmp_path).check()
  assert tools.count_episodes(tmp_path) == (1, 5)
  out = capsys.readouterr().out
  assert 'a-x-6.npz.broken' in out and 'b-x-999999999.npz.broken' in out


@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_damage_is_noticed_or_harmless(data):
  """Bytes changed, cut out or put in: a broken file, or the same rows."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'a-x-6.npz'
    save = np.savez_compressed if data.draw(strategies.booleans()) else np.savez
    episode = make_episode(1, 6)
    if data.draw(strategies.booleans()):  # more than is read ahead
      episode['image'] = np.tile(episode['image'], (1, 16, 16, 1))
    save(path, **episode)
    content = bytearray(path.read_bytes())
    place = data.draw(strategies.integers(0, len(content) - 1))
    kind = data.draw(strategies.sampled_from(['flip', 'cut', 'insert']))
    if kind == 'flip':
      content[place] ^= data.draw(strategies.integers(1, 255))
    elif kind == 'cut':
      del content[place : place + data.draw(strategies.integers(1, 5000))]
    else:
      content[place:place] = data.draw(strategies.binary(min_size=1))
    path.write_bytes(content)
    try:
      rows = episode_files.EpisodeFile(path).read(1, 4)
    except ValueError:
      return
    for key in set(rows) & set(episode):
      np.testing.assert_array_equal(rows[key], episode[key][1:4])
    assert {'image', 'action', 'reward', 'discount'} <= set(rows)


def test_names_sort_by_age_even_if_the_clock_goes_back(tmp_path):
  (late,) = tools.save_episodes(tmp_path, [make_episode(1, 3)])
  future = tmp_path / '29990101T000000000000-x-3.npz'
  late.rename(future)
  paths = [tools.save_episodes(tmp_path, [make_episode(1, 3)])[0]]
  paths += tools.save_episodes(tmp_path, [make_episode(1, 3)] * 2)
  assert sorted(tmp_path.glob('*.npz')) == [future, *paths]


def test_the_newest_episode_is_one_with_a_time(tmp_path):
  (path,) = tools.save_episodes(tmp_path, [make_episode(1, 5)])
  np.savez(tmp_path / 'walk-5.npz', **make_episode(2, 5))
  assert episode_files.newest(tmp_path) == path.name
  (later,) = tools.save_episodes(tmp_path, [make_episode(3, 5)])
  assert path.name < later.name < 'walk-5.npz'


def test_names_at_the_end_of_time(tmp_path):
  last = '99991231T235959999999-x-3.npz'
  tools.save_episodes(tmp_path, [make_episode(1, 3)])[0].rename(tmp_path / last)
  assert tools.save_episodes(tmp_path, [make_episode(1, 3)])[0].exists()


def test_episodes_without_a_step_are_none_to_learn_from(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 1)])
  with pytest.raises(cli.UserError, match='needs episodes with actions'):
    draw(tmp_path, 1, 1, 2)


def test_all_broken_is_a_user_error(tmp_path):
  broken_empty(tmp_path / 'x-y-6.npz')
  with pytest.raises(cli.UserError):
    draw(tmp_path, 1, 1, 4)


def test_too_short_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 5), make_episode(2, 3)])
  with pytest.raises(cli.UserError, match='batch_length 6 .* 5 rows'):
    draw(tmp_path, 1, 1, 6)
  # A window may be as long as the episode; the shorter one is passed over.
  windows = draw(tmp_path, 20, 10, 5)
  assert {identify(w) for w in windows} == {(1, (0, 1, 2, 3, 4))}


def test_short_episode_between_long_ones(tmp_path):
  episodes = [make_episode(1, 6), make_episode(2, 2), make_episode(3, 6)]
  tools.save_episodes(tmp_path, episodes)
  assert {identify(w)[0] for w in draw(tmp_path, 50, 10, 4)} == {1, 3}
  # It is not broken, only short.
  assert tools.count_episodes(tmp_path)[0] == 3


def test_unfinished_writes_are_not_episodes(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(1, 6)])
  (tmp_path / '.2026-x-6.npz.123.tmp').write_bytes(b'half')
  assert tools.count_episodes(tmp_path) == (1, 5)
  draw(tmp_path, 10, 5, 4)


def test_atomic_write(tmp_path):
  path = tmp_path / 'file'
  with file_io.atomic_write(path) as file:
    file.write(b'old')
  assert path.read_bytes() == b'old'
  with pytest.raises(RuntimeError), file_io.atomic_write(path) as file:
    file.write(b'half of the ne')
    raise RuntimeError
  assert path.read_bytes() == b'old'
  with (
    pytest.raises(RuntimeError),
    file_io.atomic_write(tmp_path / 'b') as file,
  ):
    raise RuntimeError
  with file_io.atomic_write(path) as file:
    file.write(b'new')
    file.flush()
    assert path.read_bytes() == b'old', 'seen before it was whole'
  assert path.read_bytes() == b'new'
  assert list(tmp_path.iterdir()) == [path], 'nothing else is left'
  with pytest.raises(FileNotFoundError) as caught, file_io.atomic_write(path):
    open('/no/such/font')
  assert str(caught.value).endswith(
    "No such file or directory: '/no/such/font'"
  )
  path.unlink()
  path.mkdir()
  with pytest.raises(IsADirectoryError) as caught, file_io.atomic_write(path):
    pass
  assert str(caught.value).endswith(f"Is a directory: '{path}'")


def private_memory():
  """Bytes of this process that are no pages of files."""
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])


def test_replay_stays_out_of_private_memory(tmp_path):
  """120 episodes of 100 rows are 150 MB; a twentieth of it may stay."""
  episode = {
    'image': np.zeros((101, 64, 64, 3), np.uint8),
    'action': np.zeros((101, 2), np.float32),
    'reward': np.zeros(101, np.float32),
    'discount': np.ones(101, np.float32),
  }
  tools.save_episodes(tmp_path, [episode] * 120)
  del episode
  windows = tools.load_episodes(tmp_path, 50, 50)
  for _ in range(50):
    next(windows)
  before = private_memory()
  for _ in range(1000):
    next(windows)
  assert private_memory() - before < 8e6


def test_prefetch_keeps_the_order_and_passes_errors_on():
  def count():
    yield from range(3)
    raise cli.UserError('no more')

  numbers = replay.prefetch({'x': np.float32(i)} for i in count())
  assert [float(next(numbers)['x']) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(cli.UserError, match='no more'):
    next(numbers)


def test_what_the_machine_lacks_breaks_no_file(tmp_path):
  """Without a file descriptor left, reading fails; the episodes stay."""
  paths = tools.save_episodes(tmp_path, [make_episode(n, 6) for n in (1, 2)])
  windows = tools.load_episodes(tmp_path, 1000, 6)
  code = f"""
import os, resource, sys
sys.path[:] = {sys.path!r}
import numpy as np
import replay
stored = replay.Replay({str(tmp_path)!r}, 6)
stored.rescan()
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
held = []
try:
  while True:
    held.append(os.open('/dev/null', os.O_RDONLY))
except OSError:
  pass
try:
  stored.window(np.random.default_rng(0))
except OSError as error:
  os.close(held.pop())
  print(error.strerror)
"""
  command = [sys.executable, '-c', code]
  found = subprocess.run(command, capture_output=True, text=True)
  assert (found.stdout, found.stderr) == ('Too many open files\n', '')
  assert all(path.exists() for path in paths)
  assert {identify(next(windows))[0] for _ in range(30)} == {1, 2}


def test_episodes_of_another_task_stay_beside_a_broken_one(tmp_path):
  paths = tools.save_episodes(tmp_path, [make_episode(n, 6) for n in (1, 2, 3)])
  os.truncate(paths[0], 300)
  with pytest.raises(cli.UserError, match='are of another task'):
    replay.Replay(tmp_path, shapes=dict(position=(7,))).check()
  assert all(path.exists() for path in paths)


def test_an_episode_of_another_task_beside_one_of_this_is_set_aside(tmp_path):
  paths = tools.save_episodes(tmp_path, [make_episode(n, 6) for n in (1, 2)])
  other = make_episode(3, 6)
  del other['position']
  tools.save_episodes(tmp_path, [other])
  replay.Replay(tmp_path, shapes=dict(position=(3,))).check()
  assert sorted(tmp_path.glob('*.npz')) == paths


def test_capacity_counts_what_is_long_enough(tmp_path):
  """The newest 20 steps of episodes that windows fit into."""
  lengths = [11, 11, 11, 3, 3, 3, 3, 3, 3, 3, 3]
  episodes = [make_episode(n, length) for n, length in enumerate(lengths)]
  tools.save_episodes(tmp_path, episodes)
  windows = draw(tmp_path, 50, 50, 6, capacity=20)
  assert {identify(window)[0] for window in windows} == {1, 2}


def test_episodes_without_what_the_agent_sees_are_of_another_task(tmp_path):
  (path,) = tools.save_episodes(tmp_path, [make_episode(1, 6)])
  shapes = dict(position=(3,), goal=(2,))
  with pytest.raises(cli.UserError, match='another task: it lacks goal'):
    replay.Replay(tmp_path, shapes=shapes).check()
  assert path.exists()


def batches(
  folder, count, part=(0, 1), folders=1, start=0, actions=None, **flags
):
  """(episode, first row) of the windows of batches, by the flags of a run."""
  defaults = dict(batch_size=20, batch_length=3, dataset_balance=False)
  defaults.update(seed=0, replay_capacity=0, action_repeat=4)
  config = cli.AttrDict({**defaults, **flags})
  inputs = dict(image=(4, 4, 3))
  drawn = replay.load_dataset(
    folder, config, start, actions, part=part, inputs=inputs, folders=folders
  )
  found = [batch for batch, _ in zip(drawn, range(count), strict=False)]
  images = np.concatenate([batch['image'] for batch in found])
  return [(int(x[0, 0, 0, 0]), int(x[0, 0, 0, 1])) for x in images]


def test_batches_are_drawn_as_the_flags_say(tmp_path):
  tools.save_episodes(tmp_path, [make_episode(n, 10) for n in range(1, 6)])
  plain = batches(tmp_path, 10)
  assert {number for number, _ in plain} == {1, 2, 3, 4, 5}
  # In environment steps: 36 in each episode.
  config = cli.AttrDict(action_repeat=4)
  assert replay.count_steps(tmp_path, config, folders=2) == 2 * 5 * 36
  few = batches(tmp_path, 10, replay_capacity=72)
  assert batches(tmp_path, 10, folders=2, replay_capacity=144) == few
  assert {number for number, _ in few} == {4, 5}
  least = batches(tmp_path, 10, replay_capacity=1)  # less than one action
  assert {number for number, _ in least} == {5}
  ends = [row for _, row in batches(tmp_path, 10, dataset_balance=True)]
  assert np.mean([row == 7 for _, row in plain]) < 0.25
  assert np.mean(np.array(ends) == 7) > 0.3  # 4 of 11 draws
  assert batches(tmp_path, 10, seed=1) != plain
  # Of two processes each draws half, and not the same.
  halves = [batches(tmp_path, 10, part=(index, 2)) for index in (0, 1)]
  assert len(halves[0]) == len(halves[1]) == 100
  assert halves[0] != halves[1]
  # Batch number n is the same, however often the run was interrupted.
  assert batches(tmp_path, 7, start=3) == plain[60:]


@pytest.mark.parametrize(
  'flags, stays',
  [({}, False), ({'role': 'learn'}, True), ({'offline': 'x'}, True)],
)
def test_who_sets_broken_episodes_aside(tmp_path, capsys, flags, stays):
  """Only who writes to the folder: --role learn leaves it to --role act."""
  tools.save_episodes(tmp_path, [make_episode(1, 10)])
  path = tmp_path / '20260101T000000000000-broken-10.npz'
  path.write_bytes(b'broken')
  assert {number for number, _ in batches(tmp_path, 2, **flags)} == {1}
  assert path.exists() == stays
  assert capsys.readouterr().out.count('the broken episode') == 1


def test_numbers_are_no_choices(tmp_path, capsys):
  episodes = [make_episode(n, 10) for n in (1, 2, 3)]
  episodes[0]['action'] = np.eye(2)[[0, 1] * 5]
  episodes[1]['action'] = np.array([[0, 1], [1, 1]] * 5)  # one choice, then two
  tools.save_episodes(tmp_path, episodes)
  found = batches(tmp_path, 3, action_dist='onehot')
  assert {number for number, _ in found} == {1}
  text = 'actions that are no one-hot vectors'
  assert capsys.readouterr().out.count(text) == 2


def test_episodes_with_actions_of_another_size_are_in_no_batch(tmp_path):
  episodes = [make_episode(n, 10) for n in (1, 2)]
  episodes[1]['action'] = episodes[1]['action'][:, :1]
  paths = tools.save_episodes(tmp_path, episodes)
  assert {number for number, _ in batches(tmp_path, 3, actions=2)} == {1}
  assert [path.exists() for path in paths] == [True, False]


def test_batches_hold_float32(tmp_path):
  rows = {k: v.astype(np.float64) for k, v in make_episode(1, 6).items()}
  rows['image'] = make_episode(1, 6)['image']
  tools.save_episodes(tmp_path, [rows])
  config = cli.AttrDict(batch_size=2, batch_length=3, dataset_balance=False)
  config.update(seed=0, replay_capacity=0, action_repeat=1)
  inputs = dict(image=(4, 4, 3), position=(3,))
  batch = next(replay.load_dataset(tmp_path, config, inputs=inputs))
  kinds = {key: value.dtype for key, value in batch.items()}
  assert kinds.pop('image') == np.uint8
  assert set(kinds) == {'position', 'action', 'reward', 'discount'}
  assert set(kinds.values()) == {np.dtype(np.float32)}


def test_observations_that_are_not_finite_are_set_aside(tmp_path):
  episodes = [make_episode(1, 6), make_episode(2, 6)]
  episodes[1]['position'][3, 0] = np.inf
  tools.save_episodes(tmp_path, episodes)
  windows = draw(tmp_path, 30, 30, 6, shapes=dict(position=(3,)))
  assert {identify(w)[0] for w in windows} == {1}
  assert len(list(tmp_path.glob('*.broken'))) == 1
