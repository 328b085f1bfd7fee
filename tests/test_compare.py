"""The comparison with the paper, on logdirs made by hand."""

import json
import os
import pathlib
import statistics
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
from scipy import stats

import compare
import panels
import paper_scores
import plots
import run_folders
from pages import WALK, write_metrics, write_run

# Appendix G: A3C, D4PG, PlaNet, Dreamer.
TABLE = """
acrobot_swingup 41.90 91.70 3.21 365.26
cartpole_balance 951.60 992.80 452.56 979.56
cartpole_balance_sparse 857.40 1000.00 164.74 941.84
cartpole_swingup 558.40 862.00 312.56 833.66
cartpole_swingup_sparse 179.80 482.00 0.64 812.22
cheetah_run 213.90 523.80 496.12 894.56
cup_catch 104.70 980.50 455.98 962.48
finger_spin 129.40 985.70 495.25 498.88
finger_turn_easy 167.30 971.40 451.22 825.86
finger_turn_hard 88.70 966.00 312.55 891.38
hopper_hop 0.50 242.00 0.37 368.97
hopper_stand 27.90 929.90 5.96 923.72
pendulum_swingup 48.60 680.90 3.27 833.00
quadruped_run - - 280.45 888.39
quadruped_walk - - 238.90 931.61
reacher_easy 95.60 967.40 468.50 935.08
reacher_hard 39.70 957.10 187.02 817.05
walker_run 191.80 567.20 626.25 824.67
walker_stand 378.40 985.20 759.19 977.99
walker_walk 311.00 968.30 944.70 961.67
"""
ROOT = pathlib.Path(compare.__file__).parent


def write_seeds(folder, task, returns, step=100_000, method='dreamer'):
  for seed, value in enumerate(returns):
    path = folder / f'{task}-{method}-{seed}'
    write_run(path, task, seed, [(step, value)], method)


def report(indir, *words):
  """(exit code, what --json wrote)."""
  path = indir.parent / 'report.json'
  code = compare.main([f'--indir={indir}', f'--json={path}', *words])

  def refuse(name):
    raise AssertionError(f'{name} is no JSON')

  return code, json.loads(path.read_text(), parse_constant=refuse)


def test_table_of_the_paper():
  paper = paper_scores.load()
  names = ('a3c', 'd4pg', 'planet', 'dreamer')
  final = {}
  for line in TABLE.split('\n')[1:-1]:
    task, *values = line.split()
    values = [None if v == '-' else float(v) for v in values]
    final[f'dmc_{task}'] = dict(zip(names, values, strict=True))
  assert paper['final'] == final and len(final) == 20
  for name, mean in dict(
    dreamer=823.39, planet=332.97, d4pg=786.33, a3c=243.70
  ).items():
    values = [x[name] for x in final.values() if x[name] is not None]
    assert round(statistics.mean(values), 2) == mean
  about = {k: (v['steps'], v['input']) for k, v in paper['methods'].items()}
  assert about == dict(
    a3c=(10**8, 'proprioceptive'),
    d4pg=(10**8, 'pixels'),
    planet=(5 * 10**6, 'pixels'),
    dreamer=(5 * 10**6, 'pixels'),
  )
  assert set(paper['curves']) == set(final)
  for curve in paper['curves'].values():
    assert len({len(curve[k]) for k in ('steps', 'mean', 'std', 'seeds')}) == 1
  assert 'earlier hyper parameters' in paper['sources']['caveat']


@pytest.mark.parametrize(
  'returns, step, expected',
  [
    ([400, 410, 420], 100_000, 'above'),
    ([130, 140, 150], 100_000, 'within'),
    ([100, 240, 380], 100_000, 'within'),  # far above, but so is the spread
    ([10, 11, 12], 100_000, 'below'),
    ([400, 410], 100_000, 'too few seeds'),
    ([400], 100_000, 'too few seeds'),
    ([400, 410, 420], 90_000, 'above'),
    ([400, 410, 420], 89_000, 'too few steps'),
  ],
)
def test_verdicts(tmp_path, returns, step, expected, capsys):
  write_seeds(tmp_path / 'runs', WALK, returns, step)
  code, result = report(tmp_path / 'runs')
  assert code == 0
  (row,) = result['rows']
  assert row['verdict'] == expected
  assert row['mean'] == np.mean(returns)
  if len(returns) > 1:  # divided by their number
    assert row['std'] == pytest.approx(np.std(returns))
  assert row['seeds'] == len(returns) and row['steps'] == step
  assert (row['paper_final'], row['planet']) == (961.67, 944.7)
  assert (row['d4pg'], row['a3c']) == (968.3, 311.0)
  out = capsys.readouterr().out
  assert f'| {expected} ' in out and f'| {WALK} | dreamer ' in out
  assert 'No run of 19 of the 20 tasks' in out


