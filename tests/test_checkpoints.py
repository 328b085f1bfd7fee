"""Checkpoints, whole and broken, and the lock of a logdir."""

import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import threading

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import keras
import numpy as np
import pytest
import tensorflow as tf

import checkpoints
import cli
import layers
import tools

# --- Checkpoints and signals ------------------------------------------------


def make_objects(scaling=True):
  layer = keras.layers.Dense(3)
  layer.build((None, 2))
  optimizer = tools.Adam('opt', [layer], 0.1, loss_scaling=scaling)
  objects = {
    'layer': layer,
    'optimizer': optimizer.optimizer,
    'every': tools.Every(10),
    'generator': tf.random.Generator.from_seed(3),
  }
  return objects, optimizer


def dense_step(objects, optimizer, step):
  """One update and one step of everything; returns all that it gave."""
  x = objects['generator'].normal([4, 2])
  with layers.Tapes(optimizer.variables) as tapes:
    loss = tf.reduce_mean(objects['layer'](x) ** 2)
  optimizer.apply(optimizer.gradient(tapes, loss))
  weights = [v.numpy().tolist() for v in objects['layer'].variables]
  slots = [v.numpy().tolist() for v in objects['optimizer'].variables]
  return weights, slots, objects['every'](step), float(loss)


def test_checkpoint_round_trip(tmp_path):
  objects, optimizer = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  assert saver.restore() is None
  for step in (3, 8):
    dense_step(objects, optimizer, step)
  path = saver.save(2)
  expected = [dense_step(objects, optimizer, s) for s in (12, 13, 14)]

  fresh, fresh_optimizer = make_objects()
  fresh['generator'].normal([7])
  restored = checkpoints.Checkpoints(tmp_path, **fresh).restore()
  assert restored == path
  # Weights, slots, loss scale, schedule and noise go on as if unbroken.
  actual = [dense_step(fresh, fresh_optimizer, s) for s in (12, 13, 14)]
  assert actual == expected
  assert [a[2] for a in actual] == [False, True, False]


def test_checkpoints_keep_the_newest_two(tmp_path):
  objects, _ = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  for number in (1, 5, 9):
    saver.save(number)
  kept = sorted(p.stem for p in tmp_path.glob('*.index'))
  assert kept == ['ckpt-5', 'ckpt-9']
  assert saver.restore().endswith('ckpt-9')


def test_checkpoint_that_lacks_something_is_refused(tmp_path):
  objects, _ = make_objects()
  checkpoints.Checkpoints(tmp_path, **objects).save(1)
  head = keras.layers.Dense(3)
  head.build((None, 2))
  with pytest.raises(cli.UserError, match='not made by this version'):
    checkpoints.Checkpoints(tmp_path, head=head, **objects).restore()


def test_checkpoint_of_another_type_is_refused(tmp_path, capfd):
  checkpoints.Checkpoints(tmp_path, count=tf.Variable(1.0)).save(1)
  count = tf.Variable(1, dtype=tf.int64)
  with pytest.raises(cli.UserError, match='not made by this version'):
    checkpoints.Checkpoints(tmp_path, count=count).restore()
  assert (tmp_path / 'ckpt-1.index').exists()


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
@pytest.mark.parametrize('damage', ['cut', 'empty', 'flip', 'gone'])
def test_broken_checkpoint_gives_way_to_the_one_before(
  tmp_path, part, damage, capsys
):
  objects, optimizer = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  expected = []
  for number in (1, 2):
    dense_step(objects, optimizer, number)
    expected.append(objects['layer'].get_weights())
    saver.save(number)
  path = tmp_path / f'ckpt-2.{part}'
  content = path.read_bytes()
  middle = len(content) // 2
  flipped = bytes([content[middle] ^ 1])
  if damage == 'gone':
    path.unlink()
  else:
    path.write_bytes(
      dict(
        cut=content[:middle],
        empty=b'',
        flip=content[:middle] + flipped + content[middle + 1 :],
      )[damage]
    )
  (tmp_path / 'checkpoint').write_text('nonsense')
  fresh, fresh_optimizer = make_objects()
  again = checkpoints.Checkpoints(tmp_path, **fresh)
  before = sorted(tmp_path.iterdir())
  assert again.restore() == str(tmp_path / 'ckpt-1')
  assert sorted(tmp_path.iterdir()) == before  # who only reads moves nothing
  assert again.restore(repair=True) == str(tmp_path / 'ckpt-1')
  for a, b in zip(fresh['layer'].get_weights(), expected[0], strict=True):
    np.testing.assert_array_equal(a, b)
  if (part, damage) not in (('index', 'gone'), ('index', 'empty')):
    assert 'ckpt-2 is broken' in capsys.readouterr().out
    # What is set aside was read; what is not whole may be on its way here.
    aside = {p.name for p in tmp_path.glob('ckpt-2.*.broken')}
    assert len(aside) == (0 if damage == 'gone' else 2)
  whole = damage == 'gone' and part != 'index'
  assert (tmp_path / 'ckpt-2.index').exists() == whole
  # And it goes on from there.
  dense_step(fresh, fresh_optimizer, 3)
  again.save(1)
  assert again.restore(repair=True).endswith('ckpt-3' if whole else 'ckpt-2')


