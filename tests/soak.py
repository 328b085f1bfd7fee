"""Kills a run again and again, and checks that nothing is lost.

    python tests/soak.py --kills 20 --logdir /tmp/soak
    python tests/soak.py --hours 8 --task dmc_walker_walk --logdir /tmp/soak

Starts `dreamer.py` on one logdir and kills -9 the trainer, or one of its
environment workers, at random times; a killed trainer is started again. After
each start and at the end it checks: no episode that was complete is lost or
changed, all of them can be read, the number of updates falls back to no less
than the newest checkpoint's, steps in metrics.jsonl go back only where a line
says `resumed`, and neither processes nor temporary files stay. With
--deterministic True and its rewinding, episodes and metrics may be made again.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

SCRIPT = pathlib.Path(__file__).parents[1] / 'dreamer.py'


class Soak:
  """One logdir, and what has happened to it.

  Args:
    logdir: folder, made by the first start.
    task: its name.
    seed: of the times and victims.
    flags: further ones for `dreamer.py`.
  """

  def __init__(self, logdir, task='toy_reach', seed=0, flags=()):
    self.logdir = pathlib.Path(logdir)
    self.counts = dict(trainer=0, worker=0, starts=0)
    self._command = [sys.executable, str(SCRIPT), f'--logdir={logdir}']
    self._command += ['--preset=debug', f'--task={task}', '--precision=32']
    self._command += ['--steps=1e9', '--save_every=0.02', *flags]
    self._random = random.Random(seed)
    self._episodes = {}
    self._process = None

  def start(self):
    """Starts or resumes the run, and waits until it learns."""
    self.counts['starts'] += 1
    before = self._updates_saved()
    self.logdir.parent.mkdir(parents=True, exist_ok=True)
    log = (self.logdir.parent / f'{self.logdir.name}.out').open('ab+')
    start = log.seek(0, os.SEEK_END)
    self._process = subprocess.Popen(
      self._command, stdout=log, stderr=subprocess.STDOUT
    )
    end = time.time() + 300
    while True:
      log.seek(start)
      text = log.read().decode()
      if 'First update done' in text:
        break
      assert self._process.poll() is None, f'it does not start:\n{text}'
      assert time.time() < end, f'it does not learn:\n{text}'
      time.sleep(0.2)
    if before:
      resumed = re.search(r'Resumed at step \d+, (\d+) updates', text)
      assert int(resumed[1]) >= before, (before, text)
    self._check_episodes()

  def kill(self):
    """Kills the trainer or a worker after some time; starts it again."""
    time.sleep(self._random.uniform(0, 6))
    self._check_episodes()
    workers = self._workers()
    if workers and self._random.random() < 0.3:
      self.counts['worker'] += 1
      victim = self._random.choice(workers)
      with contextlib.suppress(ProcessLookupError):  # just replaced
        os.kill(victim, signal.SIGKILL)
      return
    self.counts['trainer'] += 1
    self._process.kill()
    self._process.wait()
    self._check_gone(workers)
    self.start()

  def finish(self):
    """Ends the run as a user would, and checks what it leaves behind."""
    workers = self._workers()
    self._process.terminate()
    assert self._process.wait(120) == 0
    self._check_gone(workers)
    self._check_episodes()
    strays = [
      p
      for p in self.logdir.rglob('*')
      if re.search(r'\.tmp|_temp|\.broken', p.name)
    ]
    assert not strays, strays
    assert len(list(self.logdir.glob('checkpoints/*.index'))) <= 2
    self._check_metrics()

  def close(self):
    if self._process and self._process.poll() is None:
      self._process.kill()
      self._process.wait()

  def _updates_saved(self):
    """Updates in the newest checkpoint, None without one."""
    path = tf.train.latest_checkpoint(str(self.logdir / 'checkpoints'))
    name = 'updates/.ATTRIBUTES/VARIABLE_VALUE'
    return path and int(tf.train.load_variable(path, name))

  def _workers(self):
    path = f'/proc/{self._process.pid}/task/{self._process.pid}/children'
    children = pathlib.Path(path).read_text().split()
    return [int(pid) for pid in children]

  def _check_gone(self, pids):
    end = time.time() + 30
    while any(pathlib.Path(f'/proc/{pid}').exists() for pid in pids):
      assert time.time() < end, f'workers stay: {pids}'
      time.sleep(0.1)

  def _check_episodes(self):
    """All that were ever seen are there, whole and as they were."""
    found = {p.name: p for p in self.logdir.glob('episodes/*.npz')}
    lost = set(self._episodes) - set(found)
    assert not lost, f'lost: {lost}'
    for name, path in found.items():
      if name in self._episodes:
        assert path.stat().st_size == self._episodes[name]
        continue
      with np.load(path, allow_pickle=False) as episode:
        rows = {k: len(episode[k]) for k in episode.files}
      assert set(rows.values()) == {int(path.stem.rsplit('-', 1)[1])}
      self._episodes[name] = path.stat().st_size

  def _check_metrics(self):
    step, updates = 0, 0
    for line in (self.logdir / 'metrics.jsonl').read_text().splitlines():
      record = json.loads(line)
      if 'resumed' in record:
        step, updates = record['step'], record['updates']
      if 'updates' in record:
        assert record['updates'] >= updates, line
        updates, step = record['updates'], max(step, record['step'])

  def summary(self):
    return dict(self.counts, episodes=len(self._episodes), lost=0)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--logdir', required=True)
  parser.add_argument('--task', default='toy_reach')
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--hours', type=float, default=0, help='instead of kills')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  soak = Soak(args.logdir, args.task, args.seed)
  begin, kills = time.time(), 0
  try:
    soak.start()
    while (
      time.time() < begin + 3600 * args.hours
      if args.hours
      else kills < args.kills
    ):
      soak.kill()
      kills += 1
      print(kills, soak.summary(), flush=True)
    soak.finish()
  finally:
    soak.close()
  minutes = (time.time() - begin) / 60
  print(f'All checks held. {soak.summary()} in {minutes:.1f} minutes.')


if __name__ == '__main__':
  main()