def test_differences_that_do_not_matter_are_within(tmp_path):
  values = dict(mean=991.0, std=0.0, seeds=5)
  gap = compare.difference([1000.0] * 3, values)
  assert gap == (9.0, 0.0)
  assert compare.verdict(1e5, 3, values, *gap) == 'within'
  gap = compare.difference([1000.0] * 3, dict(values, mean=989.0))
  assert compare.verdict(1e5, 3, values, *gap) == 'above'


def test_interval_is_that_of_scipy():
  rng = np.random.default_rng(0)
  ours, theirs = rng.normal(500, 90, 4), rng.normal(450, 30, 5)
  reference = dict(mean=theirs.mean(), std=theirs.std(ddof=1), seeds=5)
  mean, half = compare.difference(ours, reference)
  expected = stats.ttest_ind(
    ours, theirs, equal_var=False
  ).confidence_interval()
  np.testing.assert_allclose([mean - half, mean + half], expected, rtol=1e-6)


def test_tasks_and_runs_that_cannot_be_compared(tmp_path, capsys):
  write_seeds(tmp_path / 'runs', 'toy_reach', [40.0, 41.0])
  write_run(tmp_path / 'runs/young', WALK, 0, [])
  write_run(tmp_path / 'runs/cup', 'dmc_ball_in_cup_catch', 0, [(1e5, 9)])
  code, result = report(tmp_path / 'runs')
  assert code == 0
  verdicts = {row['task']: row['verdict'] for row in result['rows']}
  assert verdicts == {
    'toy_reach': 'not in the paper',
    WALK: 'no evaluation yet',
    'dmc_cup_catch': 'too few seeds',  # the paper's name of that task
  }
  assert list(result['summary']) == ['dreamer']
  assert result['summary']['dreamer']['tasks'] == 1


def test_score_is_the_mean_of_the_last_window(tmp_path):
  first = [(50_000, 1.0), (100_000, 2.0), (150_000, 100.0), (200_000, 300.0)]
  write_run(tmp_path / 'runs/a', WALK, 0, first)
  write_run(tmp_path / 'runs/b', WALK, 1, first[:3])
  _, result = report(tmp_path / 'runs')
  (row,) = result['rows']
  assert row['steps'] == 150_000  # where both are
  assert row['scores'] == {'0': 51.0, '1': 51.0}  # (50,000, 150,000]
  for window in (50_000, 1e-300):
    _, result = report(tmp_path / 'runs', f'--window={window}')
    assert result['rows'][0]['scores'] == {'0': 100.0, '1': 100.0}


def test_runs_that_do_not_count_are_named(tmp_path, capsys):
  """Else a seed that failed would change a verdict without a word."""
  write_seeds(tmp_path / 'runs', WALK, [900.0, 880.0, 910.0])
  write_run(tmp_path / 'runs/bad', WALK, 3, [(20_000, 1.0), (130_000, 9.0)])
  write_run(tmp_path / 'runs/young', WALK, 4, [])
  _, result = report(tmp_path / 'runs', '--window=50000')
  assert set(result['rows'][0]['scores']) == {'0', '1', '2'}
  err = capsys.readouterr().err
  for name in ('bad', 'young'):
    assert (
      f'/runs/{name} is left out: it has nothing in the window of 50000' in err
    )
  assert err.count('left out') == 2


@pytest.mark.parametrize(
  'step, nearest, mean',
  [
    (90_000, 100_000, 137.2),
    (149_999, 100_000, 137.2),
    (150_001, 200_000, 508.4),
    (4_940_000, 4_900_000, 951.7),
    (4_960_000, 5_000_000, 961.67),
    (9_000_000, 5_000_000, 961.67),
  ],
)
def test_nearest_published_step(step, nearest, mean):
  found = paper_scores.published(paper_scores.load(), WALK, step)
  assert (found['steps'], found['mean']) == (nearest, mean)
  assert (found['source'] == 'Appendix G') == (nearest == 5_000_000)
  if nearest == 100_000:  # sample standard deviation of 5 seeds
    assert found['std'] == pytest.approx(57.7 * (5 / 4) ** 0.5)


