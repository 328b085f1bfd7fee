"""Flags, their defaults, and the logdirs that a run refuses."""

import json
import os

import pytest

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
import dreamer  # noqa: I001 (it imports TensorFlow, quietly)
import configs
import gym
import hypothesis
import numpy as np
import tensorflow as tf
from hypothesis import strategies
import tools
import wrappers


def test_release_defaults():
  config = dreamer.define_config()
  expected = {
    'steps': 5e6, 'eval_every': 1e4, 'log_every': 1e3, 'envs': 1,
    'action_repeat': 2, 'time_limit': 1000, 'prefill': 5000,
    'deter_size': 200, 'stoch_size': 30, 'num_units': 400,
    'dense_act': 'elu', 'cnn_act': 'relu', 'cnn_depth': 32, 'pcont': False,
    'free_nats': 3.0, 'kl_scale': 1.0, 'pcont_scale': 10.0,
    'weight_decay': 0.0, 'batch_size': 50, 'batch_length': 50,
    'train_every': 1000, 'train_steps': 100, 'pretrain': 100,
    'model_lr': 6e-4, 'value_lr': 8e-5, 'actor_lr': 8e-5,
    'grad_clip': 100.0, 'discount': 0.99, 'disclam': 0.95, 'horizon': 15,
    'action_init_std': 5.0, 'expl': 'auto', 'action_dist': 'auto',
    'expl_amount': 0.3, 'precision': 'auto', 'parallel': 'process',
  }  # fmt: skip
  assert {k: config[k] for k in expected} == expected


def test_suite_defaults_and_flags_before_them(tmp_path):
  flags = [f'--logdir={tmp_path}', '--task=atari_pong']
  config = configs.parse_flags(flags)
  expected = dict(action_repeat=4, time_limit=108_000, clip_rewards='tanh')
  expected.update(pcont=True, kl_scale=0.1, horizon=10, expl_amount=0.4)
  assert expected.items() <= config.items()
  config = configs.parse_flags([*flags, '--horizon=15', '--pcont=False'])
  assert (config.horizon, config.pcont, config.kl_scale) == (15, False, 0.1)
  flags[1] = '--task=gym_CartPole-v1'
  config = configs.parse_flags(flags)
  assert (config.action_repeat, config.pcont) == (1, True)


def test_actions_are_chosen_by_the_action_space():
  box = gym.spaces.Box(-1, 1, (2,), np.float32)
  onehot = wrappers.OneHotBox(3)
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
    with pytest.raises(tools.UserError, match=words):
      configs.resolve_actions(config, space)


# --- Flags ------------------------------------------------------------------


def parse(*argv):
  return configs.parse_flags(['--logdir', '/tmp/x', *argv])


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
    (['--preset', 'gpu'], '--preset is one of'),
    (['--envs', '0'], '--envs is at least 1'),
    (['--time_limit', '60'], '--batch_length 50 is longer'),
    (['--parallel', 'none'], '--parallel process'),
    (['--horizon', '1'], '--horizon'),
  ],
)
def test_bad_flags_are_errors_with_exit_code_2(argv, words, capsys, tmp_path):
  assert dreamer.main(['--logdir', str(tmp_path / 'run'), *argv]) == 2
  message = capsys.readouterr().err
  assert words in message
  assert len(message.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()


FLAGS = {f[0]: f[1] for group in configs.define_flags().values() for f in group}
VALUES = strategies.one_of(
  strategies.text(max_size=8),
  strategies.integers().map(str),
  strategies.floats().map(str),
  strategies.sampled_from(['True', 'False', 'none', '1e6', '1e400', '0x1']),
)


@hypothesis.given(strategies.sampled_from(sorted(FLAGS)), VALUES)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_value_of_any_flag_is_taken_as_its_type_or_refused(name, text):
  try:
    config = configs.parse_flags(['--logdir=run', f'--{name}={text}'])
  except (tools.UserError, wrappers.TaskError) as error:
    assert str(error)
    return
  default = FLAGS[name]
  value = config[name]
  if isinstance(default, tuple):
    assert value in default
  elif name != 'logdir':
    assert type(value) is type(default)
    assert not isinstance(value, (int, float)) or np.isfinite(float(value))
  assert set(config) == set(dreamer.define_config())


@hypothesis.given(
  strategies.sampled_from(sorted(set(FLAGS) - {'logdir', 'task', 'preset'}))
)
@hypothesis.settings(deadline=None)
def test_what_a_flag_shows_can_be_given_back(name):
  for task in ('dmc_walker_walk', 'toy_reach', 'atari_pong'):
    expected = dreamer.define_config(task)[name]
    words = ['--logdir=run', f'--task={task}', f'--{name}={expected}']
    assert configs.parse_flags(words)[name] == expected


def test_help_names_every_flag(capsys):
  with pytest.raises(SystemExit) as stop:
    configs.parse_flags(['--help'])
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


def test_what_a_run_killed_at_its_start_leaves_is_no_hindrance(tmp_path):
  names = ('lock', 'writable', '.writable.12.tmp', '.config.json.12.tmp')
  for name in names:
    (tmp_path / name).write_text('')
  dreamer.setup_logdir(
    configs.parse_flags(['--logdir', str(tmp_path)])
  ).release()
  left = {p.name for p in tmp_path.iterdir()}
  assert left == {'lock', 'config.json', 'episodes'}


def test_resume_with_another_shape_is_refused(tmp_path, capsys):
  config = dreamer.define_config('toy_reach')
  config.logdir = tmp_path / 'run'
  dreamer.setup_logdir(config)
  config.num_units = 7
  with pytest.raises(tools.UserError, match='--num_units 64, not 7'):
    dreamer.setup_logdir(config)
  config.num_units, config.steps = 64, 123
  dreamer.setup_logdir(config)
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert saved['config']['steps'] == 123
  assert saved['versions']['tensorflow'] == tf.__version__
