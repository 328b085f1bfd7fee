"""Weights of another run (`--init_from`), and episodes that are there."""

import json
import re
import shutil
import types

import numpy as np
import pytest

import agent_spec
import checkpoints
import commandline
import dreamer
import environments
import episode_files
import replay
import runfile
import spaces
from logdirs import read_metrics

pytestmark = pytest.mark.slow

OTHER = ['--num_units=7', '--deter_size=9', '--stoch_size=3']
SMALL = ['--preset=debug', '--precision=32', '--batch_length=5', '--steps=500']


def run(logdir, *words):
  return dreamer.main([f'--logdir={logdir}', *SMALL, *words])


@pytest.fixture(scope='module')
def reach(tmp_path_factory):
  """A run whose images and vectors are learned from."""
  folder = tmp_path_factory.mktemp('transfer') / 'reach'
  assert run(folder, '--task=toy_reach', '--inputs=image,state') == 0
  return folder


def weights(logdir):
  """{network: arrays} of a run's newest checkpoint."""
  agent = dreamer.load(logdir)._policy.agent
  return {
    name: [w.numpy() for w in layer.weights]
    for name, layer in agent.networks().items()
  }


def equal(left, right):
  pairs = zip(left, right, strict=True)
  return [a.shape == b.shape and (a == b).all() for a, b in pairs]


# --- Weights ----------------------------------------------------------------


def test_a_new_run_begins_with_weights_that_fit(reach, tmp_path, capsys):
  """Of another task: images alone, another number of actions."""
  logdir = tmp_path / 'catch'
  flags = ['--task=toy_catch', f'--init_from={reach}', '--pretrain=0']
  # No updates: what is saved is what it began with.
  assert run(logdir, *flags, '--train_steps=0', '--steps=420') == 0
  out = capsys.readouterr().out
  line = next(x for x in out.splitlines() if x.startswith('Weights of'))
  assert f'Weights of {reach}: encode, dynamics (' in line
  assert 'New weights: pcont' in out
  before, after = weights(reach), weights(logdir)
  for name in ('encode', 'decode', 'reward', 'value'):
    assert all(equal(before[name], after[name])), name
  # Of the dynamics: what takes the action, or the embedding of two inputs.
  fits = equal(before['dynamics'], after['dynamics'])
  assert fits.count(False) == 2
  # Of the actor: all but the layer that gives the actions.
  assert equal(before['actor'], after['actor']) == [True] * 8 + [False] * 2
  assert run(logdir, *flags) == 0  # resumes with its own
  assert 'Weights of' not in capsys.readouterr().out


def test_of_chosen_networks_alone(reach, tmp_path, capsys):
  logdir = tmp_path / 'run'
  flags = ['--task=toy_reach', '--inputs=image,state', f'--init_from={reach}']
  flags += ['--init_only=encoder,reward', '--pretrain=0', '--seed=1']
  assert run(logdir, *flags, '--train_steps=0', '--steps=420') == 0
  before, after = weights(reach), weights(logdir)
  taken = {name for name in before if all(equal(before[name], after[name]))}
  assert taken == {'encode', 'encode_vector', 'reward'}
  line = 'New weights: dynamics, decode, vector, actor, value.'
  assert line in capsys.readouterr().out


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--init_only=encodr'], 'did you mean encoder'),
    (['--init_only=pcont'], 'this run has encoder, dynamics, decoder'),
    ([*OTHER, '--init_only=dynamics'], 'none of its weights fits'),
  ],
)
def test_nothing_to_take(reach, tmp_path, flags, message, capsys):
  words = ['--task=toy_reach', f'--init_from={reach}', *flags]
  assert run(tmp_path / 'run', *words) == 2
  assert message in capsys.readouterr().err
  assert not list((tmp_path / 'run/episodes').glob('*.npz'))  # before the work
  assert not checkpoints.Checkpoints(tmp_path / 'run').newest_trace()


def test_a_folder_without_a_run(tmp_path, capsys):
  words = ['--task=toy_reach', f'--init_from={tmp_path}/nowhere']
  assert run(tmp_path / 'run', *words) == 2
  assert 'nowhere is not the logdir of a run' in capsys.readouterr().err
  assert not list((tmp_path / 'run/episodes').glob('*.npz'))  # before the work


