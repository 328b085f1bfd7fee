"""Scripts of the search in scores/: their arms, and a small run of each."""

import json
import sys

import numpy as np
import pytest

import cli
import commandline
import dreamer
import gpu
import release
import screen
import search


def test_arms_differ_and_take_as_long():
  """Seconds of a run: those of its environment steps, and of the base."""
  seen = []
  for arm, flags in search.ARMS.items():
    words = search.command('x', 'dmc_walker_walk', arm, '0', 'state')
    config = commandline.parse_flags(words[1:])
    assert (config.preset, config.eval_episodes) == ('cpu', 3)
    assert all(config[k] == v for k, v in flags.items())
    if arm not in ('horizon10', 'table'):  # as the preset was before the search
      assert config.horizon == 15
    seen.append({k: v for k, v in config.items() if k != 'eval_every'})
    seconds = search.SECONDS.get(arm, search.USUAL) * config.steps / 1000
    if arm not in search.STEPS:
      assert seconds == pytest.approx(40 * search.USUAL, rel=0.03)
  assert all(seen.count(config) == 1 for config in seen)


def test_curves_beside_the_release(tmp_path, capsys):
  rows = [(250, 1), (500, 3), (501, 5), (1000, 9)]
  lines = [json.dumps({'step': s, 'train/return': r}) for s, r in rows]
  lines.insert(1, json.dumps({'step': 300, 'model_loss': 4}))
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  assert release.returns(tmp_path) == [2, 7]
  assert release.main([]) == 0
  page = (release.SCORES.parent / 'docs/results.md').read_text()
  assert capsys.readouterr().out in page


@pytest.mark.slow
def test_screen_foretells_rewards(tmp_path):
  """Of a toy; every fifth episode is held out, and the logdir left alone."""
  logdir = tmp_path / 'run'
  words = [f'--logdir={logdir}', '--task=toy_reach', '--preset=debug']
  assert dreamer.main([*words, '--precision=32', '--steps=500']) == 0
  paths = sorted(logdir.rglob('*'))
  episodes = sorted((logdir / 'episodes').glob('*.npz'))
  learned = tmp_path / 'learned'
  learned.mkdir()
  held_out = screen.split(logdir, learned)
  assert held_out == episodes[4::5] and len(held_out) == 2
  assert {p.name for p in learned.iterdir()} == {
    path.name for path in episodes if path not in held_out
  }
  with pytest.raises(cli.UserError, match='learned holds 0 episodes; each'):
    screen.split(learned, tmp_path)
  found = screen.learn(logdir, dict(cnn_depth=4, batch_length=32), 0, 20)
  assert found['updates'] == int(20 / 1.9)  # for equal time
  assert all(np.isfinite(found[k]) and found[k] > 0 for k in (1, 5, 15))
  assert sorted(logdir.rglob('*')) == paths


@pytest.mark.slow
def test_screen_of_episodes_that_it_cannot_use(tmp_path, capsys):
  """They stay as they are."""
  logdir = tmp_path / 'run'
  words = [f'--logdir={logdir}', '--task=toy_reach', '--preset=debug']
  words += ['--precision=32', '--time_limit=30', '--inputs=state']
  assert dreamer.main([*words, '--steps=500', '--pretrain=0']) == 0
  episodes = sorted((logdir / 'episodes').iterdir())
  for costs in ('True', 'False'):
    assert screen.main([f'--episodes={logdir}', f'--costs={costs}']) == 2
    assert 'must have images' in capsys.readouterr().err
  assert sorted((logdir / 'episodes').iterdir()) == episodes
  for path in episodes:
    path.rename(path.with_name(path.name.replace('-31.npz', '-19.npz')))
  with pytest.raises(cli.UserError, match='fewer than 20 rows'):
    screen.split(logdir, tmp_path)


@pytest.mark.slow
def test_search_keeps_finished_runs(tmp_path, monkeypatch):
  small = dict(steps=300, prefill=200, pretrain=1, train_steps=1)
  monkeypatch.setitem(search.ARMS, 'base', small)
  monkeypatch.setattr(search, 'RUNS', tmp_path / 'runs')
  monkeypatch.setattr(search, 'length', lambda arm: 300)
  words = ['search.py', f'--logdir={tmp_path}/logs', '--tasks=toy_reach']
  monkeypatch.setattr(sys, 'argv', words)
  search.main()
  folder = tmp_path / 'runs/toy_reach/dreamer-state-cpu-base/0'
  record = json.loads((folder / 'run.json').read_text())
  assert (record['steps'], record['seed']) == (300, 0)
  assert '--pretrain=1' in record['command'].split()
  about = json.loads(
    (tmp_path / 'logs/toy_reach/base/0/config.json').read_text()
  )
  assert (
    record['code'] == about['code'] and about['machine'] in record['machine']
  )
  assert (folder / 'metrics.jsonl').read_text().count('train/return') == 6
  log = tmp_path / 'logs/toy_reach/base/0.out'
  text = log.read_text()
  search.main()  # nothing is left to do
  assert 'Finished at step 300' in text and log.read_text() == text


