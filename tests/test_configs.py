"""Flags, their defaults, and the logdirs that a run refuses."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import gym
import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies

import arguments
import benchmark
import cli
import commandline
import compare
import configs
import dreamer
import episode_files
import evaluate
import file_io
import run_setup
import runfile
import spaces
import training


def test_release_defaults():
  config = dreamer.define_config()
  expected = {
    'steps': 5e6, 'eval_every': 1e4, 'log_every': 1e3, 'envs': 1,
    'action_repeat': 2, 'time_limit': 1000, 'prefill': 5000,
    'deter_size': 200, 'stoch_size': 30, 'num_units': 400,
    'dense_act': 'elu', 'cnn_act': 'relu', 'cnn_depth': 32, 'pcont': False,
    'free_nats': 3.0, 'kl_scale': 1.0, 'reward_scale': 1.0,
    'pcont_scale': 10.0, 'weight_decay': 0.0, 'batch_size': 50,
    'batch_length': 50, 'train_every': 1000, 'train_steps': 100,
    'pretrain': 100, 'model_lr': 6e-4, 'value_lr': 8e-5, 'actor_lr': 8e-5,
    'grad_clip': 100.0, 'discount': 0.99, 'disclam': 0.95, 'horizon': 15,
    'action_init_std': 5.0, 'expl': 'auto', 'action_dist': 'auto',
    'expl_amount': 0.3, 'precision': 'auto', 'parallel': 'process',
  }  # fmt: skip
  assert {k: config[k] for k in expected} == expected


def test_suite_defaults_and_flags_before_them(tmp_path):
  flags = [f'--logdir={tmp_path}', '--task=atari_pong']
  config = commandline.parse_flags(flags)
  expected = dict(action_repeat=4, time_limit=108_000, clip_rewards='tanh')
  expected.update(pcont=True, kl_scale=0.1, horizon=10, expl_amount=0.4)
  assert expected.items() <= config.items()
  config = commandline.parse_flags([*flags, '--horizon=15', '--pcont=False'])
  assert (config.horizon, config.pcont, config.kl_scale) == (15, False, 0.1)
  flags[1] = '--task=gym_CartPole-v1'
  config = commandline.parse_flags(flags)
  assert (config.action_repeat, config.pcont) == (1, True)


def test_actions_are_chosen_by_the_action_space():
  box = gym.spaces.Box(-1, 1, (2,), np.float32)
  onehot = spaces.OneHotBox(3)
  for space, dist, expl in (
    (box, 'tanh_normal', 'additive_gaussian'),
    (onehot, 'onehot', 'epsilon_greedy'),
  ):
    config = dreamer.define_config('gym_Some-v0')
    configs.resolve_actions(config, space)
    assert (config.action_dist, config.expl) == (dist, expl)
    config.expl = 'completely_random'
    configs.resolve_actions(config, space)
    assert config.expl == 'completely_random'
  for space, flags, words in (
    (box, dict(action_dist='onehot'), '--action_dist is tanh_normal'),
    (onehot, dict(action_dist='tanh_normal'), '--action_dist is onehot'),
    (onehot, dict(expl='additive_gaussian'), '--expl is epsilon_greedy'),
  ):
    config = dreamer.define_config('gym_Some-v0')
    config.update(flags)
    with pytest.raises(cli.UserError, match=words):
      configs.resolve_actions(config, space)


# --- Flags ------------------------------------------------------------------


def parse(*argv):
  return commandline.parse_flags(['--logdir', '/tmp/x', *argv])


def test_flags_parse_as_in_the_release():
  config = parse('--steps', '1e6', '--pcont', 'True', '--grad_clip', '1')
  assert config.steps == 1_000_000
  assert isinstance(config.steps, int)
  assert config.pcont is True
  assert config.grad_clip == 1.0


def test_a_given_flag_wins_over_preset_and_task():
  assert parse('--preset', 'cpu').num_units == 200
  assert parse('--preset', 'cpu', '--num_units', '7').num_units == 7
  assert parse('--task', 'toy_reach').action_repeat == 1
  paper = parse('--preset', 'paper')
  assert (paper.num_units, paper.actor_layers) == (300, 3)
  assert paper.collect_action == 'mode'


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--batchsize', '5'], 'did you mean --batch_size'),
    (['--task', 'dmc_walker_wlak'], 'dmc_walker_walk'),
    (['--task', 'nonsense'], 'nonsense'),
    (['--task', 'atari_pnog'], 'atari_pong'),
    (['--task', 'dmlab_collect'], 'google-deepmind/lab'),
    (['--steps', 'many'], '--steps takes a whole number'),
    (['--steps', '1.5'], '--steps takes a whole number'),
    (['--pcont', 'yes'], '--pcont takes True or False'),
    (['--preset', 'gpu'], '--preset takes one of release, paper'),
    (['--envs', '0'], '--envs takes a whole number from 1'),
    (['--time_limit', '60'], '--batch_length 50 is longer'),
    (['--parallel', 'none'], '--parallel process'),
    (['--horizon', '1'], '--horizon takes a whole number from 2'),
    (['--seed', '-1'], '--seed takes a whole number from 0 to 4,294,967,295'),
    (['--seed', '5e9'], "not '5e9'"),
    (['--opt_eps', '1e-40'], '--opt_eps takes a number from 1e-30'),
    (['--dense_act', 'foo'], '--dense_act takes one of elu'),
    (['--dense_act', 'rleu'], 'did you mean relu'),
    (['--weight_decay_pattern', '('], 'unterminated subpattern'),
    (['--worker_timeout', '-5'], '--worker_timeout takes a number from 0'),
    (['--worker_timeout', '1e12'], 'to 1,000,000'),
    (['--model_lr', '-1'], '--model_lr takes a number from 0 to 1'),
    (['--discount', '2'], '--discount takes a number above 0, at most 1'),
    (['--discount', '0'], '--discount takes'),
    (['--disclam', '-1'], '--disclam takes'),
    (['--grad_clip', '-1'], '--grad_clip takes'),
    (['--reward_layers', '-1'], '--reward_layers takes'),
    (['--precision', '8'], '--precision takes one of auto, 16'),
    (['--env_args', '[1]'], '--env_args takes a JSON object'),
    (['--env_args', '{1}'], 'Expecting property name'),
    (['--env_args', '{"a": 1e400}'], '--env_args takes a JSON object'),
    (['--env_args', '{"a": 1}'], '--env_args is for gym_ tasks'),
    (['--time_limit', '1'], 'Choose a larger --time_limit'),
    (['--log_info', 'success'], '--log_info is for gym_ and custom_ tasks'),
    (
      ['--task', 'gym_CartPole-v1', '--log_info', 'success,return'],
      'return is logged of every episode anyway',
    ),
    (['--task', 'crafter_reward'], 'gym_crafter:CrafterReward-v1'),
  ],
)
def test_bad_flags_are_errors_with_exit_code_2(argv, words, capsys, tmp_path):
  assert dreamer.main(['--logdir', str(tmp_path / 'run'), *argv]) == 2
  message = capsys.readouterr().err
  assert words in message
  assert len(message.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--task=toy_reach', '--cameras=1'], 'toy_reach has none to choose'),
    # Images are rendered, though the agent does not see them.
    (['--parallel=none', '--inputs=state', '--record=image'], '--parallel'),
  ],
)
def test_what_a_task_cannot_have(argv, words):
  with pytest.raises(cli.UserError, match=words):
    parse(*argv)


FLAGS = configs.all_flags()
TEXTS = strategies.one_of(
  strategies.text(max_size=8),
  strategies.integers().map(str),
  strategies.floats().map(str),
  strategies.sampled_from(['True', 'False', 'none', '1e6', '1e400', '0x1']),
  strategies.sampled_from(
    ['{}', '{"a": NaN}', '[' * 2000, '(', 'elu', '~no/x']
  ),
)


def values(flag):
  """Texts of values that a flag takes: the ends of its range, and others."""
  kind = flag.kind
  if isinstance(kind, arguments.Whole):
    # What is bounded for its memory or time is left small.
    top = kind.high if kind.high >= 10**9 else kind.low + 7
    top = strategies.sampled_from([kind.low, top])
    return strategies.one_of(top, strategies.integers(kind.low, kind.low + 5))
  if isinstance(kind, arguments.Number):
    ends = strategies.sampled_from([kind.low, kind.high])
    return strategies.one_of(ends, strategies.floats(kind.low, kind.high))
  if isinstance(kind, arguments.Choice):
    return strategies.sampled_from(kind.words)
  if isinstance(kind, arguments.Truth):
    return strategies.booleans()
  return strategies.just(arguments.text(flag.default))


@hypothesis.given(strategies.sampled_from(sorted(FLAGS)), TEXTS)
@hypothesis.example('offline', 'no/such\nfolder')
@hypothesis.example('offline', 'no/such\x85folder')
@hypothesis.example('offline', 'no/such\x1b[31mfolder')
@hypothesis.settings(max_examples=500, deadline=None)
def test_any_text_for_any_flag_is_taken_as_its_kind_or_refused(name, text):
  flag = FLAGS[name]
  try:
    config = commandline.parse_flags(['--logdir=run', f'--{name}={text}'])
  except cli.UserError as error:
    assert str(error).isprintable()
    return
  value = config[name]
  if isinstance(flag.kind, arguments.Choice):
    assert value in flag.kind.words
  elif isinstance(flag.kind, (arguments.Whole, arguments.Number)):
    assert type(value) is type(flag.default)
    assert flag.kind.low <= value <= flag.kind.high
  else:
    assert isinstance(value, (type(flag.default), pathlib.Path))
  assert set(config) == set(FLAGS)


@pytest.mark.parametrize('name', FLAGS)
def test_beyond_its_range_a_flag_is_refused(name):
  """Before anything is written: the message says what is taken."""
  kind = FLAGS[name].kind
  wrong = ['nonsense\n']
  if isinstance(kind, (arguments.Whole, arguments.Number)):
    wrong += [str(x) for x in (kind.low - 1, 2 * kind.high + 1, -5, 'nan')]
  if isinstance(kind, arguments.Pattern):
    wrong = ['(', '*']
  if isinstance(kind, arguments.Names) and not isinstance(
    kind.each, arguments.Whole
  ):
    wrong = ['a,,b', ',']
  if isinstance(kind, arguments.Path):
    wrong = ['~no_such_user/x', '\udcff']
    wrong += [] if isinstance(kind, arguments.Folder) else ['']
  for text in wrong:
    with pytest.raises(cli.UserError) as error:
      parse(f'--{name}={text}')
    assert str(error.value).startswith((f'--{name} takes ', 'There is no task'))


@pytest.fixture
def eager():
  tf.config.run_functions_eagerly(True)
  yield
  tf.config.run_functions_eagerly(False)


@pytest.mark.slow
@hypothesis.given(
  strategies.fixed_dictionaries({k: values(f) for k, f in FLAGS.items()})
)
@hypothesis.settings(
  max_examples=12,
  deadline=None,
  suppress_health_check=list(hypothesis.HealthCheck),
  phases=[hypothesis.Phase.generate],
)
def test_whatever_all_flags_take_can_be_learned_with(eager, given):
  """Each is one that its flag takes; an agent makes an update with them."""
  given.update(logdir='run', task='toy_reach', preset='debug', parallel='none')
  given.update(time_limit=1000, batch_length=min(given['batch_length'], 12))
  try:
    config = parse(*(f'--{name}={value}' for name, value in given.items()))
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    with tempfile.TemporaryDirectory() as folder:
      rng = np.random.default_rng(0)
      episode = dict(
        image=rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8),
        action=rng.uniform(-1, 1, (20, 2)).astype(np.float32),
        reward=rng.uniform(0, 1, 20).astype(np.float32),
        discount=np.ones(20, np.float32),
      )
      episode_files.save_episodes(folder, [episode])
      agent = dreamer.Dreamer(config, space)
      batch = next(dreamer.load_dataset(folder, config))
      metrics = agent.train(batch)
      obs = dict(image=batch['image'][:, 0])
      state = (
        agent.world.dynamics.initial(len(batch['image'])),
        batch['action'][:, 0],
      )
      reset = np.zeros(len(batch['image']), bool)
      action, _ = agent.policy(obs, reset, state, agent.noise(True), True)
  except cli.UserError:
    hypothesis.assume(False)
  assert 'model_loss' in metrics and action.shape == state[1].shape


@hypothesis.given(
  strategies.sampled_from(sorted(set(FLAGS) - {'logdir', 'task', 'preset'}))
)
@hypothesis.settings(deadline=None)
def test_what_a_flag_shows_can_be_given_back(name):
  for task in ('dmc_walker_walk', 'toy_reach', 'atari_pong'):
    expected = dreamer.define_config(task)[name]
    value = arguments.text(expected)
    words = ['--logdir=run', f'--task={task}', f'--{name}={value}']
    assert commandline.parse_flags(words)[name] == expected


def test_help_names_every_flag(capsys):
  with pytest.raises(SystemExit) as stop:
    commandline.parse_flags(['--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for name in dreamer.define_config():
    assert f'--{name}' in shown


# --- Logdir -----------------------------------------------------------------


def test_logdir_that_cannot_be_used(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'thesis.tex').write_text('')
  (tmp_path / 'newer').mkdir()
  (tmp_path / 'newer' / 'config.json').write_text('{"config": {"esp": 1}}')
  for name, words in {
    'file/run': 'cannot write',
    'other': 'thesis.tex',
    'newer': 'is of another version of this code (flags esp)',
  }.items():
    assert dreamer.main(['--logdir', str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err
  assert (tmp_path / 'other' / 'thesis.tex').exists()
  assert [p.name for p in (tmp_path / 'other').iterdir()] == ['thesis.tex']


def test_a_logdir_that_cannot_be_listed(tmp_path, monkeypatch):
  """As after umask 0477, which root would not notice."""

  def scandir(path, scan=os.scandir):
    if pathlib.Path(path) == tmp_path:
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return scan(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  config = commandline.parse_flags(['--logdir', str(tmp_path)])
  with pytest.raises(cli.UserError, match='logdir .*: Permission denied'):
    run_setup.setup_logdir(config).close()


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(tmp_path):
  config = commandline.parse_flags(['--logdir', str(tmp_path)])
  run_setup.setup_logdir(config).close()
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(
    cli.UserError, match='cannot read .*/checkpoints: no folder'
  ):
    run_setup.setup_logdir(config)


def test_a_run_that_cannot_begin_holds_no_lock(tmp_path):
  """In the same process, such as a notebook, which keeps the error."""
  config = commandline.parse_flags(
    ['--logdir', str(tmp_path), '--task', 'toy_reach']
  )
  run_setup.setup_logdir(config).close()
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(
    cli.Failure, match='metrics.jsonl: Is a directory'
  ) as kept:
    training.run(config, dreamer.Dreamer)
  (tmp_path / 'metrics.jsonl').rmdir()
  run_setup.setup_logdir(config).close()
  assert kept.value


def test_what_a_run_killed_at_its_start_leaves_is_no_hindrance(tmp_path):
  (tmp_path / 'episodes').mkdir()
  names = ('lock', '.config.json.12.tmp', 'episodes/.notes.tmp')
  for name in names:
    (tmp_path / name).write_text('')
  run_setup.setup_logdir(
    commandline.parse_flags(['--logdir', str(tmp_path)])
  ).close()
  left = {p.name for p in tmp_path.iterdir()}
  assert left == {'lock', 'config.json', 'episodes'}
  assert (tmp_path / 'episodes' / '.notes.tmp').exists()  # not of a run


def test_resume_with_another_shape_is_refused(tmp_path, capsys):
  config = dreamer.define_config('toy_reach')
  config.logdir = tmp_path / 'run'
  run_setup.setup_logdir(config)
  config.num_units = 7
  run_setup.setup_logdir(config)  # nothing has been made with them yet
  config.num_units = 64
  run_setup.setup_logdir(config)
  (tmp_path / 'run' / 'episodes' / 'a-b-3.npz').touch()
  config.num_units = 7
  with pytest.raises(cli.UserError, match='--num_units 64, not 7'):
    run_setup.setup_logdir(config)
  config.num_units, config.steps = 64, 123
  capsys.readouterr()
  run_setup.setup_logdir(config)
  assert '--steps 123 (was 10000).' in capsys.readouterr().out
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert saved['config']['steps'] == 123
  assert saved['versions']['tensorflow'] == tf.__version__
  assert saved['machine'].startswith(
    f'{len(os.sched_getaffinity(0))} cores of '
  )
  assert saved['code'] == runfile.commit()


def test_run_that_is_older_than_a_flag_goes_on_without_it(tmp_path):
  """Though its preset has another value by now."""
  words = [f'--logdir={tmp_path}', '--task=toy_reach', '--preset=cpu']
  config = commandline.parse_flags(words)
  assert config.slow_value > 0
  run_setup.setup_logdir(config)
  (tmp_path / 'episodes' / 'a-b-3.npz').touch()
  path = tmp_path / 'config.json'
  record = json.loads(path.read_text())
  del record['config']['slow_value']
  path.write_text(json.dumps(record))
  assert runfile.load_config(tmp_path).slow_value == 0
  config = commandline.parse_flags(words)
  assert config.slow_value == 0 and config.imag_starts == 64
  assert commandline.parse_flags(words, resumes=False).slow_value > 0
  run_setup.setup_logdir(config)
  config = commandline.parse_flags([*words, '--slow_value=0.02'])
  with pytest.raises(cli.UserError, match='--slow_value 0.0, not 0.02'):
    run_setup.setup_logdir(config)


@pytest.fixture
def begun(tmp_path):
  """A run with episodes: the words that begin it again, and its flags."""
  words = [f'--logdir={tmp_path}', '--task=toy_reach', '--preset=cpu']
  flags = ['--kl_scale=0.5', '--steps=77', '--parallel=none', '--profile=3']
  config = commandline.parse_flags([*words, *flags, '--stoch_size=9'])
  run_setup.setup_logdir(config).close()
  assert commandline.parse_flags(words).kl_scale == 1.0  # it has not begun
  (tmp_path / 'episodes' / 'a-b-3.npz').touch()
  return words, config


def test_a_run_goes_on_with_its_flags(begun, monkeypatch):
  """Though its presets, and those of its task, have other values by now."""
  words, _ = begun
  again = commandline.parse_flags([*words, '--steps=88'])
  assert (again.kl_scale, again.stoch_size, again.steps) == (0.5, 9, 88)
  assert (again.parallel, again.profile) == ('process', 0)
  run_setup.setup_logdir(again).close()
  assert commandline.parse_flags(words, resumes=False).kl_scale == 1.0
  # Of several processes only one may see the run.
  monkeypatch.setenv('TF_CONFIG', '{}')
  assert commandline.parse_flags(words).kl_scale == 1.0


def test_steps_go_before_updates_of_an_earlier_start(begun):
  words, config = begun
  config.update(updates=50, offline='/')
  runfile.write_config(config)
  assert commandline.parse_flags(words).updates == 50
  assert commandline.parse_flags([*words, '--steps=99']).updates == 0


def test_an_actor_keeps_flags_of_its_own(begun, tmp_path):
  words, config = begun
  (tmp_path / 'act').mkdir()
  config.envs = 3
  runfile.write_config(config, folder=tmp_path / 'act')
  act = ['--learner=free', '--role=act']
  assert commandline.parse_flags([*words, *act]).envs == 3
  assert commandline.parse_flags(words).envs == 1


def test_flags_of_a_run_that_do_not_go_with_those_given_are_named(begun):
  words, config = begun
  config.deterministic = True
  runfile.write_config(config)
  message = r'\(the run in the logdir has --deterministic True\)$'
  with pytest.raises(cli.UserError, match=message):
    commandline.parse_flags([*words, '--learner=free'])
  given = [*words, '--learner=free', '--deterministic=True']
  with pytest.raises(cli.UserError, match='must not: choose one of them$'):
    commandline.parse_flags(given)


def test_another_preset_has_its_own_values(begun):
  words, _ = begun
  message = 'with --stoch_size 9, not 16, and --preset cpu. Resume it'
  with pytest.raises(cli.UserError, match=message):
    run_setup.setup_logdir(commandline.parse_flags(words[:2]))
  paper = commandline.parse_flags([*words[:2], '--preset=paper'])
  assert paper.kl_scale == 1.0 and paper.num_units == 300


def test_a_locale_that_is_not_utf8_takes_plain_names_alone():
  """In any other TensorFlow would write to another folder than Python."""
  code = 'import arguments; print(repr(str(arguments.Path().parse({!a}))))'
  env = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
  root = pathlib.Path(runfile.__file__).parent
  for name, ends in {'a b': "'a b'", 'ü': '(the locale is not UTF-8'}.items():
    done = subprocess.run(
      [sys.executable, '-c', code.format(name)],
      env={**os.environ, **env},
      cwd=root,
      capture_output=True,
      text=True,
    )
    assert ends in done.stdout + done.stderr


def test_commit_is_that_of_this_code(tmp_path):
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a']
  shutil.copy(runfile.__file__, tmp_path)
  code = 'import importlib.util as u, sys; spec = u.spec_from_file_location('
  code += '"c", sys.argv[1]); c = u.module_from_spec(spec); '
  code += 'spec.loader.exec_module(c); print(c.commit())'

  def commit(folder=tmp_path):
    words = [sys.executable, '-c', code, str(folder / 'runfile.py')]
    root = pathlib.Path(runfile.__file__).parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    return done.stdout.strip()

  assert commit() == 'None'
  for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'a']):
    subprocess.run([*git, *words], check=True)
  head = subprocess.check_output([*git, 'rev-parse', 'HEAD'], text=True)
  assert head.startswith(commit()) and len(commit()) >= 7
  (tmp_path / 'runfile.py').open('a').write('\n')
  assert head.startswith(commit()[:-1]) and commit()[-1] == '+'
  with pytest.MonkeyPatch.context() as patch:  # as in a hook of another one
    patch.setenv('GIT_DIR', str(tmp_path / 'none'))
    assert head.startswith(commit()[:-1])
  if not os.geteuid():  # of another user
    subprocess.run(['chown', '-R', '12345', str(tmp_path)], check=True)
    assert head.startswith(commit()[:-1])
    subprocess.run(['chown', '-R', '0', str(tmp_path)], check=True)
  (tmp_path / 'below').mkdir()  # such as a virtual environment
  shutil.copy(runfile.__file__, tmp_path / 'below')
  assert commit(tmp_path / 'below') == 'None'


@pytest.mark.parametrize(
  'name, value',
  [
    ('dense_act', 'relu'),
    ('cnn_act', 'elu'),
    ('clip_rewards', 'tanh'),
    ('action_init_std', 1.0),
    ('env_args', {'size': 3}),
  ],
)
def test_what_changes_the_function_of_the_weights_is_fixed(
  tmp_path, name, value
):
  config = dreamer.define_config('gym_Some-v0')
  config.logdir = tmp_path / 'run'
  run_setup.setup_logdir(config).close()
  (config.logdir / 'episodes' / 'a-b-3.npz').touch()
  old = config[name]
  config[name] = value
  with pytest.raises(cli.UserError, match=f'--{name} .*, not ') as error:
    run_setup.setup_logdir(config)
  assert arguments.text(value) in str(error.value)
  config[name] = old
  run_setup.setup_logdir(config).close()


def test_all_other_flags_that_change_are_said(tmp_path, capsys):
  config = dreamer.define_config('toy_reach')
  config.logdir = tmp_path / 'run'
  run_setup.setup_logdir(config).close()
  capsys.readouterr()
  run_setup.setup_logdir(config).close()
  assert capsys.readouterr().out == ''
  config.expl = 'additive_gaussian'  # what auto stands for is no change
  run_setup.setup_logdir(config).close()
  assert capsys.readouterr().out == ''
  config.update(precision='32', model_lr=0.5, expl='completely_random')
  run_setup.setup_logdir(config).close()
  line = 'Resuming with other flags: --precision 32 (was auto), --model_lr 0.5 '
  line += '(was 0.003), --expl completely_random (was additive_gaussian).\n'
  assert capsys.readouterr().out == line


def test_config_keeps_when_a_run_first_started(tmp_path):
  config = dreamer.define_config('toy_reach')
  config.logdir = tmp_path
  runfile.write_config(config)
  path = tmp_path / 'config.json'
  record = dict(json.loads(path.read_text()), started='2020-01-01T00:00:00')
  path.write_text(json.dumps(record))
  config.steps = 7
  runfile.write_config(config)
  record = json.loads(path.read_text())
  assert record['started'] == '2020-01-01T00:00:00'
  assert record['config']['steps'] == 7


def test_preset_for_machines_without_a_gpu():
  """What differs from the release, as docs/results.md has it."""
  both = dict(
    preset='cpu', batch_size=16, batch_length=32, cnn_depth=8, num_units=200,
    free_nats=1.0, kl_balance=0.83, imag_starts=64, slow_value=0.02,
    actor_entropy=0.01, train_steps=200, pretrain=500, model_lr=1e-3,
    value_lr=3e-4, actor_lr=1e-4,
  )  # fmt: skip
  own = dict(
    image=dict(reward_scale=10.0, decode_images=128),
    state=dict(kl_scale=0.6, horizon=10, precision='32', inputs='state'),
  )
  plain = configs.define_config()
  for inputs, changes in own.items():
    config = configs.define_config(preset='cpu', inputs=inputs)
    found = {k: v for k, v in config.items() if v != plain[k]}
    assert found == {**both, **changes}


def test_what_is_just_possible_is_taken():
  """Sequences as long as episodes; all candidates of a plan as the best."""
  flags = ('--time_limit=20', '--action_repeat=2')
  assert parse(*flags, '--batch_length=11').batch_length == 11
  with pytest.raises(cli.UserError, match='Choose 11 or less'):
    parse(*flags, '--batch_length=12')
  assert parse('--plan_candidates=100').plan_best == 100


@pytest.mark.parametrize(
  'name', ['dreamer', 'evaluate', 'compare', 'benchmark']
)
def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch, name):
  monkeypatch.setenv('HOME', str(tmp_path))
  module = dict(
    dreamer=commandline, evaluate=evaluate, compare=compare, benchmark=benchmark
  )[name]
  flags = dict(
    dreamer=('logdir',),
    evaluate=('logdir', 'outdir', 'json'),
    compare=('indir', 'outdir', 'json'),
    benchmark=('json',),
  )[name]
  args = module.parse_flags([f'--{flag}=~/x [1]' for flag in flags])
  for flag in flags:
    path = args[flag] if name == 'dreamer' else getattr(args, flag)
    assert path in (tmp_path / 'x [1]', [tmp_path / 'x [1]'])


def foreign(folder):
  """Files of the user's that a run might take for its own."""
  (folder / 'episodes').mkdir(parents=True)
  files = {
    '.notes.tmp': 'mine',
    'lock': 'my combination',
    'writable': 'mine',
    'episodes/survey.txt': 'mine',
  }
  for name, text in files.items():
    (folder / name).write_text(text)
  return files


