"""Runs: acting beside learning, then whole ones in real processes."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import gym
import numpy as np
import pytest
import tensorflow as tf

import agent_spec
import checkpoints
import cli
import commandline
import distribute
import dreamer
import environments
import episode_files
import evaluate
import free
import learner
import logger
import progress
import replay
import run_folders
import run_kinds
import suites
import tools
import training
from agents import eagerly, make_agent, moved, random_episode, run_here, weights
from logdirs import read_metrics
from processes import alive, wait_for

ROOT = pathlib.Path(dreamer.__file__).parent

# --- Learning beside acting ---------------------------------------------------


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A small agent, traced once for all tests, and its variables at first."""
  agent = make_agent(tmp_path_factory.mktemp('small'))
  return agent, dict(agent._c), [v.numpy() for v in variables(agent)]


def variables(agent):
  """All that changes in an agent."""
  parts = agent.trackable()
  parts['random'] = [parts['random'].state]
  parts = {k: getattr(v, 'variables', v) for k, v in parts.items()}
  return [v for part in parts.values() for v in tf.nest.flatten(part)]


@pytest.fixture
def make_learner(small):
  """The small agent as it was made, three episodes, and its run."""
  agent, config, values = small

  def make(folder, **changes):
    agent._c.clear()
    agent._c.update(config, logdir=folder, **changes)
    for variable, value in zip(variables(agent), values, strict=True):
      variable.assign(value)
    episodes = config['logdir'] / 'episodes'
    shutil.copytree(episodes, folder / 'episodes', dirs_exist_ok=True)
    log = logger.Logger(folder, 100)
    run = run_kinds.Run(agent._c, distribute.Team(), cli.StopSignal(), log)
    return learner.Learner(agent, run)

  return make


@pytest.mark.slow
def test_acting_counts_environment_steps_and_learns(make_learner, tmp_path):
  agent = make_learner(tmp_path, pretrain=2, action_repeat=3)
  image = np.zeros((2, 64, 64, 3), np.uint8)
  agent({'image': image}, np.array([True, True]))
  assert agent.step == 2 * 3  # environments times repeat
  assert agent.updates == 2
  agent.evaluate({'image': image}, np.array([True, True]))
  assert (agent.step, agent.updates) == (6, 2)


def act_once(agent):
  image = np.zeros((1, 64, 64, 3), np.uint8)
  agent({'image': image}, np.array([False]))


@pytest.mark.slow
@pytest.mark.parametrize('deterministic', [False, True])
def test_updates_keep_their_ratio_to_steps(
  make_learner, tmp_path, deterministic
):
  """Whether they overlap with acting or not."""
  agent = make_learner(
    tmp_path,
    deterministic=deterministic,
    pretrain=3,
    train_every=10,
    train_steps=4,
    action_repeat=2,
  )
  for _ in range(16):  # at steps 0, 2, ..., 30: due at 0, 10, 20, 30
    act_once(agent)
  agent.catch_up()
  assert agent.step == 32
  assert agent.updates == 3 + 3 * 4


@pytest.mark.slow
def test_acting_goes_on_while_learning(make_learner, tmp_path):
  agent = make_learner(tmp_path, pretrain=1, train_every=2, train_steps=50)
  act_once(agent)  # waits for the first update, which traces
  assert agent.updates == 1
  act_once(agent)
  assert agent.step == 4
  assert agent.updates < 51  # 50 are due, under way in the background
  agent.catch_up()
  assert agent.updates == 51
  agent = make_learner(
    tmp_path, pretrain=1, train_every=2, train_steps=20, deterministic=True
  )
  act_once(agent)
  act_once(agent)
  assert agent.updates == 21


@pytest.mark.slow
def test_failure_of_learning_reaches_the_caller(make_learner, tmp_path):
  agent = make_learner(tmp_path, pretrain=1, train_every=2, train_steps=5)
  act_once(agent)
  agent._agent.world.reward._out.bias.assign([np.nan])
  act_once(agent)
  with pytest.raises(learner.NonFiniteError, match='_loss became nan'):
    act_once(agent)
  agent.halt()


def break_beside_acting(agent):
  """Lets the one update fail that goes on beside acting."""
  act_once(agent)
  agent._agent.world.reward._out.bias.assign([np.nan])
  while not agent._learning:
    act_once(agent)
  concurrent.futures.wait([agent._learning])


@pytest.mark.slow
def test_failure_of_learning_is_raised_by_the_next_action(
  make_learner, tmp_path
):
  """Though no update is due: it would act with weights that are broken."""
  agent = make_learner(tmp_path, pretrain=1, train_every=100, train_steps=1)
  break_beside_acting(agent)
  with pytest.raises(learner.NonFiniteError, match='_loss became nan'):
    act_once(agent)
  agent.halt()


@pytest.mark.slow
def test_failure_of_learning_is_raised_before_a_stopped_run_saves(
  make_learner, tmp_path
):
  agent = make_learner(tmp_path, pretrain=1, train_every=100, train_steps=1)
  break_beside_acting(agent)
  with pytest.raises(learner.NonFiniteError, match='_loss became nan'):
    agent.halt()
  agent.halt()  # said once


@pytest.mark.slow
def test_stopped_evaluation_is_made_when_the_run_resumes(
  make_learner, tmp_path
):
  changes = dict(task='toy_reach', time_limit=20, parallel='none')
  agent = make_learner(tmp_path, **changes)
  run = agent._run
  made = progress.Progress(run, agent)
  with environments.running(run) as (_, env):
    run.stop._handle(signal.SIGTERM, None)
    with pytest.raises(cli.Stopped):
      made.evaluate_if_due(env)
    run.stop._requested = False
    for _ in range(2):
      made.evaluate_if_due(env)
  scores = [x for x in read_metrics(tmp_path) if 'test/return' in x]
  assert len(scores) == 1