def test_only_needs_from(capsys):
  assert run('x', '--init_only=encoder') == 2
  assert '--init_only says what of --init_from' in capsys.readouterr().err


# --- Episodes that are there ------------------------------------------------


def contents(folder):
  return {
    path.name: (path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.iterdir()
  }


def test_learns_from_a_folder_and_leaves_it_as_it_is(reach, tmp_path, capsys):
  """With a broken episode in it, and without collecting; and resumes."""
  source, logdir = tmp_path / 'data', tmp_path / 'run'
  source.mkdir()
  for path in sorted((reach / 'episodes').glob('*.npz')):
    (source / path.name).write_bytes(path.read_bytes())
  (source / f'{path.stem[:-3]}-51.npz').write_bytes(b'broken')
  before = contents(source)
  words = ['--task=toy_reach', f'--offline={source}', '--inputs=image,state']
  words += ['--steps=1000', '--deterministic=True']
  assert run(logdir, *words, '--updates=20') == 0
  out = capsys.readouterr().out
  assert contents(source) == before
  assert 'leaving out the broken episode' in out
  assert 'Finished at step 400, 20 updates.' in out  # 5 in 100 steps
  assert out.count('Evaluation: ') == 2  # at 0 and 400
  assert not list((logdir / 'episodes').iterdir())
  # What is added stays, though the run has not seen it.
  (source / path.name.replace('T', 'U')).write_bytes(path.read_bytes())
  before = contents(source)
  assert run(logdir, *words) == 0  # as many as --steps brings
  out = capsys.readouterr().out
  assert 'Resumed at step 400, 20 updates.' in out
  assert 'Finished at step 1000, 50 updates.' in out
  assert contents(source) == before
  record = json.loads((logdir / 'config.json').read_text())
  assert record['method'] == 'dreamer-offline-image-state'
  logged = [x['step'] for x in read_metrics(logdir) if 'model_loss' in x]
  assert logged == sorted(logged) and logged[-1] == 1000 and len(logged) >= 5


@pytest.mark.parametrize(
  'task, reason',
  [
    ('custom_robot', 'custom_robot is made by a function'),
    ('gym_Robot-v0', "There is no environment 'Robot-v0'"),
  ],
)
def test_without_an_environment(reach, tmp_path, task, reason, capsys):
  """The spaces are those of the episodes."""
  logdir = tmp_path / 'run'
  words = [f'--offline={reach}', f'--task={task}', '--inputs=state']
  assert run(logdir, *words, '--updates=3') == 0
  out = capsys.readouterr().out
  assert f'No evaluations: {reason}' in out
  assert 'Evaluation: ' not in out
  agent = dreamer.load(logdir)
  assert agent.inputs == dict(state=(4,)) and agent.action_space.shape == (2,)
  assert not hasattr(agent.action_space, 'discrete')


def test_one_hot_actions_are_found_in_episodes(tmp_path):
  catch = tmp_path / 'catch'
  rng = np.random.default_rng(0)
  for _ in range(3):
    actions = np.eye(3, dtype=np.float32)[rng.integers(3, size=9)]
    actions[0] = 0
    rows = dict(
      action=actions,
      reward=np.zeros(9, np.float32),
      discount=np.ones(9, np.float32),
      image=rng.integers(0, 256, (9, 64, 64, 3), np.uint8),
    )
    # As the release writes them.
    catch.mkdir(exist_ok=True)
    path = catch / f'20200101T000000-{rng.integers(1e9)}-9.npz'
    np.savez_compressed(path, **rows)
  words = [f'--offline={catch}', '--task=custom_robot', '--updates=3']
  assert run(tmp_path / 'discrete', *words) == 0
  space = dreamer.load(tmp_path / 'discrete').action_space
  assert space.discrete and space.choices == (3,)


def test_several_choices_are_those_of_the_run_of_the_episodes(tmp_path, capsys):
  """Which the vectors side by side do not tell."""
  box = spaces.OneHotBox([2, 3])
  rows = dict(
    state=np.zeros((9, 3), np.float32),
    action=box.encode(np.ones((9, 2), int)),
    reward=np.zeros(9, np.float32),
    discount=np.ones(9, np.float32),
  )
  source = tmp_path / 'source'
  episode_files.save_episodes(source / 'episodes', [rows] * 3)
  bare = [f'--offline={source}', '--task=custom_robot', '--inputs=state']
  assert run(tmp_path / 'bare', *bare, '--updates=1') == 2
  assert '2 choices side by side, but not which' in capsys.readouterr().err
  flags = ['--task=custom_robot', '--inputs=state', '--preset=debug']
  config = commandline.parse_flags([f'--logdir={source}', *flags])
  runfile.write_config(config, dict(state=(3,)), box)
  words = [f'--offline={source}', *flags, '--updates=3', '--batch_length=9']
  assert run(tmp_path / 'run', *words) == 0
  assert dreamer.load(tmp_path / 'run').action_space.choices == (2, 3)


@pytest.mark.parametrize(
  'words, message',
  [
    (['--offline={}/nothing'], 'holds no whole episode'),
    # Its windows may be longer than episodes of the task are here.
    (['--offline={}/nothing', '--batch_length=200'], 'holds no whole episode'),
    (['--offline={}/nowhere'], '/nowhere: there is no such folder'),
    (['--updates=5'], '--updates is for --offline'),
    (['--offline={}', '--train_steps=0'], 'needs --train_steps of 1 or more'),
    (['--offline={reach}', '--inputs=pose'], 'it has image, state'),
    (['--offline={reach}', '--task=toy_catch'], 'are of another task'),
    (['--offline={reach}', '--action_repeat=2'], 'repeat 1; give that'),
  ],
)
def test_bad_input(reach, tmp_path, words, message, capsys):
  words = [w.format(tmp_path, reach=reach) for w in words]
  (tmp_path / 'nothing').mkdir()
  task = [] if any('--task' in w for w in words) else ['--task=toy_reach']
  assert run(tmp_path / 'run', *task, *words) == 2
  assert message in capsys.readouterr().err


ROWS = dict(
  state=np.zeros((9, 3), np.float32),
  action=np.full((9, 1), 0.5, np.float32),
  reward=np.zeros(9),
  discount=np.ones(9, np.float32),
)


def test_biases_alone_are_no_weights(reach, tmp_path, capsys):
  """The last ones have the size of what is put out, in networks of any."""
  words = ['--task=toy_reach', f'--init_from={reach}', *OTHER, '--cnn_depth=3']
  words += ['--train_steps=0', '--pretrain=0', '--steps=420']
  assert run(tmp_path / 'other', *words, '--inputs=image,state') == 2
  assert 'none of its weights fits this run' in capsys.readouterr().err


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(action=np.ones(9, int)),
      r'an action in \S+ has shape \[\], not \[A\]',
    ),
    (dict(action=np.full((9, 1), 3)), r'actions beyond \[-1, 1\]: scale them'),
    (
      dict(image=np.zeros((9, 84, 84, 3), np.uint8)),
      r'image in \S+ has shape \[84, 84, 3\], and an agent sees \[64, 64, 3\]',
    ),
    (
      dict(image=np.zeros((9, 64, 64, 1), np.uint8)),
      r'image in \S+ has shape \[64, 64, 1\], and an agent sees \[64, 64, 3\]',
    ),
    (dict(reward=np.full(9, 1e39)), 'reward is not finite, as float32'),
    (dict(discount=np.full(9, 5)), r'discounts beyond \[0, 1\]'),
    (dict(discount=np.full(9, -0.5)), r'discounts beyond \[0, 1\]'),
    (dict(name='walk'), 'walk.npz should end in its number of rows, as in'),
    (dict(name='walk-1'), 'walk-1.npz should end in its number of rows, as in'),
  ],
)
def test_episodes_that_no_agent_learns_from(tmp_path, changes, message, capsys):
  """Of other programs, without an environment that says what is right."""
  rows = {**ROWS, **changes}
  name = rows.pop('name', None)
  first, _ = episode_files.save_episodes(tmp_path / 'data', [rows] * 2)
  if name:
    shutil.rmtree(tmp_path / 'data')
    first.parent.mkdir()
    np.savez(first.with_name(name), **rows)
  inputs = 'image' if 'image' in rows else 'state'
  words = [f'--offline={tmp_path / "data"}', '--task=custom_robot']
  assert run(tmp_path / 'run', *words, f'--inputs={inputs}', '--updates=1') == 2
  assert re.search(message, ''.join(capsys.readouterr()))