def test_files_of_the_users_are_left_alone(tmp_path, capsys):
  files = foreign(tmp_path / 'run')
  flags = ['--task', 'toy_reach', '--logdir', str(tmp_path / 'run')]
  assert dreamer.main(flags) == 2
  words = 'something else (.notes.tmp, writable, lock)'
  assert words in capsys.readouterr().err
  for name, text in files.items():
    assert (tmp_path / 'run' / name).read_text() == text


def test_config_of_another_program_is_left_alone(tmp_path, capsys):
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  assert dreamer.main(['--logdir', str(tmp_path)]) == 2
  assert 'a config.json that is of no run' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


@pytest.mark.parametrize(
  'text, value',
  [('1e0', '1'), ('0,00,2.0', '0,2'), (' 1 , 0', '1,0'), ('', '')],
)
def test_cameras_are_whole_numbers(tmp_path, text, value):
  config = parse(f'--logdir={tmp_path}', f'--cameras={text}')
  assert config.cameras == value


def test_a_folder_is_the_same_by_any_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'data').mkdir()
  config = parse(f'--logdir={tmp_path}', '--offline=data')
  runfile.write_config(config)
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints/ckpt-1.index').write_bytes(b'')
  monkeypatch.chdir('/')
  again = parse(f'--logdir={tmp_path}', f'--offline={tmp_path}/./data')
  assert runfile.check_logdir(again) == []