@pytest.mark.slow
def test_entries_go_on_after_a_long_episode_is_dropped(make_learner, tmp_path):
  """Of 1,000 steps and more, which are made again after a resume."""
  agent = make_learner(tmp_path, log_every=50, eval_every=100)
  made = progress.Progress(agent._run, agent)
  whole = agent._run.steps()
  agent.step = whole + 1000
  agent._should_log.catch_up(agent.step)
  made._should_eval.catch_up(agent.step)
  made.save()
  again = learner.Learner(agent._agent, agent._run)
  resumed = progress.Progress(agent._run, again)
  resumed.resume()
  assert again.step == whole
  assert again._should_log.due(whole + 50)
  assert not again._should_log.due(whole - 1)
  assert 0 < resumed.steps_to_evaluation() <= 100


@pytest.mark.slow
def test_a_checkpoint_asked_for_during_another_is_made(make_learner, tmp_path):
  agent = make_learner(tmp_path, save_every=10)
  made = free.FreeProgress(agent._run, agent)
  saved, save = [], made._checkpoints.save

  def slow(number):
    saved.append(number)
    if len(saved) == 1:
      made._save_soon()  # by the main thread, meanwhile
    return save(number)

  made._checkpoints.save = slow
  made.save()
  made.save_if_due()
  made.save_if_due()
  assert len(saved) == 2


@pytest.mark.slow
def test_rates_are_those_between_two_entries(make_learner, tmp_path):
  agent = make_learner(tmp_path)
  marks = [
    dict(now=1.0, step=100, updates=3),
    dict(now=5, step=300, updates=43),
  ]
  assert agent._rates(*marks) == dict(fps=50)
  beside = object.__new__(free.FreeLearner)
  assert beside._rates(*marks) == dict(fps=50, ups=10, ratio=43 / 300)


@pytest.mark.slow
def test_of_a_stopped_evaluation_the_rest_is_made(make_learner, tmp_path):
  """Episodes with the numbers that they would have had."""
  changes = dict(task='toy_reach', time_limit=20, parallel='none')
  agent = make_learner(tmp_path, eval_episodes=3, **changes)
  run, numbers = agent._run, []
  with environments.running(run) as (_, env):
    number = env.number
    env.number = lambda n: (numbers.append(n), number(n))
    made = progress.Progress(run, agent)
    evaluate = agent.evaluate

    def stop_after_one(*args):
      if (tmp_path / 'metrics.jsonl').exists():  # one has ended
        run.stop._handle(signal.SIGTERM, None)
      return evaluate(*args)

    agent.evaluate = stop_after_one
    with pytest.raises(cli.Stopped):
      made.evaluate_if_due(env)
    assert len(returns_of(tmp_path)) == 1
    run.stop._requested, agent.evaluate = False, evaluate
    again = progress.Progress(run, agent)
    for _ in range(2):
      again.evaluate_if_due(env)
    assert len(returns_of(tmp_path)) == 3
    assert (numbers, again._evaluations) == ([0, 1], 3)


@pytest.mark.slow
@eagerly()
def test_evaluations_do_not_explore(make_learner, tmp_path):
  """By `--expl_amount`, though training does."""
  agent = make_learner(
    tmp_path, expl='completely_random', expl_amount=1.0, prefill=0
  )
  actor = agent._agent.behavior.actor
  for variable in actor.variables:
    variable.assign(tf.zeros_like(variable))
  actor._out.bias.assign([9.0, 9.0, -9.0, -9.0])  # tanh of 5 tanh(9 / 5)
  obs, reset = dict(image=np.zeros((9, 64, 64, 3), np.uint8)), np.ones(9, bool)
  assert (agent.evaluate(obs, reset)[0] > 0.99).all()
  agent._should_train.skip(0)  # nothing is due
  assert (agent(obs, reset)[0] < 0.9).any()


def test_logged_numbers_are_means_since_the_last_entry(make_learner, tmp_path):
  agent = make_learner(tmp_path)
  for total, updates in ((9.0, 3), (5.0, 1)):
    agent.restore_unlogged(dict(model_loss=(total, updates)))
    agent.finish()
  agent._c.log_scalars = False
  agent.restore_unlogged(dict(model_loss=(7.0, 1)))
  agent.finish()
  lines = read_metrics(tmp_path)
  assert [x.get('model_loss') for x in lines] == [3.0, 5.0, None]


def test_portions_and_pauses_between_checkpoints(make_learner, tmp_path):
  """Evaluations are apart in environment steps, checkpoints in minutes."""
  changes = dict(eval_every=100, action_repeat=2, save_every=1.0)
  agent = make_learner(tmp_path, **changes)
  agent._c.steps = agent._run.steps() + 230
  made = progress.Progress(agent._run, agent)
  assert made.portion() == dict(steps=50)
  agent.step = agent._c.steps - 10  # 20 in an episode that has not ended
  episode = dict(reward=np.zeros(101, np.float32))
  episode_files.save_episodes(tmp_path / 'episodes', [episode])
  assert made.portion() == dict(steps=15)
  made._should_eval.skip(agent.step - 81)  # when a run resumes between two
  agent._c.steps += 1000
  assert made.portion() == dict(steps=10)
  made._should_eval.skip(agent.step)
  agent._c.steps -= 1000
  saved = checkpoints.Checkpoints(tmp_path / 'checkpoints')
  made._saved = time.monotonic() - 50
  made.save_if_due()
  assert saved.newest() == -1
  made._saved -= 20
  made.save_if_due()
  made.save_if_due()  # that was just now
  assert saved.newest() == 0 and len(saved._numbers()) == 1
  saves = []
  made.save = lambda: saves.append(agent.updates)
  for _ in range(3):  # nothing has changed
    made.after_portion()
  agent._agent.updates.assign(7)
  made.after_portion()
  assert saves == [0, 7]


def test_updates_that_were_due_before_a_kill_are_made_up_for(
  make_learner, tmp_path
):
  """Where only the checkpoint is left that a run makes at its beginning."""
  pace = dict(train_every=10, train_steps=4, pretrain=3)
  first = make_learner(tmp_path, **pace)
  steps = first._run.steps()
  progress.Progress(first._run, first).resume()
  episode = random_episode(np.random.default_rng(1), 26, 2)
  episode_files.save_episodes(first._run.datadir, [episode])
  again = make_learner(tmp_path, **pace)
  progress.Progress(again._run, again).resume()
  assert again.step == steps + 50
  due = int(again._pending) + again.count_due(again.step)
  assert due == 3 + 5 * 4  # at first, and after 10, 20, ... steps