def test_actions_of_a_folder_are_known_by_several_episodes(tmp_path, capsys):
  """The first alone could be of choices."""
  choices = np.eye(2, dtype=np.float32)[[0, 1] * 5]
  numbers = dict(ROWS, action=np.full((9, 2), 0.5, np.float32))
  onehot = dict(ROWS, action=choices[:9])
  data = tmp_path / 'data'
  episode_files.save_episodes(data, [onehot, numbers, numbers])
  words = [f'--offline={data}', '--updates=2', '--inputs=state']
  assert run(tmp_path / 'run', *words, '--task=custom_robot') == 0
  assert 'their actions are numbers, 2 each.' in capsys.readouterr().out
  agent = dreamer.load(tmp_path / 'run')
  assert not hasattr(agent.action_space, 'discrete')
  shutil.rmtree(data)
  episode_files.save_episodes(data, [onehot] * 20 + [numbers])
  assert run(tmp_path / 'other', *words, '--task=custom_robot') == 0
  assert 'their actions are one-hot vectors of 2.' in capsys.readouterr().out
  one = replay.Replay(data, 5, onehot=True, repair=False)
  one.rescan()
  rng = np.random.default_rng(0)
  drawn = [one.window(rng)['action'] for _ in range(300)]
  assert np.isin(drawn, (0, 1)).all()
  assert 'it has actions that are no one-hot vectors' in capsys.readouterr().out


