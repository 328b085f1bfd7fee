"""Metrics, events and pictures."""

import io
import json
import os
import pathlib
import pty
import subprocess
import sys
import textwrap

from logdirs import read_metrics

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import imageio.v3 as imageio
import numpy as np
import pytest
import tensorflow as tf

import logger
import tools

# --- Logging ----------------------------------------------------------------


def make_frames(count=7):
  """Frames that stay different in a GIF's palette."""
  frames = np.zeros((count, 16, 24, 3), np.uint8)
  for index in range(count):
    frames[index, :, 3 * index : 3 * index + 3] = [255, 40 * (index % 4), 0]
  return frames


def test_encode_gif():
  frames = make_frames()
  content = tools.encode_gif(frames, fps=20)
  assert content[:6] in (b'GIF89a', b'GIF87a')
  decoded = imageio.imread(io.BytesIO(content), extension='.gif', index=None)
  assert decoded.shape == frames.shape
  difference = np.abs(decoded.astype(int) - frames)
  assert difference.max() <= 8, 'frames come back in order'
  meta = imageio.immeta(io.BytesIO(content), extension='.gif', index=0)
  assert meta['duration'] == 50 and meta['loop'] == 0


def test_encode_gif_keeps_the_colors_of_few_pixels():
  """A small target on a background of more colors than a palette has."""
  rows, columns = np.mgrid[:64, :64]
  frame = np.stack([4 * rows, 4 * columns, 2 * (rows + columns)], -1)
  frame = frame.astype(np.uint8)
  frame[40:42, 20:22] = [250, 20, 30]
  content = tools.encode_gif(np.stack([frame, frame[::-1]]), fps=20)
  decoded = imageio.imread(io.BytesIO(content), extension='.gif', index=None)
  difference = np.abs(decoded[0].astype(int) - frame)
  assert difference.max() <= 40  # 71 by median cut, of the target
  assert difference.mean() < 6


def read_events(folder):
  values = []
  for path in sorted(pathlib.Path(folder).glob('events.*')):
    for record in tf.data.TFRecordDataset(str(path)):
      event = tf.compat.v1.Event.FromString(record.numpy())
      values += [(event.step, value) for value in event.summary.value]
  return values


@pytest.mark.parametrize('floating', [False, True])
def test_video_summary(tmp_path, floating):
  frames = make_frames()
  video = np.stack([frames, frames[::-1]])
  writer = tf.summary.create_file_writer(str(tmp_path))
  with writer.as_default():
    given = (video / 255).astype(np.float32) if floating else video
    tools.video_summary('openl', given, step=12)
  writer.close()
  ((step, value),) = read_events(tmp_path)
  assert (step, value.tag) == (12, 'openl')
  assert (value.image.height, value.image.width) == (16, 48)
  assert value.image.colorspace == 3
  decoded = imageio.imread(
    value.image.encoded_image_string, extension='.gif', index=None
  )
  expected = np.concatenate([frames, frames[::-1]], 2)
  assert decoded.shape == expected.shape
  assert np.abs(decoded.astype(int) - expected).max() <= 8


def test_logger(tmp_path, capsys):
  log = logger.Logger(tmp_path, total=100)
  log.scalars(10, {'loss': np.float32(0.5), 'norm': tf.constant(2.0)})
  log.scalars(20, {'train/return': 3, 'div': 4, 'actor_grad_norm': 5})
  log.say('a line')
  log.progress(20, 3)
  log.video(20, 'clip', make_frames()[None])
  log.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 10, 'loss': 0.5, 'norm': 2.0},
    {'step': 20, 'train/return': 3.0, 'div': 4.0, 'actor_grad_norm': 5.0},
  ]
  events = [(step, value.tag) for step, value in read_events(tmp_path)]
  assert events == [
    (10, 'loss'),
    (10, 'norm'),
    (20, 'train/return'),
    (20, 'world_model/div'),
    (20, 'optimizers/actor_grad_norm'),
    (20, 'clip'),
  ]
  out, err = capsys.readouterr()
  assert out == 'a line\n' and err == ''


@pytest.mark.parametrize(
  'last, kept',
  [('{"step": 20, "lo', []), ('20', []), ('{"step": 20}', [20])],
)
def test_logger_cuts_half_a_line(tmp_path, last, kept):
  """Not a whole one that an editor left without an end, nor links."""
  path, real = tmp_path / 'metrics.jsonl', tmp_path / 'real'
  real.write_text('{"step": 10}\n' + last)
  path.symlink_to(real)
  log = logger.Logger(tmp_path, total=100, step=10)
  log.scalars(30, {'loss': 1})
  log.close()
  assert [line['step'] for line in read_metrics(tmp_path)] == [10, *kept, 30]
  assert path.is_symlink()


def test_logger_reads_over_what_is_no_number(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  odd = ('{"step": Infinity, "loss": 1}', f'{{"step": {"9" * 400}, "loss": 1}}')
  odd += ('[1]', '{"step": 3, "loss": NaN}', '{"step": 3, "loss": null}')
  path.write_text(
    '\n'.join([*odd, '{"step": 10, "loss": 2}', '[' * 10**5]) + '\n'
  )
  log = logger.Logger(tmp_path, total=100)
  assert log.steps_of('loss') == [10] and log.largest('loss') == 2
  log.close()


def test_logger_keeps_whole_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 10}\n{"step": 20}\n')
  logger.Logger(tmp_path, total=100).close()
  assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_a_terminal_that_is_gone_costs_nothing(tmp_path):
  """What is printed before the signal of that comes fails."""
  code = f"""
    import logger
    log = logger.Logger({str(tmp_path)!r}, 100)
    input()
    for line in ('first', 'second'):
      log.say(line)
    log.scalars(7, dict(fps=1))
    log.flush()
  """
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(code)],
    cwd=pathlib.Path(logger.__file__).parent,
    stdin=subprocess.PIPE,
    stdout=theirs,
    stderr=theirs,
  )
  os.close(theirs)
  os.close(ours)
  process.communicate(b'\n', timeout=120)
  assert process.returncode == 0
  assert read_metrics(tmp_path)[-1]['step'] == 7