@pytest.mark.slow
def test_evaluations_are_not_made_again_after_a_kill(make_learner, tmp_path):
  changes = dict(task='toy_reach', time_limit=20, parallel='none')
  agent = make_learner(tmp_path, eval_every=200, **changes)
  first = progress.Progress(agent._run, agent)
  first.resume()
  with environments.running(agent._run) as (_, env):
    first.evaluate_if_due(env)
  episode = random_episode(np.random.default_rng(1), 26, 2)
  episode_files.save_episodes(agent._run.datadir, [episode])
  agent = make_learner(tmp_path, eval_every=200, **changes)
  again = progress.Progress(agent._run, agent)
  again.resume()
  assert (again._evaluations, again.steps_to_evaluation()) == (1, 150)
  assert not again._should_eval.due(agent.step)


def test_line_of_an_episode_that_a_kill_came_before(make_learner, tmp_path):
  agent = make_learner(tmp_path)
  run, rng = agent._run, np.random.default_rng(1)
  for name in episode_files.list_episodes(run.datadir):
    (run.datadir / name).unlink()

  def lines():
    return [x for x in read_metrics(tmp_path) if 'train/return' in x]

  for count in (1, 2):  # each is saved, and its line is not written
    episode = random_episode(rng, 26, 2)
    episode_files.save_episodes(run.datadir, [episode])
    for _ in range(2):
      environments.log_missing_episode(run)
    assert [x['step'] for x in lines()] == [50, 100][:count]
    assert lines()[-1]['train/return'] == pytest.approx(episode['reward'].sum())


@eagerly()
def test_each_evaluation_has_episodes_of_its_own(make_learner, tmp_path):
  changes = dict(task='toy_reach', time_limit=2, parallel='none')
  agent = make_learner(tmp_path, eval_every=10, eval_episodes=2, **changes)
  made, begun = progress.Progress(agent._run, agent), []
  with environments.running(agent._run) as (_, env):
    number = env.number
    env.number = lambda n: (begun.append(n), number(n))
    for step in (10, 20, 30):
      agent.step = step
      made.evaluate_if_due(env)
  assert begun == [0, 2, 4]


@pytest.mark.slow
def test_steps_that_are_made_again_are_evaluated_again(make_learner, tmp_path):
  """By other weights than those of the evaluation that metrics.jsonl has."""
  changes = dict(task='toy_reach', time_limit=20, parallel='none')
  agent = make_learner(tmp_path, eval_every=5, **changes)
  made = progress.Progress(agent._run, agent)
  made.resume()
  with environments.running(agent._run) as (_, env):
    made.evaluate_if_due(env)
    made.save()
    newest = episode_files.newest(agent._run.datadir)
    episode = dict(np.load(agent._run.datadir / newest))
    (agent._run.datadir / newest).unlink()
    agent = learner.Learner(agent._agent, agent._run)
    again = progress.Progress(agent._run, agent)
    again.resume()
    episode_files.save_episodes(agent._run.datadir, [episode])
    agent.step = agent._run.steps()
    again.evaluate_if_due(env)
  logged = agent._run.logger.steps_of('test/return')
  assert logged == 2 * [agent._run.steps()]


def test_a_logdir_that_was_removed_is_not_made_anew(make_learner, tmp_path):
  """It would lack its config.json, and nobody would know what run it was."""
  run = make_learner(tmp_path / 'run')._run
  (save, *_), _ = environments._callbacks(run)
  episode = random_episode(np.random.default_rng(1), 26, 2)
  shutil.rmtree(run.datadir)
  save(episode)
  assert len(episode_files.list_episodes(run.datadir)) == 1
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(cli.Failure, match='was removed during the run'):
    save(episode)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('rows', [26, 1])
def test_no_line_of_an_episode_broken_or_empty(make_learner, tmp_path, rows):
  agent = make_learner(tmp_path)
  run = agent._run
  for name in episode_files.list_episodes(run.datadir):
    (run.datadir / name).unlink()
  episode = random_episode(np.random.default_rng(1), rows, 2)
  (path,) = episode_files.save_episodes(run.datadir, [episode])
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= rows > 1  # a bit of the image
  path.write_bytes(content)
  environments.log_missing_episode(run)
  assert not run.logger.steps_of('train/return')


def test_weights_are_evaluated_once_at_a_step(make_learner, tmp_path):
  """Though several evaluations may be due when an episode ends."""
  agent = make_learner(tmp_path, eval_every=10)
  made = progress.Progress(agent._run, agent)
  for step, due in ((100, True), (135, True), (135, False), (142, True)):
    agent.step = step
    assert made._should_eval.due(step) == due
    made.evaluate_if_due(None)
  assert not made._should_eval.due(149) and made._should_eval.due(150)


@pytest.mark.parametrize('learned', [False, True])
def test_a_run_whose_newest_checkpoint_is_lost(make_learner, tmp_path, learned):
  """Where it had none with weights, nothing of them is lost."""
  agent = make_learner(tmp_path)
  made = progress.Progress(agent._run, agent)
  made.save()
  if learned:
    agent._run.logger.scalars(10, dict(updates=3))
  progress.Progress(agent._run, agent).resume()  # killed before it saved these
  made.save()
  (newest,) = (tmp_path / 'checkpoints').glob('ckpt-1.data*')
  newest.write_bytes(b'')
  lost = pytest.raises(cli.UserError, match='holds a run that has learned')
  with lost if learned else contextlib.nullcontext():
    progress.Progress(agent._run, agent).resume()


def test_runs_of_several_environments_are_not_exact(make_learner, tmp_path):
  """Their episodes end in an order that no checkpoint knows."""
  run = make_learner(tmp_path, deterministic=True)._run
  assert run.exact
  run.config.envs = 2
  assert not run.exact