def test_one_choice_alone_and_strangers_among_the_first(tmp_path):
  one = np.ones((9, 1), np.float32)
  one = dict(ROWS, action=one, image=np.zeros((9, 64, 64, 3), np.uint8))
  three = dict(one, action=np.eye(3, dtype=np.float32)[[0, 1, 2] * 3])
  pair = dict(one, action=np.full((9, 2), 0.5, np.float32))
  data = tmp_path / 'data'
  episode_files.save_episodes(data, [three, pair, three])
  short = {k: v[:1] for k, v in three.items()}
  episode_files.save_episodes(data, [short])  # it has no action
  assert replay.describe(data)[1] == 1
  shutil.rmtree(data)
  episode_files.save_episodes(data, [one, one])
  one_choice = agent_spec.Spec({}, spaces.OneHotBox(1), [])
  run = types.SimpleNamespace(datadir=data)
  agent_spec.check_choices(run, one_choice)


def test_numbers_are_no_choices_of_a_task(tmp_path, capsys):
  pair = dict(ROWS, action=np.full((9, 3), 0.5, np.float32))
  pair['image'] = np.zeros((9, 64, 64, 3), np.uint8)
  episode_files.save_episodes(tmp_path / 'data', [pair] * 3)
  words = [f'--offline={tmp_path / "data"}', '--task=toy_catch', '--updates=1']
  assert run(tmp_path / 'run', *words) == 2
  text = capsys.readouterr().err
  assert 'are numbers, and toy_catch takes one-hot vectors of 3' in text


def test_what_was_done_before_the_first_row_is_nothing(tmp_path, capsys):
  rows = dict(ROWS, action=np.full((9, 1), 999.0, np.float32))
  rows['action'][1:] = 0.5
  short = {k: v[:3] for k, v in rows.items()}
  (path, _) = episode_files.save_episodes(tmp_path / 'data', [rows, short])
  file = episode_files.EpisodeFile(path)
  assert file.read(0, 4)['action'].tolist() == [[0], [0.5], [0.5], [0.5]]
  assert file.read(1, 3)['action'].tolist() == [[0.5], [0.5]]
  words = [f'--offline={tmp_path / "data"}', '--task=custom_robot']
  words += ['--inputs=state', '--updates=1', '--batch_length=5']
  assert run(tmp_path / 'run', *words) == 0
  out = capsys.readouterr().out
  assert '1 of 2 episodes have fewer rows than --batch_length 5' in out


def test_any_names_and_actions_of_one_number(tmp_path):
  """One number that is always 1 is no choice; files without a step say none."""
  ones = np.ones((9, 1), np.float32)
  rows = {**ROWS, 'source': ones, 'action': ones}
  one = {k: v[:1] for k, v in rows.items()}
  episode_files.save_episodes(tmp_path / 'data', [one, rows, rows])
  words = [f'--offline={tmp_path / "data"}', '--task=custom_robot']
  assert run(tmp_path / 'run', *words, '--inputs=state', '--updates=2') == 0
  agent = dreamer.load(tmp_path / 'run')
  assert agent.inputs == dict(source=(1,), state=(3,))
  assert not hasattr(agent.action_space, 'discrete')