def test_young_runs_are_not_in_the_summary(tmp_path):
  write_seeds(tmp_path / 'runs', WALK, [200.0, 220.0, 240.0], 89_000)
  write_seeds(tmp_path / 'runs', 'dmc_cheetah_run', [1.0, 2.0, 3.0], 90_000)
  _, result = report(tmp_path / 'runs')
  assert result['summary']['dreamer']['tasks'] == 1


def test_other_arguments_are_another_task(tmp_path):
  for size in (3, 4):
    flags = dict(env_args={'size': size})
    write_run(tmp_path / f'runs/{size}', 'gym_Maze-v0', 0, [(1e5, 1)], **flags)
  _, result = report(tmp_path / 'runs')
  tasks = [row['task'] for row in result['rows']]
  assert tasks == [f'gym_Maze-v0 {{"size": {size}}}' for size in (3, 4)]


def test_summary_by_hand(tmp_path, capsys):
  write_seeds(tmp_path / 'runs', WALK, [200.0, 220.0, 240.0])  # paper 137.2
  write_seeds(tmp_path / 'runs', 'dmc_cheetah_run', [100.0, 60.0])  # 127.6
  write_seeds(tmp_path / 'runs', 'toy_catch', [1.0])  # not in the paper
  write_seeds(tmp_path / 'runs', WALK, [300.0], method='planet')
  code, result = report(tmp_path / 'runs')
  assert code == 0
  ours = result['summary']['dreamer']
  assert ours['tasks'] == 2 and ours['share'] == 0.5
  assert ours['normalized'] == pytest.approx((220 + 80) / 2 / 1000)
  assert ours['paper_normalized'] == pytest.approx((137.2 + 127.6) / 2 / 1000)
  # Of 60 100 200 220 240 the lowest and highest quarter (1.25, so 1) go.
  assert ours['iqm'] == pytest.approx((100 + 200 + 220) / 3 / 1000)
  low, high = ours['iqm_interval']
  assert 0.12 < low < ours['iqm'] < high < 0.24
  assert result['summary']['planet']['iqm'] is None  # one seed
  assert 'at or above the paper in 50%' in capsys.readouterr().out


def test_interquartile_mean_leaves_a_quarter_out_at_each_end():
  value, (low, high) = compare.interquartile_mean([np.arange(8.0) ** 2])
  assert value == (4 + 9 + 16 + 25) / 4 and low < value < high


def test_broken_lines_are_left_out(tmp_path, capsys):
  folder = write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 7.0)])
  with (folder / 'metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 101000, "test/return": NaN}\n')
    file.write(b'{"step": 101000, "test/return": -Infinity}\n')
    file.write(b'{"step": 101000, "test/return": Infinity}\n')
    file.write(b'\xff\xfe nonsense\n[1, 2]\n3\n')
    file.write(b'{"step": 102000, "test/return": "high"}\n')
    file.write(b'{"step": 103000, "test/retu')
  code, result = report(tmp_path / 'runs')
  assert code == 0
  assert result['rows'][0]['scores'] == {'0': 7.0}
  assert result['rows'][0]['steps'] == 100_000
  err = capsys.readouterr().err
  assert 'metrics.jsonl: 3 numbers that are not finite' in err
  assert 'metrics.jsonl: 4 broken lines' in err


def test_lines_in_any_order(tmp_path):
  """As an actor and a learner write to two files, and two writers to one."""
  pairs = [(300_000, 5.0), (100_000, 1.0), (280_000, 3.0)]
  write_run(tmp_path / 'runs/a', WALK, 0, pairs)
  _, result = report(tmp_path / 'runs')
  (row,) = result['rows']
  assert (row['steps'], row['scores']) == (300_000, {'0': 4.0})


def test_numbers_beyond_whole_ones(tmp_path):
  """Steps above 2^63, and spreads whose fourth power is."""
  for seed, value in enumerate((1e49, 2e49, 4e49)):
    write_run(tmp_path / f'runs/{seed}', WALK, seed, [(1e30, value)])
  code, result = report(tmp_path / 'runs')
  low, high = result['rows'][0]['interval']
  assert code == 0 and low < 0 < high


def test_names_end_no_cell_of_the_table(tmp_path, capsys):
  write_run(tmp_path / 'runs', WALK, 0, [(1e5, 1.0)], 'a|b\nc')
  assert compare.main([f'--indir={tmp_path}']) == 0
  assert r'| a\|b c | ' in capsys.readouterr().out