def test_estimate_of_hours(make_learner, tmp_path, capsys):
  """Of 1e5 steps with 100 updates in 1000, 2 seconds each: 5.6 hours."""
  agent = make_learner(tmp_path, batch_size=20, batch_length=50)
  for _ in range(3):
    with agent._timer():
      pass
  estimate = training.Estimate(agent._run, agent)
  agent._timer.seconds = 4.0  # of two, without the first
  estimate()
  estimate()
  out = capsys.readouterr().out
  assert out.count('An update takes 2.0 s here') == 1
  assert 'about 6 hours of updates' in out


def test_random_episodes_differ_and_follow_from_their_number(small):
  space = small[0].action_space

  def draw(number, episodes):
    act = training.random_agent(space, 0, number)
    starts = [True, False] * episodes
    return np.array([act(None, np.array([start]))[0] for start in starts])

  actions = draw(0, 3).reshape(3, -1)
  assert len(np.unique(actions)) == actions.size
  np.testing.assert_array_equal(draw(2, 1).ravel(), actions[2])
  # Nor are they the numbers that choose the windows of batch 2.
  other = np.random.default_rng([0, 2, 0]).uniform(-1, 1, 2 * len(space.low))
  assert (draw(2, 1).ravel() != other.astype(np.float32)).all()


def returns_of(logdir):
  return [x for x in read_metrics(logdir) if 'test/return' in x]


@pytest.mark.slow
def test_exact_run_keeps_what_its_checkpoint_knew(make_learner, tmp_path):
  """By name: a file that was set aside does not count for another."""
  agent = make_learner(tmp_path, deterministic=True, prefill=10**6)
  run = agent._run
  made = training._make_progress(run, agent)
  assert isinstance(made, progress.ExactProgress)
  made.save()
  saved = made._collect()
  known = sorted(run.datadir.glob('*.npz'))
  training.prefill(run, [])  # adds nothing to a run that has begun
  later = random_episode(np.random.default_rng(1), 12, 2)
  tools.save_episodes(run.datadir, [later], exact=True)
  known[0].rename(known[0].with_suffix('.broken'))
  other = run.datadir / 'walk-12.npz'  # of the user, whatever its name
  np.savez(other, **later)
  assert made._collect()['newest'] > saved['newest']
  made._rewind(saved)
  assert sorted(run.datadir.glob('*.npz')) == [*known[1:], other]
  other.unlink()
  tools.save_episodes(run.datadir, [later], exact=True)
  tools.save_episodes(run.datadir, [later])  # of another run
  made._rewind(saved)
  assert len(list(run.datadir.glob('*.npz'))) == len(known) + 1


def test_what_a_run_without_updates_says(make_learner, tmp_path):
  agent = make_learner(tmp_path, steps=150)
  agent.step = 150
  asked = training._ending(agent._run, agent, (100, 0))
  assert 'asked for no update' in asked and 'more than' not in asked
  assert '--steps more than 150' in training._ending(
    agent._run, agent, (150, 0)
  )
  agent._agent.updates.assign(5)
  line = training._ending(agent._run, agent, (100, 5))  # collected, but few
  assert line == 'Finished at step 150, 5 updates.'
  line = training._ending(agent._run, agent, (150, 5))
  assert 'Nothing was left to do' in line


@pytest.mark.slow
def test_halt_ends_learning_and_what_is_due_is_remembered(
  make_learner, tmp_path
):
  agent = make_learner(tmp_path, pretrain=1, train_every=2, train_steps=50)
  act_once(agent)
  act_once(agent)
  agent.halt()
  assert agent.updates < 51
  assert agent.updates + int(agent._pending) == 51
  saver = checkpoints.Checkpoints(tmp_path / 'saved', **agent.trackable())
  saver.save(1)
  other = make_learner(tmp_path)
  assert (other.updates, int(other._pending)) == (0, 0)
  checkpoints.Checkpoints(tmp_path / 'saved', **other.trackable()).restore()
  other.catch_up()
  act_once(other)  # as after a resume, all that is due
  assert other.updates == 51


@pytest.mark.slow
def test_actor_delay_holds_the_actor_alone(make_learner, tmp_path):
  agent = make_learner(tmp_path, actor_delay=2)
  opts = agent._agent.optimizers
  for delayed in (True, True, False):
    before = {name: weights(opt) for name, opt in opts.items()}
    agent._update()
    after = {name: moved(opt, before[name]) for name, opt in opts.items()}
    assert after == dict(model=True, actor=not delayed, value=True)


@pytest.mark.slow
@pytest.mark.parametrize('deterministic', [False, True])
def test_non_finite_loss_stops_the_run(make_learner, tmp_path, deterministic):
  agent = make_learner(tmp_path, deterministic=deterministic)
  agent._agent.behavior.value._out.bias.assign([np.nan])
  with pytest.raises(
    learner.NonFiniteError, match='update 1.*nonfinite-1.json'
  ):
    agent._update()
  record = json.loads((tmp_path / 'nonfinite-1.json').read_text())
  assert record['metrics']['value_loss'] == 'nan'
  # Which windows were in the batch: the same again, by their names.
  folder, config = tmp_path / 'episodes', agent._c
  windows = next(dreamer.load_dataset(folder, config, source=True))
  assert record['windows'] == windows[replay.SOURCE].tolist()
  assert len(record['windows']) == config.batch_size
  name = record['windows'][0].partition(', row ')[0]
  assert (folder / name).exists()


def test_loss_scale_that_sank_explains_no_gradient(make_learner, tmp_path):
  """Else a run in float16 would skip all of its updates, to its end."""
  agent, found = make_learner(tmp_path), dict(model_grad_norm=np.inf)
  found['model_skipped'] = 1.0
  agent._check_finite(dict(found, model_loss_scale=2.0**-13), ['window'])
  with pytest.raises(
    learner.NonFiniteError, match='model_grad_norm became inf'
  ):
    agent._check_finite(dict(found, model_loss_scale=2.0**-14), ['window'])


