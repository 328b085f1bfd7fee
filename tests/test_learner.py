"""Acting beside learning: what is due, logged, saved and evaluated."""

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tensorflow as tf

import checkpoints
import cli
import distribute
import dreamer
import environments
import episode_files
import free
import learner
import logger
import progress
import replay
import run_kinds
import tools
import training
from agents import eagerly, make_agent, moved, random_episode, weights
from logdirs import read_metrics

ROOT = pathlib.Path(dreamer.__file__).parent


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
    for _ in range(2):  # the second has nothing to say
      agent.finish()
  agent._c.log_scalars = False
  agent.restore_unlogged(dict(model_loss=(7.0, 1)))
  agent.finish()
  lines = read_metrics(tmp_path)
  assert [x.get('model_loss') for x in lines] == [3.0, 5.0, None]
  assert ['fps' in x for x in lines] == [False, True, True]


def test_an_update_that_float16_skipped_is_in_no_mean(
  make_learner, tmp_path, monkeypatch
):
  """But in the number of updates; their time is known from the third on."""
  agent, known = make_learner(tmp_path), []
  for norm in (np.inf, 3.0, 5.0):
    found = dict(model_grad_norm=norm, model_loss_scale=2.0**15)
    monkeypatch.setattr(agent._agent, 'update', lambda batch, x=found: x)
    agent._update()
    known.append(agent.seconds_per_update is not None)
  assert (agent.updates, known) == (3, [False, False, True])
  assert agent.unlogged() == dict(
    model_grad_norm=(8.0, 2), model_loss_scale=(3 * 2.0**15, 3)
  )


@pytest.mark.parametrize('count, recorded', [(2, [3, 4]), (9, [3, 4, 5])])
def test_recorded_updates_begin_with_the_third(tmp_path, count, recorded):
  """As many as asked for, or until learning ends."""
  profile = learner.Profile(tmp_path, count)
  for number in range(1, 6):
    with profile(), tf.profiler.experimental.Trace(f'number {number}'):
      pass
  profile.stop()
  (trace,) = tmp_path.glob('plugins/profile/*/*.xplane.pb')
  content = trace.read_bytes()
  found = [n for n in range(1, 6) if b'number %d' % n in content]
  assert found == recorded


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

  def update():
    time.sleep(0.1)
    agent._agent.updates.assign(7)

  agent._learning = agent._thread.submit(update)
  made.after_portion()  # waits for what is under way
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


def test_exact_runs_save_between_episodes_alone(make_learner, tmp_path):
  agent = make_learner(tmp_path, deterministic=True, save_every=1.0)
  made = progress.ExactProgress(agent._run, agent)
  made._saved -= 100
  made.save_if_due()
  assert 'will be regenerated' in made.save_when_stopped()
  assert made._checkpoints.newest() == -1
  made.after_portion()
  assert made._checkpoints.newest() == 0


def test_exact_runs_go_on_with_what_was_not_logged(make_learner, tmp_path):
  agent = make_learner(tmp_path, deterministic=True)
  agent.restore_unlogged(dict(model_loss=[9.0, 3]))
  progress.ExactProgress(agent._run, agent).save()
  again = learner.Learner(agent._agent, agent._run)
  progress.ExactProgress(agent._run, again).resume()
  assert again.unlogged() == dict(model_loss=[9.0, 3])


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


def test_an_exact_run_of_older_code_keeps_its_episodes(
  make_learner, tmp_path, capsys
):
  """Its checkpoints do not say which of them they knew."""
  agent = make_learner(tmp_path, deterministic=True)
  made = progress.ExactProgress(agent._run, agent)
  before = episode_files.list_episodes(agent._run.datadir)
  made._rewind(dict(exact=True, episodes=1))
  made._resumed(dict(exact=True, episodes=1))
  assert episode_files.list_episodes(agent._run.datadir) == before
  assert 'of older code' in capsys.readouterr().out
  assert read_metrics(tmp_path)[-1]['resumed'] == 1


def test_a_checkpoint_of_older_code_makes_up_for_no_prefill(
  make_learner, tmp_path, monkeypatch
):
  """It does not say at how many steps it was made."""
  collect = progress.Progress._collect
  monkeypatch.setattr(
    progress.Progress,
    '_collect',
    lambda self: {k: v for k, v in collect(self).items() if k != 'steps'},
  )
  pace = dict(train_every=10, train_steps=4, pretrain=3)
  first = make_learner(tmp_path, **pace)
  progress.Progress(first._run, first).resume()
  again = make_learner(tmp_path, **pace)
  progress.Progress(again._run, again).resume()
  assert int(again._pending) + again.count_due(again.step) == 3


@pytest.mark.parametrize(
  'number, words',
  [
    (errno.ENOSPC, '^logdir: No space left'),
    (errno.EMFILE, '^the system: Too many open files'),
  ],
)
def test_what_failed_is_named_though_the_error_does_not(number, words):
  with pytest.raises(cli.Failure, match=words), training._failures():
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize('words', ['No space left on device', 'Disk quota'])
def test_a_full_disk_is_not_taken_for_full_memory(words):
  """TensorFlow has one error for both."""
  error = tf.errors.ResourceExhaustedError(None, None, f'/a/events; {words}')
  with pytest.raises(cli.Failure, match='no space left'), training._failures():
    raise error
  error = tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
  with pytest.raises(cli.Failure, match='out of memory'), training._failures():
    raise error