def test_layout_of_the_release(tmp_path):
  pairs = [(100_000, 400.0), (120_000, 410.0)]
  for seed in range(3):
    write_metrics(tmp_path / f'runs/{WALK}/dreamer/{seed}', pairs)
  _, result = report(tmp_path / 'runs')
  (row,) = result['rows']
  assert (row['task'], row['method'], row['seeds']) == (WALK, 'dreamer', 3)
  assert row['scores'] == {'0': 405.0, '1': 405.0, '2': 405.0}
  assert row['verdict'] == 'above'


def test_presets_are_methods_of_their_own(tmp_path, capsys):
  pairs = [(100_000, 400.0)]
  write_run(tmp_path / 'runs/a', WALK, 0, pairs, preset='cpu')
  same = dict(eval_every=7, eval_noise=0.0)
  write_run(tmp_path / 'runs/b', WALK, 0, pairs, **same)
  others = dict(horizon=9, steps=7, eval_every=5, eval_noise=0.5)
  write_run(tmp_path / 'runs/c', WALK, 1, pairs, **others)
  _, result = report(tmp_path / 'runs')
  assert {r['method']: r['seeds'] for r in result['rows']} == {
    'dreamer-cpu': 1,
    'dreamer': 2,
  }
  err = capsys.readouterr().err
  assert f'runs of {WALK}, dreamer differ in eval_noise, horizon\n' in err


def test_of_one_seed_twice_the_longer_counts(tmp_path, capsys):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  write_run(tmp_path / 'runs/b', WALK, 0, [(100_000, 2.0), (110_000, 4.0)])
  write_run(tmp_path / 'runs/c', WALK, 0, [(90_000, 7.0)])
  _, result = report(tmp_path / 'runs')
  assert result['rows'][0]['scores'] == {'0': 3.0}
  err = capsys.readouterr().err
  assert 'runs/a is left out' in err and 'runs/c is left out' in err


def test_runs_of_one_seed_that_differ_in_a_flag_are_two_methods(
  tmp_path, capsys
):
  for horizon, score in ((10, 1.0), (15, 2.0)):
    for seed in range(2):
      folder = tmp_path / f'runs/{horizon}-{seed}'
      write_run(folder, WALK, seed, [(1e5, score)], horizon=horizon, envs=seed)
  # Another task of the method has no seed twice, and the same name.
  write_run(tmp_path / 'runs/cheetah', 'dmc_cheetah_run', 0, [(1e5, 7.0)])
  write_run(tmp_path / 'runs/planet', WALK, 0, [(1e5, 5.0)], 'planet')
  _, result = report(tmp_path / 'runs')
  rows = {(r['task'], r['method']): r['scores'] for r in result['rows']}
  assert rows == {
    ('dmc_cheetah_run', 'dreamer horizon=15'): {'0': 7.0},
    (WALK, 'dreamer horizon=10'): {'0': 1.0, '1': 1.0},
    (WALK, 'dreamer horizon=15'): {'0': 2.0, '1': 2.0},
    (WALK, 'planet'): {'0': 5.0},
  }
  assert 'left out' not in capsys.readouterr().err


def test_what_makes_no_method_of_its_own(tmp_path, capsys):
  """What runs may differ in, numbers written otherwise, what auto is."""
  flags = dict(kl_scale=1, profile=0, expl='auto', horizon=15)
  write_run(tmp_path / 'runs/a', WALK, 0, [(1e5, 1.0)], **flags)
  flags = dict(kl_scale=1.0, profile=9, expl='additive_gaussian')
  write_run(tmp_path / 'runs/b', WALK, 0, [(2e5, 2.0)], **flags)
  _, result = report(tmp_path / 'runs')
  assert [row['method'] for row in result['rows']] == ['dreamer']
  assert 'a is left out: same seed' in capsys.readouterr().err
  # A run of older code did what the default is.
  for name, entropy in (('c', 0.5), ('d', 0.0)):
    flags = dict(actor_entropy=entropy, init_only='')
    write_run(tmp_path / 'runs' / name, WALK, 0, [(1e5, 1.0)], **flags)
  _, result = report(tmp_path / 'runs')
  names = {row['method'] for row in result['rows']}
  assert names == {'dreamer actor_entropy=0.0', 'dreamer actor_entropy=0.5'}


def test_a_folder_that_is_given_twice(tmp_path, capsys):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  folders = [str(tmp_path / name) for name in ('runs', 'runs/a')]
  assert compare.main(['--indir', *folders]) == 0
  assert 'left out' not in capsys.readouterr().err