def test_devices_are_set_up_before_tensorflow_computes(tmp_path):
  """Memory growth, like virtual devices, cannot be set afterwards."""
  code = """
    import sys
    import dreamer
    import training
    import tensorflow as tf
    def make_team(*args):
      cpu = tf.config.list_physical_devices('CPU')[0]
      halves = [tf.config.LogicalDeviceConfiguration()] * 2
      tf.config.set_logical_device_configuration(cpu, halves)
      raise training.UserError('early enough')
    training.distribute.make_team = make_team
    sys.exit(dreamer.main(['--logdir', sys.argv[1], '--task', 'toy_reach']))
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), str(tmp_path / 'run')],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert (done.returncode, done.stderr) == (
    2,
    'dreamer.py: error: early enough\n',
  )


def test_true_score_is_logged_though_the_model_sees_tanh(tmp_path):
  rng = np.random.default_rng(0)
  episode = dict(random_episode(rng), reward=np.full(12, 5, np.float32))
  config = dreamer.define_config('atari_pong')
  log = logger.Logger(tmp_path, 100, 0)
  image = episode.pop('image')
  episode.update(image_3=image, image_2=image)  # all that the agent sees
  dreamer.summarize_episode(episode, config, tmp_path, log, 'test')
  log.close()
  (path,) = tmp_path.glob('events.*')
  assert b'test/policy' in path.read_bytes()
  assert read_metrics(tmp_path)[-1]['test/return'] == 60
  # In environment steps, and the row of the reset is none.
  assert read_metrics(tmp_path)[-1]['test/length'] == 11 * config.action_repeat
  seen = dreamer.preprocess(episode, config, {'image_2': image.shape[1:]})
  np.testing.assert_allclose(seen['reward'], np.tanh(5), rtol=1e-6)


def test_what_shows_a_collapsed_action_model():
  reward = np.array([0, 1, 2, 3], np.float32)
  action = np.array([[0, 0], [1, -0.5], [1, 0.5], [-0.995, 0.9]], np.float32)
  episode = dict(action=action, reward=reward, discount=np.ones(4))
  config = dreamer.define_config()
  config.update(action_dist='tanh_normal', discount=0.5)
  about = environments.describe_behavior(episode, config)
  assert about['saturated'] == 3 / 6  # 1, 1 and -0.995
  assert about['changes'] == 2 / 4
  # Cut off: means of the rewards that are left, weighted 1, 1/2, 1/4; times 2.
  values = [2 * (1 + 1 + 3 / 4) / (7 / 4), 2 * (2 + 3 / 2) / (3 / 2), 6]
  assert about['real_value'] == pytest.approx(np.mean(values))
  episode['discount'] = np.array([1, 1, 1, 0])  # ended: these are all
  about = environments.describe_behavior(episode, config)
  assert about['real_value'] == pytest.approx(np.mean([2.75, 3.5, 3]))
  # A constant reward is worth r / (1 - discount) in every state.
  episode.update(reward=np.full(4, 0.7), discount=np.ones(4))
  config.update(discount=0.99)
  about = environments.describe_behavior(episode, config)
  assert about['real_value'] == pytest.approx(70)
  config.update(clip_rewards='tanh')
  about = environments.describe_behavior(episode, config)
  assert about['real_value'] == pytest.approx(100 * np.tanh(0.7))


def test_changes_of_discrete_actions():
  episode = dict(
    action=np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 2]],
    reward=np.zeros(5, np.float32),
    discount=np.ones(5),
  )
  config = dreamer.define_config()
  config.update(action_dist='onehot')
  about = environments.describe_behavior(episode, config)
  assert about == dict(real_value=0, changes=1 / 3)
  short = {k: v[:2] for k, v in episode.items()}  # one action: no change
  assert environments.describe_behavior(short, config) == dict(real_value=0)


# --- Environments -------------------------------------------------------------


def make_run(folder, *flags):
  """A run on toy_reach of vectors, in this process."""
  words = [f'--logdir={folder}', '--task=toy_reach', '--inputs=state']
  words += ['--preset=debug', '--parallel=none', *flags]
  config = commandline.parse_flags(words)
  (folder / 'episodes').mkdir(parents=True)
  log = logger.Logger(folder, 100)
  return run_kinds.Run(config, distribute.Team(), cli.StopSignal(), log)


def test_each_environment_has_random_streams_of_its_own(tmp_path):
  run = make_run(tmp_path / 'run')

  def first(index, prefix, seed=0):
    run.config.seed = seed
    env = environments.make_worker(run.config, index, prefix)
    return tuple(env.reset(number=0)['state'])

  kinds = [(0, 'train'), (1, 'train'), (0, 'test'), (0, 'train', 1)]
  assert len({first(*kind) for kind in kinds}) == 4
  assert first(*kinds[0]) == first(*kinds[0])


def test_evaluations_ask_for_the_task_as_it_is_tested(tmp_path, monkeypatch):
  """Whole games of Atari, and the held-out levels of Lab."""
  run, asked = make_run(tmp_path / 'run'), {}
  for prefix in ('train', 'test'):
    monkeypatch.setattr(
      environments.suites,
      'make_task',
      lambda *args, name=prefix, **kwargs: asked.update({name: kwargs['test']}),
    )
    environments.make_worker(run.config, 0, prefix)
  assert asked == dict(train=False, test=True)


def test_all_environments_of_a_run_are_closed(tmp_path):
  run = make_run(tmp_path / 'run', '--envs=2')
  with environments.running(run) as (envs, test):
    everything = [*envs, test]
    assert all(env.reset()['state'].shape == (4,) for env in everything)
  for env in everything:
    with pytest.raises(cli.Failure, match='closed'):
      env.reset()


# fmt: off
@pytest.mark.parametrize('kind', [
  ((32, 32, 3), np.uint8), ((64, 64, 1), np.uint8), ((64, 64, 3), np.float32),
])
# fmt: on
def test_images_of_a_suite_are_as_the_agent_sees_them(tmp_path, kind):
  run = make_run(tmp_path / 'run')
  env = suites.make_task('toy_reach')
  env.observation_space.spaces['image'] = gym.spaces.Box(0, 255, *kind)
  words = rf'toy_reach shows image as {kind[1].__name__} \[.*must make images'
  with pytest.raises(cli.UserError, match=words):
    agent_spec.of_environment(run.config, env)


@pytest.mark.parametrize('rows, said', [(9, True), (10, False)])
def test_which_episodes_are_short(tmp_path, capsys, rows, said):
  run = make_run(tmp_path / 'run', '--prefill=1')  # --batch_length 10
  rng = np.random.default_rng(0)
  episodes = [random_episode(rng, n) for n in (rows, 10)]
  tools.save_episodes(run.datadir, episodes)
  look = environments.ShortEpisodes(run)
  for episode in episodes * 2:
    look(episode)
  text = '1 of 2 episodes have fewer rows than --batch_length 10'
  assert capsys.readouterr().out.count(text) == said


def test_share_of_missed_ticks(tmp_path):
  """3 of 4 in one step, none of 1 in the last: 3 of 5."""

  class Robot:
    def __init__(self):
      self.missed = iter((3, 0, 1))

    def reset(self, blocking):
      return {}

    def step(self, action, blocking):
      missed = next(self.missed)
      return lambda: ({}, 0.0, missed != 3, dict(missed=missed))

  run = make_run(tmp_path / 'run')
  env = environments.Deadlines(Robot(), run, 'missed')
  env.reset()
  env.step(None)
  env.step(None, blocking=False)()
  env.reset()
  env.step(None)
  shares = [x['missed'] for x in read_metrics(tmp_path / 'run')]
  assert shares == [3 / 5, 1 / 2]


# --- Whole runs -------------------------------------------------------------


def command(logdir, *flags):
  return [
    *(sys.executable, str(ROOT / 'dreamer.py'), '--logdir', str(logdir)),
    *flags,
  ]


@pytest.mark.slow
def test_debug_run_is_stopped_killed_and_resumed(tmp_path, capfd):
  """On a real control suite task, in a folder with all that names may have.

  With Keras set up for other work.
  """
  logdir = tmp_path / 'a [1]*? ~ü:%s.zip'
  flags = ('--preset', 'debug', '--task', 'dmc_cartpole_balance')
  keras = dict(floatx='float16', image_data_format='channels_first')
  (tmp_path / 'keras.json').write_text(json.dumps(dict(keras, backend='jax')))
  env = dict(os.environ, KERAS_HOME=str(tmp_path), KERAS_BACKEND='torch')
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  pipes['env'] = env
  # Killed without warning once it has saved.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  saved = 'checkpoints/ckpt-[2-9]*.index'  # the first two have no updates
  wait_for(lambda: list(logdir.glob(saved)), lambda: process.poll() is None)
  process.kill()
  process.communicate()
  # Resumed, and stopped by SIGTERM.
  process = subprocess.Popen(command(logdir, *flags, '--steps', '1e5'), **pipes)
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('Episode'):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  lines = ''.join(lines) + out
  assert process.returncode == 0
  assert re.search(r'Resumed at step [1-9]\d*, [1-9]\d* updates', lines)
  assert 'The same command resumes' in lines
  assert err == ''
  stopped = int(re.search(r'Stopped at step \d+, (\d+) updates', lines)[1])
  # Resumed again, to its end.
  before = dreamer.count_steps(
    logdir / 'episodes', dreamer.define_config(preset='debug')
  )
  process = subprocess.run(
    command(logdir, *flags, '--steps', str(before + 300)),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ''
  assert f'Resumed at step {before}, {stopped} updates' in process.stdout
  assert 'Found' in process.stdout
  assert 'Finished' in process.stdout
  assert f'other flags: --steps {before + 300} (was 100000).' in process.stdout
  check_logdir(logdir)
  # Evaluated, with pictures there too, and compared.
  words = ['--logdir', logdir, '--episodes=1', '--outdir', logdir / 'videos']
  assert evaluate.main([str(word) for word in words]) == 0
  assert f'step {before + 300}, ' in capfd.readouterr().out
  names = {path.name for path in (logdir / 'videos').iterdir()}
  assert {'behavior.gif', 'behavior.mp4', 'prediction.png'} <= names
  (run,) = run_folders.find_runs([logdir])
  assert run.steps[-1] >= before and len(run.scores) >= 2


def check_logdir(logdir):
  assert not list(logdir.rglob('*.tmp'))
  config = json.loads((logdir / 'config.json').read_text())['config']
  assert config['task'] == 'dmc_cartpole_balance'
  for path in logdir.glob('episodes/*.npz'):
    with np.load(path, allow_pickle=False) as episode:
      assert set(episode.files) == {
        *('image', 'action', 'reward', 'discount', 'position', 'velocity')
      }
      assert episode['image'].dtype == np.uint8
      assert episode['image'].shape == (51, 64, 64, 3)
      assert (episode['action'][0] == 0).all()
      assert path.stem.endswith('-51')
  keys = {k for line in read_metrics(logdir) for k in line}
  assert {
    *('step', 'train/return', 'train/length', 'test/return', 'test/length'),
    *('episodes', 'model_loss', 'image_loss', 'reward_loss', 'div', 'fps'),
    *('actor_loss', 'value_loss', 'model_grad_norm', 'action_ent'),
    *('action_ent_each', 'saturated', 'changes', 'real_value'),
    *('test_saturated', 'test_changes', 'test_real_value'),
  } <= keys
  images = set()
  for path in logdir.glob('events.*'):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        text = logger.METRICS[value.tag]  # all are in a group, and described
        assert value.metadata.summary_description == text
        if value.HasField('image'):
          images.add(value.tag)
          assert value.image.encoded_image_string[:6] == b'GIF89a'
  assert {'test/policy', 'agent/openl'} <= images


@pytest.fixture
def main(tmp_path, capsys):
  """Calls `dreamer.main` on a small run; returns exit code and output."""

  def call(*flags, task='toy_reach'):
    words = ['--logdir', str(tmp_path / 'run'), f'--task={task}']
    words += ['--preset=debug', '--precision=32', '--time_limit=50', *flags]
    words += ['--eval_every=1000', '--log_images=False']
    return run_here(words), ''.join(capsys.readouterr())

  return call


# Updates, where a test is of none of them in particular.
FEW = ('--pretrain=1', '--train_steps=1')


def test_learning_needs_episodes(main, tmp_path):
  code, text = main('--prefill=0')
  assert code == 2
  assert 'learning needs episodes' in text and '--prefill 0' in text
  assert 'Choose --batch_length' not in text


@pytest.mark.slow
def test_a_run_ends_with_all_its_steps_in_whole_episodes(tmp_path, capsys):
  """Of several environments some are in the middle of one."""
  words = [f'--logdir={tmp_path}', '--task=gym_CartPole-v1', '--preset=debug']
  words += ['--inputs=state', '--precision=32', '--envs=3', '--prefill=100']
  words += ['--batch_length=5', '--eval_every=50', '--steps=500', *FEW]
  assert run_here(words) == 0
  stored = episode_files.count_episodes(tmp_path / 'episodes')
  assert stored[1] >= 500
  capsys.readouterr()
  assert run_here(words) == 0
  assert 'Nothing was left to do' in capsys.readouterr().out
  assert episode_files.count_episodes(tmp_path / 'episodes') == stored


@pytest.mark.slow
def test_a_replay_that_is_full_at_the_start_and_learning_from_it(
  main, tmp_path
):
  code, text = main('--steps=200', '--prefill=200')
  assert code == 0
  assert 'Finished at step 200, 0 updates. Nothing was learned' in text
  assert '--steps more than 200, and --pretrain' in text
  # As it says.
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0 and 'Finished at step 250, 2 updates.\n' in text
  assert 'other flags: --steps 250 (was 200), --pretrain 2 (was 5).' in text
  code, text = main('--steps=250', '--prefill=200', '--pretrain=2')
  assert code == 0
  assert 'Nothing was left to do; a larger --steps goes on.' in text
  assert 'other flags' not in text
  assert_never_begins_anew(main, tmp_path / 'run')


def assert_never_begins_anew(main, logdir):
  """Whatever is left of checkpoints: nothing is overwritten, exit code 2."""
  folder = logdir / 'checkpoints'
  shutil.copytree(folder, logdir.parent / 'good')
  for path in folder.glob('*.index'):
    path.write_bytes(path.read_bytes()[:-9])
  flags = ('--steps=300', '--prefill=200', '--pretrain=2')
  for _ in range(2):
    code, text = main(*flags)
    assert code == 2
    assert 'has learned, but no checkpoint with its weights' in text
  aside = {p.name for p in folder.glob('*.broken')}
  assert len(aside) == 4 and not list(folder.glob('*.index'))
  # From metrics.jsonl alone it is known, too.
  shutil.rmtree(folder)
  code, text = main(*flags)
  assert code == 2 and 'Put whole files ckpt-*' in text
  # As it says: files from elsewhere, or anew.
  shutil.copytree(logdir.parent / 'good', folder, dirs_exist_ok=True)
  code, text = main(*flags)
  assert code == 0 and 'Resumed at step 250, 2 updates' in text
  shutil.rmtree(folder)
  (logdir / 'metrics.jsonl').rename(logdir.parent / 'old.jsonl')
  code, text = main(*flags, '--steps=350')
  assert code == 0 and 'Resumed' not in text
  assert 'Finished at step 350, 2 updates' in text


@pytest.mark.slow
def test_short_episodes_are_said_once(main, tmp_path):
  code, text = main(
    *('--steps=220', '--prefill=120', '--pretrain=1', '--train_steps=1'),
    task='gym_user_envs:Changing-v0',
  )
  assert code == 0, text
  assert text.count('have fewer rows than --batch_length 10') == 1
  assert re.search(r'Warning: [1-9]\d* of [1-9]\d* episodes have', text)


@pytest.mark.slow
def test_environment_that_cannot_be_made_again_saves_the_run(main, tmp_path):
  code, text = main(
    *('--steps=1000', '--prefill=60', '--pretrain=2', '--train_steps=0'),
    *('--env_args', json.dumps({'path': str(tmp_path / 'gone')})),
    task='gym_user_envs:Gone-v0',
  )
  assert code == 2, text
  assert re.search(r'Stopped at step \d+, 2 updates; saved to', text), text


@pytest.mark.slow
def test_an_error_in_the_first_evaluation_drops_its_episode(main, tmp_path):
  code, text = main(
    *('--steps=20', '--prefill=10', '--batch_length=4', *FEW),
    *('--env_args', json.dumps({'path': str(tmp_path / 'used')})),
    task='gym_user_envs:FlakyEvaluation-v0',
  )
  assert code == 0, text
  assert text.count('The environment failed: the motor is hot') == 1
  assert 'Evaluation: return 5.0' in text


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_environments_start_ends_a_run_that_resumes(
  main, tmp_path, number
):
  seconds, pid = tmp_path / 'seconds', tmp_path / 'seconds.pid'
  args = ['--env_args', json.dumps({'path': str(seconds)}), *FEW]
  args += ['--prefill=20', '--batch_length=8', '--eval_episodes=0']
  task = 'gym_user_envs:SlowAgain-v0'
  seconds.write_text('0')
  assert main('--steps=40', *args, task=task)[0] == 0
  before = {p: p.stat().st_size for p in tmp_path.glob('run/*/*')}
  pid.unlink()
  seconds.write_text('600')
  args += ['--steps=60', '--preset=debug', '--time_limit=50', f'--task={task}']
  path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
  process = subprocess.Popen(
    command(tmp_path / 'run', *args, '--precision=32'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': path},
  )
  try:
    wait_for(
      lambda: pid.exists() and pid.read_text(), lambda: process.poll() is None
    )
    time.sleep(1)  # until it is waited for
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
    process.wait()
  assert (process.returncode, err) == (0, ''), out
  assert 'Stopped at once; the same command resumes' in out
  assert not alive(int(pid.read_text()))
  assert {p: p.stat().st_size for p in tmp_path.glob('run/*/*')} == before
  seconds.write_text('0')
  code, text = main('--steps=60', *args, task=task)
  assert code == 0 and 'Resumed at step 40, ' in text, text


@pytest.mark.slow
def test_what_exists_once_is_trained_on_without_evaluations(main):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    args = json.dumps({'port': taken.getsockname()[1]})
  flags = [f'--env_args={args}', '--prefill=20', '--steps=40', *FEW]
  task = 'gym_user_envs:OnePort-v0'
  code, text = main(*flags, '--eval_episodes=1', task=task)
  assert code == 2 and 'Address already in use' in text
  flags += ['--eval_every=10', '--batch_length=8']
  code, text = main(*flags, '--eval_episodes=0', task=task)
  assert code == 0 and 'Finished at step 40' in text, text
  assert 'Evaluation' not in text


@pytest.mark.slow
@pytest.mark.parametrize('envs', [0, 1])
def test_environments_that_differ(main, tmp_path, envs):
  """The one for evaluations, and one that takes over beside learning."""
  path, flags = tmp_path / 'made', ['--pretrain=2', '--train_steps=0']
  code, text = main(
    *('--steps=100', '--prefill=10', '--inputs=state', '--batch_length=4'),
    *(f'--eval_episodes={1 - envs}', *flags),
    *('--env_args', json.dumps({'path': str(path)})),
    task='gym_user_envs:Growing-v0',
  )
  assert code == 2 and 'Traceback' not in text.split('Warning')[0], text
  assert re.search(r'error: environment t\w+ 0 shows .*state \[2\]', text)
  made = list(tmp_path.glob('run/episodes/*'))
  assert len(made) == 3 * envs and all(x.suffix == '.npz' for x in made)
  saved = re.search(r'Stopped at step \d+, 2 updates; saved to', text)
  assert bool(saved) == bool(envs)


@pytest.mark.slow
def test_environment_that_cannot_start(tmp_path):
  """No OpenGL at all: one clear message, exit code 2, no traceback."""
  result = subprocess.run(
    command(tmp_path / 'run', '--preset', 'debug'),
    capture_output=True,
    text=True,
    env={**os.environ, 'MUJOCO_GL': 'nonsense'},
  )
  assert result.returncode == 2
  assert 'MUJOCO_GL' in result.stderr
  assert 'Traceback' not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, words',
  [
    (['--task', 'gym_CartPol-v1'], 'did you mean CartPole-v1'),
    (['--task', 'gym_no_such_module:X-v0'], "'no_such_module'"),
    (['--task', 'atari_pong', '--action_dist', 'tanh_normal'], 'is onehot'),
  ],
)
def test_what_only_the_environment_knows_is_a_clear_error(main, flags, words):
  code, text = main(*flags)
  assert code == 2, text
  assert words in text and 'Traceback' not in text


# fmt: off
@pytest.mark.parametrize(('flags', 'words'), [
  (['--inputs', 'orientation'], 'orientations'),
  (['--inputs', 'image_2'], 'it has image, height, orientations'),
  (['--inputs', ''], '--inputs takes names'),
  (['--inputs', 'image,,state'], '--inputs takes names'),
  (['--cameras', '0,9'], 'has the cameras 0 to 1'),
  (['--cameras', 'left'], '--cameras takes a whole number'),
  (['--record', 'imag'], 'image'),
])
# fmt: on
@pytest.mark.slow
def test_bad_inputs_end_with_one_message(main, flags, words):
  code, text = main(*flags, task='dmc_walker_walk')
  assert code == 2, text
  assert words in text and 'Traceback' not in text


@pytest.mark.slow
def test_flags_that_cannot_be_are_not_kept(main, tmp_path):
  """A mistake in the first command is no hindrance to the second."""
  code, error = main('--behavior=planning', task='toy_catch')
  assert code == 2 and '--behavior' in error
  few = (*FEW, '--prefill=100', '--steps=120')
  code, error = main('--batch_length=8', *few, task='toy_catch')
  assert code == 0, error


@pytest.mark.slow
def test_episodes_of_another_task_are_left_alone(main, tmp_path):
  """Though the config.json that says so is broken."""
  few = (*FEW, '--time_limit=40', '--prefill=40')
  assert main('--steps=80', *few, task='toy_reach')[0] == 0
  path = next(tmp_path.rglob('config.json'))
  path.write_text(path.read_text()[:100])
  episodes = sorted(path.parent.glob('episodes/*.npz'))
  code, error = main('--steps=80', task='toy_catch')
  assert code == 2 and 'are of another task' in error
  assert sorted(path.parent.glob('episodes/*.npz')) == episodes
  code, error = main('--steps=120', *few, task='toy_reach')
  assert code == 0, error


@pytest.mark.slow
def test_output_that_nobody_takes_ends_a_run(tmp_path):
  """It is not the logdir that fails."""
  words = f'--logdir={tmp_path} --task=toy_reach --preset=debug'
  taken = f'{sys.executable} dreamer.py {words} | head -1'
  root = pathlib.Path(dreamer.__file__).parent
  done = subprocess.run(taken, shell=True, cwd=root, capture_output=True)
  assert b'error: standard output: Broken pipe' in done.stderr


@pytest.mark.slow
def test_learns_on_though_episodes_are_gone(main, tmp_path):
  """What is due follows from those that are left."""
  few = (*FEW, '--time_limit=50', '--prefill=200', '--train_every=50')
  assert main('--steps=500', *few, task='toy_reach')[0] == 0
  logdir = next(tmp_path.rglob('config.json')).parent
  before = updates_of(logdir)
  assert before == 6  # at 200, 250, ..., 450 steps
  for path in sorted(logdir.glob('episodes/*.npz'))[:6]:
    path.unlink()
  assert main('--steps=500', *few, task='toy_reach')[0] == 0
  assert updates_of(logdir) == before + 5  # again from 250 on


def updates_of(logdir):
  return max(line.get('updates', 0) for line in read_metrics(logdir))
