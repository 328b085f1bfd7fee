"""A run's environments, and what it says of their episodes."""

import gym
import numpy as np
import pytest

import agent_spec
import cli
import commandline
import distribute
import environments
import logger
import run_kinds
import suites
import tools
from agents import random_episode
from logdirs import read_metrics


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


def test_numbers_are_told_of_whole_episodes():
  steps = [
    (True, dict(lost=True)),
    (False, dict(told=dict(a=5.0))),
    (True, dict(told=dict(a=1.0))),
    (True, dict(told=dict(a=2.0))),
    (True, {}),
  ]

  class Steps:
    def step(self, action, blocking):
      done, info = steps.pop(0)
      return lambda: ({}, 0.0, done, info)

  told, said = [], []
  env = environments.Told(Steps(), ['a', 'b'], told.append, said.append)
  promise = env.step(None, blocking=False)
  assert promise() == promise()
  while steps:
    env.step(None)
  assert told == [dict(a=1.0), dict(a=2.0)]
  (line,) = said
  assert 'no info had a number b (--log_info)' in line


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