def test_tasks_and_methods_are_chosen_by_patterns(tmp_path, capsys):
  write_seeds(tmp_path / 'runs', WALK, [1.0])
  write_seeds(tmp_path / 'runs', 'dmc_cheetah_run', [1.0])
  write_seeds(tmp_path / 'runs', WALK, [1.0], method='planet')
  _, result = report(tmp_path / 'runs', '--tasks', 'walker', '--methods', '^d')
  assert [(r['task'], r['method']) for r in result['rows']] == [
    (WALK, 'dreamer')
  ]
  assert compare.main([f'--indir={tmp_path}', '--tasks', 'hopper']) == 2
  assert 'there are dmc_cheetah_run, dmc_walker_walk' in capsys.readouterr().err


def make_bad(kind, folder):
  folder.mkdir()
  if kind == 'no evaluation':
    write_run(folder / 'a', WALK, 0, [])
  elif kind == 'unreadable':
    (write_run(folder / 'a', WALK, 0, [(1, 1)]) / 'config.json').write_text('{')
  elif kind == 'numbered':
    write_run(folder / 'a', 5, 0, [(1, 1)])
  elif kind == 'nameless':
    write_metrics(folder / 'a', [(100_000, 1.0)])


def test_runs_behind_links_are_found(tmp_path):
  write_seeds(tmp_path / 'elsewhere', WALK, [1.0, 2.0])
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'link').symlink_to(tmp_path / 'elsewhere')
  code, found = report(tmp_path / 'runs')
  assert code == 0
  (row,) = found['rows']
  assert row['seeds'] == 2


def test_links_in_a_circle_end(tmp_path, capsys):
  write_seeds(tmp_path / 'runs' / 'some', WALK, [1.0, 2.0])
  for name, link in (('a', 'b'), ('c', 'd')):
    (tmp_path / 'runs' / name).mkdir()
    (tmp_path / 'runs' / name / link).symlink_to('..')
  code, found = report(tmp_path / 'runs')
  assert code == 0 and 'left out' not in capsys.readouterr().err
  assert [row['seeds'] for row in found['rows']] == [2]


def test_a_run_within_the_logdir_of_another_is_found(tmp_path):
  outer = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  write_run(outer / 'more', WALK, 1, [(100_000, 2.0)])
  write_metrics(outer / 'act', [(100_000, 1.0)])
  code, found = report(tmp_path / 'runs')
  assert code == 0 and [row['seeds'] for row in found['rows']] == [2]


@pytest.mark.parametrize(
  'line, named',
  [('5', True), ('null', True), ('[1, "a"]', False), ('{"step": 1e308}', True)],
)
def test_odd_lines_are_no_hindrance(tmp_path, line, named, capsys):
  folder = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write(line.replace('}', ', "test/return": -1e308}') + '\n')
  words = [f'--indir={folder}', f'--outdir={tmp_path / "plots"}']
  assert compare.main(words) == 0
  assert ('left out' in capsys.readouterr().err) == named
  assert compare.main([*words, '--yaxis=foo']) == 2
  assert 'there is no foo in any' in capsys.readouterr().err


@pytest.mark.parametrize('change', [dict(method=['a']), '[' * 10**5])
def test_odd_configurations_are_left_out(tmp_path, change, capsys):
  write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  path = write_run(tmp_path / 'odd', WALK, 0, [(100_000, 1.0)]) / 'config.json'
  if isinstance(change, dict):
    change = json.dumps({**json.loads(path.read_text()), **change})
  path.write_text(change)
  code, found = report(tmp_path)
  assert code == 0 and len(found['rows']) == 1
  assert f'{path} is not readable' in capsys.readouterr().err


def as_user(name, *words):
  """Runs a script without root's right to read everything."""
  rights = '-dac_override,-dac_read_search'
  command = ['setpriv', f'--bounding-set={rights}', f'--inh-caps={rights}']
  command = command if os.geteuid() == 0 else []
  return subprocess.run(
    [*command, sys.executable, ROOT / name, *map(str, words)],
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  'name, flags', [('compare.py', []), ('report.py', ['--videos'])]
)
def test_a_folder_that_cannot_be_read_is_left_out(tmp_path, name, flags):
  runs = tmp_path / 'runs'
  checkpoints = write_run(runs / 'a', WALK, 0, [(1e5, 1.0)]) / 'checkpoints'
  checkpoints.mkdir()
  (checkpoints / 'ckpt-5.index').write_bytes(b'nonsense')
  checkpoints.chmod(0o444)
  closed, listed, above = runs / 'closed', runs / 'listed', tmp_path / 'above'
  for seed, (folder, mode) in enumerate(
    [(closed, 0o000), (listed, 0o444), (above, 0o000)], 1
  ):
    write_run(folder / 'run', WALK, seed, [(100_000, 1.0)])
    (folder if folder != listed else folder / 'run').chmod(mode)
  words = [*flags, f'--outdir={tmp_path}/site', '--indir']
  done = as_user(name, *words, runs)
  assert done.returncode == 0, done.stderr
  for path in (closed, listed / 'run/config.json'):
    assert f'{path} is left out: Permission denied' in done.stderr
  done = as_user(name, *words, above / 'run')
  message = f'error: --indir {above}/run is not a folder that can be read'
  assert (done.returncode, done.stderr) == (2, f'{name}: {message}\n')
  for folder in (checkpoints, closed, listed / 'run', above):  # for pytest
    folder.chmod(0o755)


