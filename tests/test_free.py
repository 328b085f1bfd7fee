"""Acting and learning at paces of their own, in one process and in two."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import agent_spec
import checkpoints
import cli
import commandline
import distribute
import dreamer
import episode_files
import free
import logger
import processes
import run_folders
import run_kinds
import run_setup
import runfile
import spaces
from agents import eagerly
from learner import Learner
from logdirs import read_episodes, read_metrics

FLAGS = (
  *('--learner=free', '--prefill=100', '--max_ratio=2'),
  *('--eval_every=100', '--log_every=50'),
)
STATE = *FLAGS, '--inputs=state', '--log_images=False'


def lines(folder, name):
  """(step, value) of all lines of a metrics.jsonl that have a name."""
  return [(x['step'], x[name]) for x in read_metrics(folder) if name in x]


def updates_saved(logdir):
  return max(int(p.stem[5:]) for p in logdir.glob('checkpoints/ckpt-*.index'))


def report_missed(logdir, folder):
  """Prints it; machines that are busy miss more."""
  for name in ('missed', 'test_missed'):
    shares = [f'{100 * x:.1f}' for _, x in lines(folder, name)]
    print(f'{logdir.name}: {name}, in % of an episode: {" ".join(shares)}')


# --- The parts ---------------------------------------------------------------


def make_agent(tmp_path, *flags):
  words = [f'--logdir={tmp_path}', '--preset=debug', '--task=toy_robot']
  config = commandline.parse_flags([*words, '--inputs=state', '--learner=free'])
  config.update(dict(x.split('=') for x in flags))
  space = spaces.gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
  return dreamer.Dreamer(config, space, inputs=dict(state=(4,)))


@pytest.fixture
def pair(tmp_path):
  """An agent that learns, and an actor on a copy of it."""
  source, copy = make_agent(tmp_path), make_agent(tmp_path)
  actor = free.ActingCopy(copy, source)
  actor.prepare(1, seed=0)
  return source, copy, actor


def test_actor_has_the_weights_that_it_took(pair):
  source, copy, actor = pair
  obs = dict(state=np.full([1, 4], 0.5, np.float32))
  state = copy.world.dynamics.initial(1), tf.zeros([1, 2])

  def act(agent):
    agent.reseed(0)
    return agent(obs, np.array([False]), state)[0]

  before = act(copy)
  assert (act(source) == before).all()
  for layer in source.networks().values():
    for weight in layer.weights:
      weight.assign(weight + 0.1)
  source.updates.assign(7)
  moved = act(source)
  assert (moved != before).any()
  assert (act(copy) == before).all()
  actor.take()
  assert (act(copy) == moved).all()
  assert int(copy.updates) == 7


def test_nothing_is_compiled_once_acting_begins(pair):
  _, copy, actor = pair
  count = copy.policy.experimental_get_tracing_count()
  state = None
  for reset in (True, False, False):
    obs = dict(state=np.zeros([1, 4], np.float64))
    _, state = actor(obs, np.array([reset]), state)
  actor(obs, np.array([True]), None, training=False)
  assert copy.policy.experimental_get_tracing_count() == count


@pytest.fixture
def learner(tmp_path):
  """One of `--role learn` with two episodes, and what they are counted by."""
  agent = make_agent(tmp_path)
  rng = np.random.default_rng(0)
  for _ in range(2):
    episode = dict(
      state=rng.normal(size=[51, 4]).astype(np.float32),
      action=rng.uniform(-1, 1, [51, 2]).astype(np.float32),
      reward=rng.uniform(size=51).astype(np.float32),
      discount=np.ones(51, np.float32),
    )
    episode_files.save_episodes(tmp_path / 'episodes', [episode])
  log = logger.Logger(tmp_path, 1000)
  agent.config.update(role='learn', max_ratio=0.1, pretrain=4)
  run = run_kinds.LearnerRun(
    agent.config, distribute.Team(), cli.StopSignal(), log
  )
  yield free.FreeLearner(agent, run), run
  log.close()


def test_actor_counts_whole_episodes_as_the_learner_does(learner, pair):
  """Or it ends before there are --steps, which the learner waits for."""
  beside, run = learner
  source, copy, _ = pair
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  follower = free.Follower(source, run, copy)
  follower.step += 70  # a lost episode's 50, and some of the next
  free.ActorProgress(run, follower).after_portion()
  assert follower.step == beside._run.steps() == 100


def test_age_of_weights_begins_when_they_come(learner, pair):
  """Not when the actor began to wait for them."""
  _, run = learner
  source, copy, _ = pair
  source.updates.assign(9)
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  runfile.write_config(run.config, dict(state=(4,)), source.action_space)
  follower = free.Follower(source, run, copy)
  folder = run.config.logdir / 'checkpoints'
  checkpoints.Checkpoints(folder, **source.knowledge()).save(9)
  follower._came -= 1000
  follower._wait()
  follower._write_summaries()
  ((_, age),) = lines(run.config.logdir, 'weights_age')
  assert 0 <= age < 500


def test_follower_acts_with_what_is_saved_meanwhile(learner, pair, monkeypatch):
  beside, run = learner
  source, copy, _ = pair
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  follower = free.Follower(source, run, copy)
  monkeypatch.setattr(follower, 'LOOK', 0.0)
  other = beside._agent  # which learns
  folder = run.config.logdir / 'checkpoints'
  saved = checkpoints.Checkpoints(folder, **other.knowledge())
  for count in (3, 5):
    other.updates.assign(count)
    for layer in other.networks().values():
      for weight in layer.weights:
        weight.assign(weight + count)
    saved.save(count)
    follower._follow()
    assert int(copy.updates) == follower.updates == count
    for name, layer in other.networks().items():
      pairs = zip(layer.weights, copy.networks()[name].weights, strict=True)
      assert all((x.numpy() == y.numpy()).all() for x, y in pairs), name


def test_updates_stop_at_the_largest_ratio(learner):
  learner, run = learner
  learner.pretrain()
  assert learner.updates == 4
  learner.step = run.steps()
  assert learner.step == 100
  saves = []
  learner.after_update = lambda: saves.append(learner.updates)
  for _ in range(20):
    learner.learn_on()
  assert learner.updates == 10
  # A checkpoint may come due while updates wait.
  assert saves == [*range(5, 11), *[10] * 14]


@pytest.mark.slow
@eagerly()
def test_while_updates_wait_exploration_and_the_log_go_on(learner, tmp_path):
  source, copy = learner[0]._agent, make_agent(tmp_path)
  source.config.update(max_ratio=0.1, pretrain=1, log_every=50)
  both, logged = free.FreeLearner(source, learner[1], copy), []
  both._write_summaries = lambda: logged.append(both.step)
  both.step = 10
  both.learn_on()
  both.step = 200
  source.updates.assign(20)  # all that --max_ratio allows
  both.learn_on()
  assert both.updates == 20 and int(copy.step) == 200
  both.step = 260
  source.updates.assign(26)
  both.learn_on()
  assert int(copy.step) == 260 and logged == [10, 200, 260]


def test_checkpoints_come_as_often_as_they_are_cheap(learner, monkeypatch):
  learner, run = learner
  progress = free.LearnerProgress(run, learner)
  learner.after_update = progress.save_if_due
  monkeypatch.setattr(progress, 'LEAST', 0.0)
  monkeypatch.setattr(progress, 'SHARE', 1e9)
  saved = checkpoints.Checkpoints(run.config.logdir / 'checkpoints')
  learner.learn_on()
  assert saved.newest() == 1
  learner.learn_on()
  assert saved.newest() == 2
  monkeypatch.setattr(progress, 'SHARE', 1e-9)
  learner.learn_on()
  assert saved.newest() == 2
  monkeypatch.setattr(progress, 'SHARE', 1e9)
  progress.save_if_due()
  assert saved.newest() == 3
  progress.save_if_due()  # there is nothing new
  assert saved.newest() == 3


def test_updates_may_follow_from_steps_again(learner, tmp_path):
  """From where it resumes: those of earlier steps are not made up for."""
  first, run = learner
  first.step = 1000
  first.pretrain()
  saver = checkpoints.Checkpoints(tmp_path / 'saved', **first.trackable())
  saver.save(1)
  agent = make_agent(tmp_path)
  agent.config.update(deterministic=True)  # to wait for updates
  run = run_kinds.Run(agent.config, distribute.Team(), run.stop, run.logger)
  again = Learner(agent, run)
  saver = checkpoints.Checkpoints(tmp_path / 'saved', **again.trackable())
  assert saver.restore()
  obs = dict(state=np.zeros([1, 4]))
  counts = {}
  for step in (1000, 1001, 1098, 1099, 1100):
    again.step = step
    again(obs, np.array([True]))
    counts[step] = again.updates
  assert counts == {1000: 4, 1001: 4, 1098: 4, 1099: 4, 1100: 9}
  again.halt()


@pytest.mark.parametrize('text', [None, '{"config": {}}'])
def test_learner_whom_nobody_told_what_the_agent_sees(tmp_path, text):
  for folder in (tmp_path / 'act', tmp_path) if text else ():
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(text)
  with pytest.raises(cli.UserError, match='with --role act first'):
    agent_spec.of_actor(tmp_path)


def test_no_update_is_due_after_the_end(learner):
  """Or the next run, if it is --learner scheduled, would make it up."""
  learner, _ = learner
  pending = int(learner._pending)
  learner.halt()
  learner._make_update()
  assert int(learner._pending) == pending and learner.updates == 0


@pytest.mark.slow
@eagerly()
def test_each_update_is_acted_with(learner, tmp_path):
  source, copy = learner[0]._agent, make_agent(tmp_path)
  both = free.FreeLearner(source, learner[1], copy)
  both.learn_on()
  assert int(copy.updates) == 1
  for name, layer in source.networks().items():
    pairs = zip(layer.weights, copy.networks()[name].weights, strict=True)
    assert all((x.numpy() == y.numpy()).all() for x, y in pairs), name


@eagerly()
def test_evaluations_beside_a_learner_do_not_explore(learner, tmp_path):
  source, copy, (_, run) = make_agent(tmp_path), make_agent(tmp_path), learner
  run.config.update(expl='completely_random', expl_amount=1.0)
  copy.config.update(run.config)
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  for variable in copy.behavior.actor.weights:
    variable.assign(tf.zeros_like(variable))
  copy.behavior.actor._out.bias.assign([9.0, 9.0, -9.0, -9.0])
  follower = free.Follower(source, run, copy)
  obs, reset = dict(state=np.zeros((9, 4))), np.ones(9, bool)
  assert (follower.evaluate(obs, reset)[0] > 0.99).all()
  assert (follower(obs, reset)[0] < 0.9).any()


def test_weights_do_not_change_while_an_action_is_found():
  """An action is by those of one update, all of them."""

  class Agent:
    def __init__(self):
      self.weight = tf.Variable(0.0)
      self.begun, self.end = threading.Event(), threading.Event()

    def knowledge(self):
      return dict(weight=self.weight)

    def __call__(self, *args):
      self.begun.set()
      assert self.end.wait(20)
      return float(self.weight)

  agent, source = Agent(), Agent()
  actor = free.ActingCopy(agent, source)
  actor.take()
  source.weight.assign(1.0)
  with concurrent.futures.ThreadPoolExecutor() as threads:
    action = threads.submit(actor, None, None)
    assert agent.begun.wait(20)
    taken = threads.submit(actor.take)
    assert not concurrent.futures.wait([taken], 0.5).done
    agent.end.set()
    assert action.result() == 0.0
    taken.result()
  assert float(agent.weight) == 1.0


def test_actor_that_resumes_makes_the_rest_of_an_evaluation(learner, pair):
  _, run = learner
  source, copy, _ = pair
  for step in (50, 50, 50, 100):
    run.logger.scalars(step, {'test/return': 1.0})
  run.config.update(eval_episodes=3, eval_every=50)
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  made = free.ActorProgress(run, free.Follower(source, run, copy))
  made.resume()
  assert (made._evaluations, made._take_interrupted()) == (3, 1)
  assert made._should_eval.due(run.steps())


def test_actor_that_resumes_does_not_evaluate_anew(learner, pair):
  _, run = learner
  source, copy, _ = pair
  run.logger.scalars(100, {'test/return': 1.0})
  run = run_kinds.ActorRun(run.config, run.team, run.stop, run.logger)
  made = free.ActorProgress(run, free.Follower(source, run, copy))
  made.resume()
  assert made._evaluations == 1
  every = run.config.eval_every
  due = [made._should_eval.due(100 + step) for step in (0, every - 1, every)]
  assert due == [False, False, True]


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--role=act'], '--role act is of --learner free'),
    (['--max_ratio=1'], '--max_ratio bounds the updates of --learner free'),
    (['--train_every=9'], '--train_every is of --learner scheduled'),
    (['--train_steps=9'], '--train_steps is of --learner scheduled'),
    (['--deterministic=True'], '--learner free depends on the clock'),
    (['--offline=/tmp'], 'leave out --learner free'),
    (['--role=actor'], '--role takes one of both, act, learn'),
  ],
)
def test_flags_that_do_not_go_together(flags, message):
  scheduled = 'max_ratio' in flags[0] or flags == ['--role=act']
  words = [*flags, *([] if scheduled else ['--learner=free'])]
  with pytest.raises(cli.UserError, match=message):
    commandline.parse_flags(['--logdir=/tmp/x', *words])


# --- One process -------------------------------------------------------------


@pytest.mark.slow
def test_one_process_is_killed_and_resumes(tmp_path):
  logdir = tmp_path / 'run'
  flags = *FLAGS, '--inputs=image,state', '--save_every=0.05', '--steps=400'
  code, _ = processes.run_until(
    logdir, 'at step 200', signal.SIGKILL, *flags, task='toy_robot'
  )
  assert code == -signal.SIGKILL
  episodes, saved = read_episodes(logdir), updates_saved(logdir)
  assert saved >= 5
  result = processes.run(logdir, *flags, task='toy_robot')
  assert result.returncode == 0, result.stderr
  assert f'Resumed at step 200, {saved} updates' in result.stdout
  after = read_episodes(logdir)
  assert after[: len(episodes)] == episodes and len(after) == 8
  report_missed(logdir, logdir)
  # That of the episode that it was killed after may be missing.
  assert len(lines(logdir, 'missed')) >= 7
  assert len(lines(logdir, 'test_missed')) == len(lines(logdir, 'test/return'))
  ratios, updates = lines(logdir, 'ratio'), lines(logdir, 'updates')
  assert ratios[-1][1] == pytest.approx(updates[-1][1] / ratios[-1][0])
  # One at each start is waited for. In the time of the other steps there would
  # be many more.
  assert all(n <= 2 * step + 2 for step, n in updates if step)
  assert updates[-1][1] > saved


# --- Two processes -----------------------------------------------------------


class Role:
  """A process with a role, and what it prints."""

  def __init__(self, logdir, role, *flags):
    self._path = logdir.parent / f'{role}.out'
    self._start = self._path.stat().st_size if self._path.exists() else 0
    words = processes.command(
      logdir, *STATE, f'--role={role}', *flags, task='toy_robot'
    )
    with self._path.open('ab') as log:
      self.process = subprocess.Popen(words, stdout=log, stderr=log)

  @property
  def text(self):
    return self._path.read_bytes()[self._start :].decode()

  def wait_for(self, words, seconds=200):
    end = time.time() + seconds
    while words not in self.text:
      assert self.process.poll() is None, self.text
      assert time.time() < end, self.text
      time.sleep(0.1)

  def kill(self):
    self.process.kill()
    self.process.wait()

  def finish(self):
    assert self.process.wait(200) == 0, self.text


@pytest.fixture
def start():
  """Starts roles, and ends them after the test."""
  roles = []

  def start(*args):
    roles.append(Role(*args))
    return roles[-1]

  yield start
  for role in roles:
    role.kill()


def written(logdir):
  """{path: time and size} of all files of a logdir."""
  found = {}
  for path in logdir.rglob('*'):
    with contextlib.suppress(FileNotFoundError):
      about = path.stat()
      if not path.is_dir():
        name = str(path.relative_to(logdir))
        found[name] = about.st_mtime_ns, about.st_size
  return found


def of_actor(files):
  return {k: v for k, v in files.items() if k.startswith(('act/', 'episodes/'))}


def of_learner(files):
  return dict(files.items() - of_actor(files).items())


@pytest.mark.slow
def test_two_processes_are_killed_and_resume(tmp_path, start):
  """In any order; each writes its own files alone."""
  logdir, endless = tmp_path / 'run', '--steps=1e9'
  actor = start(logdir, 'act', endless)
  actor.wait_for('Waiting for the first weights')
  assert written(logdir) == of_actor(written(logdir))
  second = processes.run(logdir, *STATE, endless, task='toy_robot')
  assert second.returncode == 2
  holder = f'process {actor.process.pid} on'
  assert f'{logdir / "act"} is in use by {holder}' in second.stderr
  actor.process.send_signal(signal.SIGTERM)
  actor.finish()
  before = of_actor(written(logdir))
  learner = start(logdir, 'learn', endless)
  learner.wait_for('First update done')
  while updates_saved(logdir) < 5:
    time.sleep(0.1)
  assert of_actor(written(logdir)) == before
  # Where the learner is killed, the actor goes on.
  actor = start(logdir, 'act', endless)
  actor.wait_for('Episode: ')
  learner.kill()
  saved, rest = updates_saved(logdir), of_learner(written(logdir))
  count = actor.text.count('Episode: ')
  while actor.text.count('Episode: ') < count + 2:
    time.sleep(0.1)
  actor.kill()
  assert of_learner(written(logdir)) == rest
  # Where the actor is killed, the learner goes on; --steps ends both.
  episodes = read_episodes(logdir)
  steps = 50 * len(episodes)
  learner = start(logdir, 'learn', f'--steps={steps + 200}')
  learner.wait_for('First update done')
  assert f'Resumed at step {steps}, {saved} updates.' in learner.text
  actor = start(logdir, 'act', f'--steps={steps + 200}')
  actor.finish()
  learner.finish()
  assert f'Resumed at step {steps}.' in actor.text
  for role in (actor, learner):
    assert f'Finished at step {steps + 200}, ' in role.text
  after = read_episodes(logdir)
  assert after[: len(episodes)] == episodes
  assert len(after) == len(episodes) + 4
  report_missed(logdir, logdir / 'act')
  weights = [n for _, n in lines(logdir / 'act', 'weights')]
  assert weights == sorted(weights) and weights[-1] > saved
  assert not lines(logdir, 'train/return')
  assert lines(logdir, 'resumed') and lines(logdir / 'act', 'resumed')
  # Numbers of evaluations go on: each episode of theirs is another.
  (run,) = run_folders.find_runs([tmp_path])
  scores = [score for _, score in lines(logdir / 'act', 'test/return')]
  assert sorted(run.scores) == sorted(scores)
  assert len(set(scores)) == len(scores) >= 3
  assert run.method == 'dreamer-free-state-debug'


def test_actor_beside_one_that_acts_is_refused(tmp_path):
  config = make_agent(tmp_path).config
  code = (
    'import pathlib, sys, checkpoints\n'
    'with checkpoints.locked(pathlib.Path(sys.argv[1]), sys.argv[2]):\n'
    '  print("held", flush=True)\n'
    '  sys.stdin.read()\n'
  )
  config.role = 'act'
  for role, refused in (('both', True), ('learn', False)):
    words = [sys.executable, '-c', code, str(tmp_path), role]
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(words, cwd=processes.ROOT, **pipe) as other:
      assert b'held\n' in iter(other.stdout.readline, b'')
      if refused:
        with pytest.raises(cli.UserError, match=f'{other.pid} on .*, which'):
          run_setup.setup_logdir(config)
      else:
        run_setup.setup_logdir(config).close()
      os.kill(other.pid, signal.SIGKILL)
  run_setup.setup_logdir(config).close()  # the lock ended with its process


def test_roles_have_the_same_agent(tmp_path):
  config = make_agent(tmp_path).config
  (tmp_path / 'act').mkdir()
  (tmp_path / 'episodes').mkdir()
  (tmp_path / 'episodes/0-0-51.npz').touch()
  assert runfile.load_actor(config) is None
  runfile.write_config(config, folder=tmp_path / 'act')
  assert runfile.load_actor(config).deter_size == 16
  other = cli.AttrDict(config, deter_size=17)
  with pytest.raises(cli.UserError, match='--deter_size 16, not 17.*act/conf'):
    runfile.load_actor(other)
  runfile.write_config(config)
  with pytest.raises(cli.UserError, match='--deter_size 16, not 17'):
    runfile.check_actor(other)