NAMES = ['a [1]*? ~ü:%s', 'exp[1]', 'back\\slash', 'new\nline', '{a,b}.zip']


@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_in_folders_of_any_name(tmp_path, name, capfd):
  objects, optimizer = make_objects()
  folder = tmp_path / name / 'saved'
  folder.parent.mkdir()
  saver = checkpoints.Checkpoints(folder, **objects)
  assert saver.restore(repair=True) is None
  for number in (1, 2, 3):
    expected = dense_step(objects, optimizer, number)[0]
    assert saver.save(number) == str(folder / f'ckpt-{number}')
  fresh, _ = make_objects()
  again = checkpoints.Checkpoints(folder, **fresh)
  assert again.restore(repair=True) == str(folder / 'ckpt-3')
  for a, b in zip(fresh['layer'].get_weights(), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  names = {p.name for p in folder.iterdir()}
  kinds = ('index', 'data-00000-of-00001')
  expected = {f'ckpt-{n}.{kind}' for n in (2, 3) for kind in kinds}
  assert names == {'checkpoint', *expected}
  # Other tools find the newest.
  state = tf.train.get_checkpoint_state(str(tmp_path / name / 'saved'))
  assert state.model_checkpoint_path.endswith('ckpt-3')
  assert capfd.readouterr() == ('', '')
  # A broken one is told from a path that TensorFlow does not like.
  path = folder / 'ckpt-3.index'
  path.write_bytes(path.read_bytes()[:-9])
  assert again.restore(repair=True) == str(folder / 'ckpt-2')
  out = capfd.readouterr().out
  assert cli.printable(f'{folder}/ckpt-3 is broken') in out
  assert '/proc/' not in out
  assert again.newest_trace() == 3


def test_a_path_that_tensorflow_cannot_take_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / 'a*'
  folder.mkdir()
  assert checkpoints.plain_path(tmp_path) == (str(tmp_path), None)
  exists = pathlib.Path.exists
  monkeypatch.setattr(  # as where there is no /proc
    pathlib.Path, 'exists', lambda p: exists(p) and str(p)[:5] != '/proc'
  )
  with pytest.raises(cli.UserError, match=r'without any of \[ \] \* \?'):
    checkpoints.plain_path(folder)


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
def test_a_checkpoint_that_cannot_be_read_stays(tmp_path, part):
  """Only wrong bytes are set aside; here there is a folder in their place."""
  objects, optimizer = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  for number in (1, 2):
    dense_step(objects, optimizer, number)
    saver.save(number)
  path = tmp_path / f'ckpt-2.{part}'
  path.rename(tmp_path / 'kept')
  path.mkdir()
  (path / 'file').write_text('')
  before = {p.name for p in tmp_path.rglob('*')}
  with pytest.raises(cli.UserError, match=f'{path} cannot be read'):
    saver.restore(repair=True)
  assert {p.name for p in tmp_path.rglob('*')} == before
  (path / 'file').unlink()
  path.rmdir()
  (tmp_path / 'kept').rename(path)
  assert saver.restore(repair=True).endswith('ckpt-2')


def test_traces_of_checkpoints(tmp_path):
  saver = checkpoints.Checkpoints(tmp_path / 'saved', **make_objects()[0])
  assert saver.newest_trace() == 0
  for number in (0, 12, 9):
    saver.save(number)
  assert saver.newest_trace() == 13
  for path in (tmp_path / 'saved').glob('*.index'):
    path.unlink()
  # Without any index nothing is whole, and nothing is swept away.
  assert saver.restore(repair=True) is None
  assert saver.newest_trace() == 13


def test_restore_sweeps_what_a_killed_run_left(tmp_path):
  objects, _ = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  for number in (4, 5):
    saver.save(number)
  (tmp_path / 'backup').mkdir()  # what others put there stays
  (tmp_path / 'backup/ckpt-1.index').write_text('x')
  (tmp_path / 'ckpt-notes.txt').write_text('x')
  before = {p.name for p in tmp_path.iterdir()}
  (tmp_path / 'ckpt-6_temp').mkdir()
  (tmp_path / 'ckpt-6_temp/part-0').write_text('x')
  (tmp_path / 'ckpt-6.data-00000-of-00001').write_text('x')
  (tmp_path / 'checkpoint.tmp123').write_text('x')
  (tmp_path / '.checkpoint.123.tmp').write_text('x')
  for name in ('index', 'data-00000-of-00001'):
    shutil.copy(tmp_path / f'ckpt-4.{name}', tmp_path / f'ckpt-3.{name}')
  saver.restore()
  assert len(list(tmp_path.iterdir())) == len(before) + 6  # reading only
  assert saver.restore(repair=True).endswith('ckpt-5')
  assert {p.name for p in tmp_path.iterdir()} == before


def test_checkpoints_never_write_over_each_other(tmp_path):
  objects, _ = make_objects()
  saver = checkpoints.Checkpoints(tmp_path, **objects)
  paths = [saver.save(7) for _ in range(3)]
  assert [p.rsplit('-', 1)[1] for p in paths] == ['7', '8', '9']


class Number:
  """In the place of an agent."""

  def __init__(self, *args, inputs=None):
    self.value = tf.Variable(0.0)

  def knowledge(self):
    return dict(value=self.value)


def test_what_a_run_replaces_meanwhile_is_no_hindrance(tmp_path, monkeypatch):
  run = checkpoints.Checkpoints(
    tmp_path / 'checkpoints', value=tf.Variable(5.0)
  )
  run.save(1)
  restore = checkpoints.Checkpoints._restore

  def late(self, number):
    if number == 1:  # the run beside us saves two, and removes this one
      run.save(2)
      run.save(3)
    return restore(self, number)

  monkeypatch.setattr(checkpoints.Checkpoints, '_restore', late)
  config = cli.AttrDict(logdir=tmp_path)
  assert checkpoints.load_agent(config, Number, None, {}).value == 5


def test_run_state_round_trip(tmp_path):
  held = dict(metrics=dict(loss=[0.1, 2.5]), count=3)
  state = checkpoints.RunState(lambda: held)
  checkpoints.Checkpoints(tmp_path, run=state).save(1)
  fresh = checkpoints.RunState(dict)
  checkpoints.Checkpoints(tmp_path, run=fresh).restore()
  assert fresh.restored == held


def test_lock_names_its_holder(tmp_path, capsys):
  lock = checkpoints.Lock(tmp_path)
  with pytest.raises(cli.UserError, match=f'use by process {os.getpid()} on'):
    checkpoints.Lock(tmp_path)
  os.utime(tmp_path / 'lock', (2e9, 2e9))
  with pytest.raises(cli.UserError, match='for 0:00:00: stop that'):
    checkpoints.Lock(tmp_path)
  lock.release()
  checkpoints.Lock(tmp_path).release()
  assert capsys.readouterr().out == ''


def test_lock_of_any_bytes(tmp_path, capsys):
  (tmp_path / 'lock').write_bytes(b'\xff')
  with checkpoints.locked(tmp_path, 'both'):
    assert (tmp_path / 'lock').read_text().startswith('process')
  (tmp_path / 'lock').write_bytes(b'\xff')
  (tmp_path / 'act').mkdir()
  with checkpoints.locked(tmp_path, 'act'):
    pass


@pytest.mark.parametrize(
  'first, second, message',
  [
    ('act', 'both', 'act is in use by process'),
    ('act', 'act', 'act is in use by process'),
    ('both', 'act', 'act is in use by process'),
    ('both', 'learn', 'is in use by process'),
    ('learn', 'act', ''),
    ('act', 'learn', ''),
  ],
)
def test_one_process_acts_and_one_learns(tmp_path, first, second, message):
  (tmp_path / 'act').mkdir()
  expected = contextlib.nullcontext()
  if message:
    expected = pytest.raises(cli.UserError, match=message)
  locked = functools.partial(checkpoints.locked, tmp_path)
  with locked(first), expected, locked(second):
    pass


def test_lock_is_had_though_another_looks_for_a_moment(tmp_path):
  path = tmp_path / 'lock'
  path.touch()
  with path.open() as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    timer = threading.Timer(0.03, fcntl.flock, [file, fcntl.LOCK_UN])
    timer.start()
    checkpoints.Lock(tmp_path).release()
    timer.join()


def test_lock_of_a_killed_process_is_taken_over(tmp_path, capsys):
  code = 'import os, sys, checkpoints; lock = checkpoints.Lock(sys.argv[1]); '
  code += 'os.kill(os.getpid(), 9)'
  root = pathlib.Path(tools.__file__).parent
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=root)
  checkpoints.Lock(tmp_path).release()
  assert 'which did not end properly' in capsys.readouterr().out