def test_an_output_that_nobody_takes(tmp_path):
  folder = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  ours, theirs = os.pipe()
  os.close(ours)
  full = os.open('/dev/full', os.O_WRONLY)
  error = (
    'compare.py: error: cannot write the output: No space left on device\n'
  )
  site = ['report.py', f'--outdir={tmp_path}/site']
  for words, stdout, expected in (
    (site, os.dup(theirs), ''),
    (['compare.py'], theirs, ''),
    (['compare.py'], full, error),
  ):
    result = subprocess.run(
      [sys.executable, *words, f'--indir={folder}'],
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    os.close(stdout)
    assert (result.returncode, result.stderr) == (1, expected)


@pytest.mark.parametrize(
  'kind, message',
  [
    ('empty', 'there is no run in'),
    ('no evaluation', 'no evaluation has finished'),
    ('unreadable', 'config.json is not readable'),
    ('numbered', 'config.json is not readable'),
    ('nameless', 'not called task/method/seed'),
  ],
)
def test_folders_without_results(tmp_path, kind, message, capsys):
  make_bad(kind, tmp_path / 'runs')
  assert compare.main([f'--indir={tmp_path / "runs"}']) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  'words, message',
  [
    (['--indir', '/nowhere'], '/nowhere is not a folder'),
    (['--indir', 'a/' * 2500], 'is not a folder'),
    ([], '--indir'),
    (['--indir', '.', '--window', '0'], '--window takes a number above 0'),
    (['--indir', '.', '--bins', 'x'], '--bins'),
    (['--indir', '{}', '--tasks', '('], '--tasks'),
    (['--indir', '{}', '--yaxis', 'nothing'], 'no run has nothing by step'),
    (['--indir', '{}', '--yaxis', 'test/retrun'], 'did you mean test/return'),
    (['--indir', '{}', '--xaxis', 'episode'], 'did you mean episodes'),
    (
      ['--indir', '{}', '--yaxis', 'train/return', '--xaxis', 'test/return'],
      'no line has both',
    ),
    (['--indir', '{}', '--json', '/proc/nowhere/x'], 'cannot write'),
    (['--indir', '{}', '--json', '{}'], 'is a folder; choose another name'),
    (['--indir', '{}', '--json', '{}/o', '--outdir', '{}/o'], 'o is a folder;'),
    (
      ['--indir', '{}', '--methods', '-cpu$'],
      'write --flag=VALUE for one that',
    ),
    (['--indir', '{}', '--outdir', '{}', '--bins', '1e-6'], 'choose 100'),
    (['--indri', '{}'], 'did you mean --indir?'),
  ],
)
def test_bad_flags(tmp_path, words, message, capsys):
  write_seeds(tmp_path, WALK, [1.0])
  assert compare.main([w.format(tmp_path) for w in words]) == 2
  err = capsys.readouterr().err
  assert err.startswith('compare.py: error: ') and message in err


def test_curves(tmp_path, capsys):
  runs, outdir = tmp_path / 'runs', tmp_path / 'plots'
  for seed in range(2):
    pairs = [(s, s / 1000 + 50 * seed) for s in range(10_000, 310_000, 10_000)]
    write_run(runs / f'a{seed}', WALK, seed, pairs)
  words = [f'--indir={runs}', f'--outdir={outdir}']
  assert compare.main(words) == 0
  one = imageio.imread(outdir / 'curves.png')[..., :3]
  assert (outdir / 'curves.pdf').read_bytes()[:5] == b'%PDF-'
  assert (one != 255).any((0, 1)).all()
  write_seeds(runs, 'toy_reach', [7.0])
  write_seeds(runs, 'dmc_hopper_hop', [7.0], method='planet')
  assert compare.main(words) == 0
  three = imageio.imread(outdir / 'curves.png')[..., :3]
  assert three.shape[1] == 3 * one.shape[1] == 3 * 360
  assert three.shape[0] == one.shape[0] == 350
  for picture in (one, three):  # the color of the first method: the mean
    blue = (picture == (31, 119, 180)).all(-1)
    assert blue.sum() > 200
  orange = (three == (255, 127, 14)).all(-1)
  assert orange.any() and not (one == (255, 127, 14)).all(-1).any()
  assert f'Wrote {outdir}/curves.pdf.' in capsys.readouterr().out