def test_nothing_to_learn_offline(reach, tmp_path, capsys):
  words = [
    '--task=toy_reach',
    f'--offline={reach}',
    '--steps=0',
    '--pretrain=0',
  ]
  assert run(tmp_path / 'run', *words) == 0
  assert 'Nothing was learned: --updates says' in capsys.readouterr().out


def test_other_updates_a_step_take_no_episodes_away(reach, tmp_path, capsys):
  words = ['--task=toy_reach', '--inputs=state', f'--offline={reach}']
  assert run(tmp_path / 'run', *words, '--updates=2') == 0
  assert run(tmp_path / 'run', *words, '--updates=3', '--train_steps=999') == 0
  text = capsys.readouterr().out
  assert 'Resumed at' in text
  assert 'are gone' not in text and 'dropped' not in text


def test_data_may_move(reach, tmp_path, capsys):
  shutil.copytree(reach / 'episodes', tmp_path / 'data')
  words = ['--task=toy_reach', '--inputs=state']
  first = [*words, f'--offline={tmp_path / "data"}', '--updates=2']
  assert run(tmp_path / 'run', *first) == 0
  (tmp_path / 'data').rename(tmp_path / 'moved')
  again = [*words, f'--offline={tmp_path / "moved"}', '--updates=3']
  assert run(tmp_path / 'run', *again) == 0
  text = capsys.readouterr().out
  assert re.search(r'other flags: --offline \S+/moved \(was \S+/data\)', text)
  assert 'Finished at step' in text and ' 3 updates' in text


def test_collects_or_not_for_good(reach, tmp_path, capsys):
  logdir = tmp_path / 'run'
  words = ['--task=toy_reach', '--inputs=state', '--updates=2']
  assert run(logdir, *words, f'--offline={reach}') == 0
  assert run(logdir, *words[:2]) == 0  # what is not given stays
  out = capsys.readouterr().out  # --steps, which is, goes before --updates
  assert 'offline' in out and 'Finished at step 500, 25 updates.' in out
  assert run(logdir, *words[:2], '--offline=', '--updates=0') == 2
  message = rf'holds a run with --offline {re.escape(str(reach))}, not'
  assert re.search(message + " ''\\. Resume", capsys.readouterr().err)


def test_learns_from_random_and_mixed_episodes(tmp_path):
  """To 1.5 times the return of the random ones, without acting once."""
  folder = tmp_path / 'data'
  flags = ['--task=toy_reach', '--inputs=state', '--precision=32']
  config = commandline.parse_flags([*flags, '--logdir=x', '--parallel=thread'])
  env = environments.make_worker(config)
  rng, returns = np.random.default_rng(0), []
  for number in range(60):
    skill = 0.0 if number < 40 else 0.4  # share of steps towards the goal
    rows = [dict(obs=env.reset(), action=np.zeros(2))]
    done = False
    while not done:
      action = rng.uniform(-1, 1, 2)
      if rng.uniform() < skill:
        x, y, goal_x, goal_y = rows[-1]['obs']['state']
        action = np.clip([goal_x - x, goal_y - y], -1, 1)
      obs, _, done, _ = env.step(action.astype(np.float32))
      rows.append(dict(obs=obs, action=action))
    episode = dict(
      action=np.float32([row['action'] for row in rows]),
      state=np.float32([row['obs']['state'] for row in rows]),
      reward=np.float32([row['obs']['reward'] for row in rows]),
      discount=np.ones(len(rows), np.float32),
    )
    episode_files.save_episodes(folder, [episode])
    returns.append(episode['reward'].sum())
  env.close()
  random = np.mean(returns[:40])
  words = [*flags, f'--offline={folder}', '--updates=500', '--eval_every=100']
  assert dreamer.main([f'--logdir={tmp_path / "run"}', *words]) == 0
  found = [
    x['test/return']
    for x in read_metrics(tmp_path / 'run')
    if 'test/return' in x
  ]
  print(random, np.mean(returns[40:]), found)
  assert np.mean(found[-10:]) > 1.5 * random