def test_a_lost_config_is_written_when_it_is_known_what_run_it_is(
  tmp_path, capsys
):
  """Else flags of another run would be those of this one from then on."""
  (tmp_path / 'episodes').mkdir()
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints/ckpt-1.index').write_bytes(b'index')
  (tmp_path / 'metrics.jsonl').write_text('')
  config = parse(f'--logdir={tmp_path}', '--task=toy_reach')
  run_setup.setup_logdir(config).close()
  assert not (tmp_path / 'config.json').exists()
  assert 'config.json is gone; going on with' in capsys.readouterr().out
  (tmp_path / 'checkpoints/ckpt-1.index').unlink()
  (tmp_path / 'checkpoints').rmdir()
  with pytest.raises(cli.UserError, match='holds something else'):
    run_setup.setup_logdir(config)


def test_inputs_are_the_same_in_any_order(tmp_path):
  """Of logdirs as well whose run was started before they were put in order."""
  config = parse(f'--logdir={tmp_path}', '--inputs=state,image')
  assert config.inputs == 'image,state'
  runfile.write_config(config)
  path = tmp_path / 'config.json'
  path.write_text(path.read_text().replace('image,state', 'state,image'))
  assert runfile.load_config(tmp_path).inputs == 'image,state'
  assert runfile.check_logdir(config) == []