def test_names_are_no_formulas(tmp_path):
  method = 'a $10^{ $'
  write_metrics(tmp_path / WALK / method / '0', [(100_000, 1.0)])
  words = [f'--indir={tmp_path}', f'--outdir={tmp_path / "plots"}']
  assert compare.main(words) == 0
  assert (tmp_path / 'plots' / 'curves.png').exists()


@pytest.mark.parametrize('name', [os.fsdecode(b'm\xff$'), '\ud800'])
def test_names_that_are_not_unicode(tmp_path, name):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)], name)
  write_run(tmp_path / 'runs/b', f'toy_{name}', 0, [(100_000, 1.0)])
  code, found = report(tmp_path / 'runs', f'--outdir={tmp_path}/plots')
  names = [(row['task'], row['method']) for row in found['rows']]
  assert code == 0 and names == [(WALK, name), (f'toy_{name}', 'dreamer')]
  assert (tmp_path / 'plots/curves.png').exists()


def test_curves_show_mean_and_spread_by_bins(tmp_path):
  from matplotlib.figure import Figure

  for seed, base in enumerate((100, 300)):
    pairs = [(s, base + s / 1000) for s in (1000, 2000, 3000, 4000)]
    write_run(tmp_path / f'a{seed}', WALK, seed, pairs)
  runs = run_folders.find_runs([tmp_path])
  panel = Figure().subplots()
  assert plots._draw_runs(panel, runs, 'label', 'C0', bins=2000) == 4000
  first, second, mean = (line.get_xydata().tolist() for line in panel.lines)
  assert first == [[2000, 101.5], [4000, 103.5]]
  assert second == [[2000, 301.5], [4000, 303.5]]
  assert mean == [[2000, 201.5], [4000, 203.5]]
  (band,) = panel.collections
  heights = band.get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == (101.5, 303.5)  # +- 100


def test_a_mean_is_of_all_seeds(tmp_path):
  """Which evaluate at other steps, and end at others."""
  for seed, base, steps in ((0, 0, (1, 3, 5)), (1, 100, (2, 4, 6, 8))):
    pairs = [(1000 * s, base + s) for s in steps]
    write_run(tmp_path / f'a{seed}', WALK, seed, pairs)
  lines, end = drawn(tmp_path, bins=1000)
  mean = lines[-1].get_xydata().tolist()
  assert end == 8000 and mean == [[1000 * s, 50 + s] for s in (2, 3, 4, 5)]
  runs = run_folders.find_runs([tmp_path])
  first, second, whole = panels.curves(runs, 'a', 'c0')
  assert whole.x[-1] == first.x[-1] < second.x[-1]
  assert whole.y[-1] == pytest.approx(50 + whole.x[-1] / 1000, abs=0.3)
  assert [line.shown for line in (first, second, whole)] == [0, 0, 1]


def test_seeds_without_a_step_in_common_have_no_mean(tmp_path):
  for seed, steps in enumerate(((1, 2), (3, 4))):
    pairs = [(1000 * s, s) for s in steps]
    write_run(tmp_path / f'a{seed}', WALK, seed, pairs)
  lines, end = drawn(tmp_path, bins=1000)
  assert end == 4000 and len(lines[-1].get_xydata()) == 0
  lines = panels.curves(run_folders.find_runs([tmp_path]), 'a', 'c0')
  assert [line.shown for line in lines] == [True, False]


def test_nothing_in_a_logdir_is_touched(tmp_path):
  folder = write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 400.0)])
  before = {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]}
  assert compare.main([f'--indir={tmp_path}']) == 0
  after = {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]}
  assert after == before