def test_search_keeps_no_run_that_was_stopped(tmp_path):
  record = dict(config=dict(task='toy_reach', seed=0, steps=300))
  record.update(code='1', machine='a', versions={})
  (tmp_path / 'config.json').write_text(json.dumps(record))
  for steps in (200, 300):
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(dict(step=steps)) + '\n')
    search.keep(tmp_path, tmp_path / 'kept', ['dreamer.py'])
    assert (tmp_path / 'kept').exists() == (steps == 300)


def test_arms_beside_the_base(tmp_path, monkeypatch, capsys):
  """Areas of 100 and 300 beside 50 and 600: ratios 1/2 and 2."""
  runs = {
    'base/0': [(5, 80), (5, 60), (15, 160)],
    'base/1': [(5, 300)],
    'base/2': [(5, 1)],
    'horizon10/0': [(5, 50)],
    'horizon10/1': [(5, 500), (15, 700)],
    'horizon10/3': [(5, 9)],
  }
  places = {f'toy_reach/dreamer-state-cpu-{k}': v for k, v in runs.items()}
  for arm in ('base', 'horizon10'):  # a task that is not held out
    for seed in '01':
      folder = f'dmc_finger_spin/dreamer-state-cpu-{arm}/{seed}'
      places[folder] = [(5, 7)]
  for name, points in places.items():
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / 'run.json').touch()
    rows = [{'step': s, 'test/return': r} for s, r in points]
    lines = map(json.dumps, [*rows, {'step': 9, 'train/return': 9}])
    (folder / 'metrics.jsonl').write_text('\n'.join(lines))
  monkeypatch.setattr(search, 'RUNS', tmp_path)
  assert search.main(['--table']) == 0
  lines = capsys.readouterr().out.splitlines()
  first = '| `toy_reach`, base | 0, 1, 2 | 100, 300, 1 | 134 | 160, 300, 1 |'
  assert lines[4] == first
  assert lines[5].endswith(
    'horizon10 | 0, 1, 3 | 50, 600, 9 | 220 | 50, 700, 9 |'
  )
  assert lines[-3:] == [
    '| horizon10, search tasks | 2 | 1.00 | 1.00 | 1.00 to 1.00 |',
    '| horizon10, held out | 2 | 1.00 | 2.00 | 0.50 to 2.00 |',
    '| horizon10, all | 4 | 1.00 | 1.33 | 0.71 to 1.41 |',
  ]


def test_table_in_the_docs(capsys):
  assert search.main(['--table']) == 0
  page = (search.ROOT / 'docs/results.md').read_text()
  assert capsys.readouterr().out in page


def test_times_of_a_gpu_on_a_cpu(tmp_path, monkeypatch):
  path = tmp_path / 'gpu.json'
  words = ['gpu.py', '--preset=debug', '--ways', '32,False', f'--json={path}']
  monkeypatch.setattr(sys, 'argv', words)
  gpu.main()
  (figures,) = json.loads(path.read_text()).values()
  middle, least, largest = figures['update_s']
  assert 0 < least <= middle <= largest < figures['first_update_s']
  assert figures['policy_ms'][0] > 0 and 'peak_gib' not in figures


@pytest.mark.parametrize(
  'script, words, message',
  [
    (gpu, ['--ways', '16'], '--ways takes one of 16,True, 16,False'),
    (search, ['--logdir=x', '--arms=bse'], 'did you mean base'),
    (screen, ['--episodes=x', '--arms=bse'], 'did you mean base'),
    (release, ['--out=x'], '--out'),
    (search, [f'--logdir={__file__}/x'], f'cannot write to {__file__}/x'),
    (screen, ['--episodes=x', f'--json={__file__}'], 'cannot be gone on with'),
    (screen, ['--episodes=x', f'--json={__file__}/x'], 'cannot write to'),
  ],
)
def test_bad_input(capsys, script, words, message):
  assert script.main(words) == 2
  assert message in capsys.readouterr().err