def test_saved_texts_are_read_as_values(tmp_path):
  """Where somebody has edited a config.json."""
  values = dict(steps='800', log_images='False', action_repeat='2')
  record = {'config': dict(task='toy_reach', preset='debug', **values)}
  (tmp_path / 'config.json').write_text(json.dumps(record))
  config = runfile.load_config(tmp_path)
  found = [config.steps, config.log_images, config.action_repeat]
  assert found == [800, False, 2]


def test_a_folder_that_may_not_be_searched(tmp_path):
  """Here a name that is too long, as root may search everything."""
  path = tmp_path / '/'.join(['a' * 250] * 20)
  with pytest.raises(cli.UserError, match='cannot write to.*name too long'):
    file_io.make_outputs(path)
  with pytest.raises(cli.UserError, match='File name too long'):
    runfile.load_config(path)


@pytest.mark.parametrize(
  'name, value', [('behavior', 'nosuch'), ('deter_size', -4), ('pcont', 3)]
)
def test_saved_values_are_checked(tmp_path, name, value):
  record = {'config': dict(task='toy_reach', preset='debug', **{name: value})}
  (tmp_path / 'config.json').write_text(json.dumps(record))
  with pytest.raises(cli.UserError, match=f'--{name} {value}, which is not'):
    runfile.load_config(tmp_path)