def test_another_axis_is_named_and_may_be_negative(tmp_path, capsys):
  for seed, shift in enumerate((0, 4)):
    folder = write_run(tmp_path / f'{seed}', WALK, seed, [])
    lines = [{'loss': x - 10 - shift, 'value': 1.0} for x in range(9)]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'metrics.jsonl').write_text(text)
  words = ['--xaxis=loss', '--yaxis=value', '--window=5']
  code, found = report(tmp_path, *words)
  out, err = capsys.readouterr()
  assert code == 0 and 'the mean of its last 5 of loss.\n' in out
  assert 'Warning' not in out + err
  axes = found['xaxis'], found['yaxis'], found['window']
  assert axes == ('loss', 'value', 5)
  rule = ' '.join(found['rule'].split())
  assert 'the mean of its value in the window of 5 of loss that ends' in rule
  assert 'Verdict' not in rule


def test_only_evaluations_are_held_against_the_paper(tmp_path, capsys):
  for seed in range(3):
    folder = write_run(tmp_path / f'runs/{seed}', WALK, seed, [(100_000, 1.0)])
    with (folder / 'metrics.jsonl').open('a') as file:
      file.write('{"step": 100000, "train/return": 7.0}\n')
  _, found = report(tmp_path / 'runs', '--yaxis=train/return')
  (row,) = found['rows']
  assert (row['scores']['0'], row['verdict'], row['paper']) == (6, None, None)
  (line,) = [x for x in capsys.readouterr().out.splitlines() if WALK in x]
  assert line.count('| - ') == 7  # from the paper on
  _, found = report(tmp_path / 'runs')
  assert found['rows'][0]['verdict'] == 'below'
  assert '100,000 environment steps that ends' in found['rule']


def drawn(folder, bins=0.0):
  """Points of the lines that are drawn of runs, and where they end."""
  from matplotlib.figure import Figure

  panel = Figure().subplots()
  runs = run_folders.find_runs([folder])
  end = plots._draw_runs(panel, runs, 'label', 'C0', bins)
  return panel.lines, end


def test_one_evaluation_is_a_dot(tmp_path):
  write_run(tmp_path / 'a', WALK, 0, [(5000, 9.0)])
  lines, _ = drawn(tmp_path)
  assert [line.get_marker() for line in lines] == ['.', '.']
  write_run(tmp_path / 'b', WALK, 0, [(5000, 9.0), (9000, 8.0)])
  lines, _ = drawn(tmp_path / 'b')
  assert [line.get_marker() for line in lines] == ['None', 'None']


def test_bins_that_end_beyond_the_run_are_shown(tmp_path):
  write_run(tmp_path / 'a', WALK, 0, [(5000, 9.0), (25_000, 8.0)])
  _, end = drawn(tmp_path, bins=1e4)
  assert end == 30_000


def test_other_axes_than_steps_may_be_below_one(tmp_path, capsys):
  folder = write_run(tmp_path / 'runs', WALK, 0, [(100, 1.0)])
  rows = [
    {'step': 100 * n, 'test/return': float(n), 'ratio': n / 10}
    for n in range(1, 10)
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)
  code, found = report(tmp_path, '--xaxis=ratio', '--window=0.2')
  (row,) = found['rows']
  assert code == 0 and (row['steps'], row['seeds']) == (0.9, 1)
  assert row['scores'] == {'0': pytest.approx(8.5)}
  (run,) = run_folders.find_runs([tmp_path / 'runs'], 'ratio')
  edges, curves = plots.binned([run], 0)
  assert np.isfinite(curves).sum() == 9 and edges[-1] == pytest.approx(0.9)


def test_json_comes_after_what_was_printed(tmp_path):
  """In a file that standard output goes to as well; what it held stays."""
  folder = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  path = tmp_path / 'all.txt'
  path.write_text('of last month\n')
  words = [f'--indir={folder}', '--json=/dev/stdout']
  with path.open('a') as file:
    subprocess.run(
      [sys.executable, compare.__file__, *words], stdout=file, check=True
    )
  text = path.read_text()
  assert text.startswith('of last month\n| task')
  assert json.loads(text[text.index('\n{') :])['rows']


def test_files_of_a_run_are_not_written_over(tmp_path, capsys):
  folder = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  before = (folder / 'config.json').read_bytes()
  words = [f'--indir={folder}', f'--json={folder}/config.json']
  assert compare.main(words) == 2
  assert 'config.json is a file of a run' in capsys.readouterr().err
  assert (folder / 'config.json').read_bytes() == before


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
  write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  (tmp_path / 'plots/curves.png').mkdir(parents=True)
  code, found = report(tmp_path / 'runs', f'--outdir={tmp_path}/plots')
  assert code == 2 and len(found['rows']) == 1  # the figures are not lost
  err = capsys.readouterr().err
  assert 'cannot read or write' in err and 'curves.png' in err
