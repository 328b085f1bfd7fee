"""The pages of one's own runs, on logdirs made by hand."""

import errno
import io
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest

import charts
import commandline
import compare
import logger
import media
import panels
import paper_scores
import plots
import report
import run_folders
import run_origins
from pages import (
  EVIL,
  HOSTILE,
  WALK,
  Page,
  add_lines,
  full_config,
  make_site,
  write_metrics,
  write_pictures,
  write_run,
  write_runs,
)

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(folder of the runs, site, what was printed)."""
  folder = tmp_path_factory.mktemp('report')
  indir = write_runs(folder / 'log dir')
  pictures = write_pictures(folder / 'pictures')
  before = contents(indir)
  done = make_site(
    indir, folder / 'site', '--pictures', pictures, '--title', f'Mine {EVIL}'
  )
  assert contents(indir) == before  # nothing in a logdir changes
  return indir, folder / 'site', done.stdout + done.stderr


def contents(folder):
  return {
    path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in folder.rglob('*')
  }


def pages(site):
  return [site / 'index.html', *sorted((site / 'tasks').iterdir())]


def main(*words):
  return report.main([str(word) for word in words])


# --- What is on the pages ---------------------------------------------------


def test_figures_are_those_of_compare(made, tmp_path):
  indir, site, _ = made
  path = tmp_path / 'compare.json'
  assert compare.main([f'--indir={indir}', f'--json={path}']) == 0
  expected = json.loads(path.read_text())
  assert json.loads((site / 'compare.json').read_text()) == expected
  rows = expected['rows']
  cells = [x['data-value'] for x in Page(site / 'index.html').all('td')]
  lines = [cells[i : i + 12] for i in range(0, len(cells), 12)]
  assert len(lines) == len(rows) == 6
  names = ['task', 'method', 'steps', 'seeds', 'mean', None, 'difference']
  names += ['verdict', 'paper_final', 'planet', 'd4pg', 'a3c']
  for row, line in zip(rows, lines, strict=True):
    for name, text in zip(names, line, strict=True):
      value = row[name] if name else (row['paper'] or {}).get('mean')
      assert text == ('' if value is None else str(value))
  assert expected['summary']['dreamer']['tasks'] == 1
  text = ' '.join(Page(site / 'index.html').texts)
  assert 'dreamer: tasks 1, mean normalized score' in text
  assert '5 tasks 4 methods 8 runs' in text
  assert 'in the window of 100,000 environment steps' in text
  assert 'Verdict: within where the 95% interval' in text


def test_each_task_has_a_page_that_the_index_leads_to(made):
  _, site, _ = made
  links = {x['href'] for x in Page(site / 'index.html').all('a')}
  inner = {link for link in links if link.startswith('tasks/')}
  assert len(inner) == 5 and f'tasks/{WALK}.html' in inner
  assert {str(p.relative_to(site)) for p in pages(site)[1:]} == inner
  for path in pages(site):
    for tag, name in (('a', 'href'), ('link', 'href'), ('img', 'src')):
      for attributes in Page(path).all(tag):
        link = attributes[name].partition('#')[0]
        assert not link or link == 'data:,' or (path.parent / link).is_file()


def test_names_are_shown_as_they_are_and_never_run(made):
  _, site, _ = made
  for path in pages(site):
    page = Page(path)
    assert len(page.all('script')) == 1  # ours
    assert not any('onerror' in x for _, x in page.elements)
    assert f'Mine {EVIL}' in ' '.join(page.texts)
  (path,) = [p for p in pages(site) if 'script' in p.name]
  assert re.fullmatch(r'[\w-]+\.html', path.name)
  texts = Page(path).texts
  assert HOSTILE in texts
  assert texts.count(EVIL) >= 3  # machine, code, note
  assert f'm{EVIL}' in texts


def test_what_a_task_page_says(made):
  _, site, _ = made
  page = Page(site / f'tasks/{WALK}.html')
  text = ' '.join(page.texts)
  assert 'random actions, 35.83' in page.texts  # 42 five times, and 5
  assert 'paper at 5e6, 961.7' in page.texts
  titles = ['Evaluation', 'Training', 'Image loss', 'KL divergence']
  titles += ['Saturated actions', 'Values']
  assert [x for x in page.texts if x in titles] == titles
  assert 'Vector loss' not in page.texts  # nobody has logged it
  assert '15 episodes of evaluation, to 150k steps; the last 600.0' in text
  assert '--horizon 15 10' in text and '--deter_size' not in text
  page = Page(site / 'tasks/dmc_cheetah_run.html')
  assert 'the last from 100.0 to 300.0' in ' '.join(page.texts)
  text = ' '.join(Page(site / 'tasks/toy_catch.html').texts)
  assert '--long_gone unknown to this version 7' in text
  text = ' '.join(Page(site / 'tasks/toy_reach.html').texts)
  assert 'No evaluation yet' in text and 'do not say which flags' in text


def test_command_repeats_the_run(made):
  _, site, _ = made
  texts = Page(site / f'tasks/{WALK}.html').texts
  (line,) = [x for x in texts if x.startswith('python') and '--seed 2' in x]
  words = shlex.split(line)
  assert words[:2] == ['python', 'dreamer.py']
  again = commandline.parse_flags(words[2:])
  expected = full_config(WALK, 2, horizon=10)
  assert {**again, 'logdir': str(again.logdir)} == {
    **expected,
    'logdir': 'logdir/2',
  }


def test_command_has_values_that_begin_with_a_dash(tmp_path):
  flags = full_config(WALK, 0, weight_decay_pattern='-kernel')
  del flags['task'], flags['seed']
  write_run(tmp_path / 'run', WALK, 0, [(1, 1.0)], **flags)
  (run,) = run_folders.find_runs([tmp_path])
  words = shlex.split(run_origins.origin(run).command)[2:]
  again = commandline.parse_flags(words)
  assert again.weight_decay_pattern == '-kernel'


def test_command_of_a_custom_task_is_python(tmp_path):
  flags = full_config('custom_mine', 0, horizon=10)
  del flags['task'], flags['seed']
  write_run(tmp_path / 'run', 'custom_mine', 0, [(1, 1.0)], **flags)
  (run,) = run_folders.find_runs([tmp_path])
  command = run_origins.origin(run).command
  begin = "dreamer.train(make_env, './logdir/0', task='custom_mine', "
  assert command.startswith(begin) and 'horizon=10' in command
  compile(command, 'command', 'eval')


def test_flags_follow_from_the_command_of_a_run_without_config(
  tmp_path, monkeypatch
):
  """Not from what else lies at the place that it names."""
  write_run(tmp_path / 'x', 'toy_reach', 0, [])
  monkeypatch.chdir(tmp_path)
  write_metrics(tmp_path / 'runs/toy_reach/dreamer/0', [(900, 4.0)])
  folder = tmp_path / 'runs/toy_reach/dreamer/0'
  command = 'python dreamer.py --logdir x --task toy_reach --horizon 3'
  (folder / 'run.json').write_text(json.dumps(dict(command=command, code=5)))
  (run,) = run_folders.find_runs([tmp_path / 'runs'])
  about = run_origins.origin(run)
  assert (about.command, about.code, about.flags['horizon']) == (
    command,
    '5',
    3,
  )
  assert run_origins.differences([run], [about]) == [('--horizon', '8', '3')]
  assert about.flags['batch_size'] == 16
  words = ('{"command": "x \\""}', '{"command": "dreamer.py --help"}')
  for broken in ('{', '[1]', '{"versions": 3}', *words):
    (folder / 'run.json').write_text(broken)
    assert run_origins.origin(run).flags == {}


def test_pictures_are_those_of_the_tasks(made):
  _, site, out = made
  assert 'toy_reach.gif is left out' in out and 'walker_walk.txt' not in out
  index = Page(site / 'index.html')
  labels = [x['aria-label'] for x in index.all('video')]
  labels = [x.partition(':')[0] for x in labels]
  # Behaviors of two tasks, then dreams; that of the cheetah is a picture.
  assert labels == ['dmc_cheetah_run', WALK, WALK]
  (image,) = index.all('img')
  assert image['alt'].startswith('dmc_cheetah_run: ')
  assert image['loading'] == 'lazy'
  for video in index.all('video'):
    assert video['preload'] == 'none' and 'autoplay' not in video
    data = (site / video['src']).read_bytes()
    assert len(data) <= media.LIMIT
    frames = imageio.imread(data, extension='.mp4', plugin='FFMPEG')
    assert frames.shape == (30, 128, 128, 3)


# --- Charts -----------------------------------------------------------------


def test_a_chart_by_hand():
  line = charts.Line('a', 'c0', np.array([0, 50, 100]), np.array([0, 10, 5]))
  level = charts.Level('b', 'paper', 5)
  chart = charts.Chart('T', 'u', [line], [level], span=(0, 10))
  # 5% of room above and below, 2% on the right.
  assert chart.paths == [('c0 ', 'M0 955L490 45L980 500')]
  assert chart.levels == [('paper dashed', 500)]
  assert chart.legend == [('c0 ', 'a'), ('paper dashed', 'b')]
  assert chart.rows[0] == ('95.5%', '0') and chart.rows[-1] == ('4.5%', '10')
  assert chart.columns[1] == ('24.5%', '25')
  assert chart.words == 'T by environment steps, to 102: a ends at 5'


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-30, 1040, [0, 250, 500, 750, 1000]),
    (0, 153_000, [0, 50_000, 100_000, 150_000]),
    (11_291, 11_300, [11_292, 11_294, 11_296, 11_298, 11_300]),
  ],
)
def test_ticks_are_round(low, high, expected):
  assert charts.ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
  'value, text',
  [
    (0, '0'),
    (0.1 + 0.2, '0.3'),
    (1000, '1000'),
    (9999.7, '10k'),
    (999_960, '1M'),
    (-25_000, '-25k'),
    (1.5e6, '1.5M'),
    (1e-7, '1e-07'),
    (2e9, '2G'),
  ],
)
def test_numbers_are_short(value, text):
  assert charts.short(value) == text


@pytest.mark.parametrize(
  'y',
  [
    *([5.0], [0.0], [1e300, -1e300], [1e308], [1e15, 1e15 + 0.125]),
    *([1e-323], [0.0, 1e-323], [1.0, -1e-300], [-1e-310, 1e-310]),
  ],
)
def test_charts_take_all_numbers(y):
  line = charts.Line('a', 'c0', np.arange(len(y)), np.array(y))
  chart = charts.Chart('T', '', [line])
  numbers = re.findall(r'-?\d+', chart.paths[0][1])
  assert all(-1000 <= int(n) <= 2000 for n in numbers)
  assert len(chart.rows) < 9 and len(chart.columns) < 9
  assert ('point' in chart.paths[0][0]) == (len(y) == 1)


def test_normalized_score_by_hand(tmp_path):
  write_run(tmp_path / 'a', WALK, 0, [(100_000, 100.0), (200_000, 300.0)])
  write_run(tmp_path / 'b', WALK, 1, [(100_000, 300.0), (150_000, 500.0)])
  cheetah = [(50_000, 0.0), (50_000, 200.0), (150_000, 300.0)]
  write_run(tmp_path / 'c', 'dmc_cheetah_run', 0, cheetah)
  groups = run_folders.group_runs(run_folders.find_runs([tmp_path]))
  paper = paper_scores.load()
  (chart,) = panels.score_charts(groups, paper)
  assert chart.about == 'return / 1000, mean of 2 tasks'
  # At 1e5 (200 + 200) / 2, at 150,000 ((200 + 500) / 2 + 300) / 2.
  assert chart.words.endswith('dreamer ends at 0.325')
  assert 'paper, Dreamer ends at 0.1324' in chart.words  # (137.2 + 127.6) / 2
  first = chart.paths[1][1].split('L')[0]
  assert first == f'M{round(1000 / 1.53)} {round(1000 * (1 - 0.25 / 1.1))}'


def test_of_young_runs_the_paper_has_its_first_point():
  line = panels._paper_line([100, 200, 300], [1, 2, 3], 50)
  assert (line.x.tolist(), line.y.tolist()) == ([100], [1])
  line = panels._paper_line([100, 200, 300], [1, 2, 3], 200)
  assert line.y.tolist() == [1, 2]


def test_charts_are_of_numbers_that_runs_log():
  known = {name for name in logger.METRICS if name[:4] in ('test', 'trai')}
  known |= {name.split('/')[1] for name in logger.METRICS}
  assert set(panels.NAMES) <= known


def test_long_runs_are_thinned_to_means():
  x, y = panels._thinned(np.arange(5000.0), np.arange(5000.0) * 2)
  assert len(x) == 500
  np.testing.assert_allclose(x[:2], [4.5, 14.5])
  np.testing.assert_allclose(y, 2 * x)


def test_random_actions_of_long_runs(tmp_path):
  """Five episodes of 40, then thousands of 900."""
  flags = dict(prefill=5000, clip_rewards='none')
  folder = write_run(tmp_path / 'run', WALK, 0, [(1000, 1.0)], **flags)
  with (folder / 'metrics.jsonl').open('w') as file:
    for step in range(1000, 3_000_000, 1000):
      score = 40.0 if step <= 5000 else 900.0
      file.write(f'{{"step": {step}, "train/return": {score}}}\n')
  reader = panels.Reader()
  (run,) = run_folders.find_runs([tmp_path], read=reader)
  origins = [run_origins.origin(run)]
  assert run_origins.random_return(reader, [run], origins) == 40.0


def test_random_actions_end_where_learning_begins(tmp_path):
  """Before the steps of --prefill, with environments that drop the last."""
  flags = dict(prefill=5000, clip_rewards='none')
  folder = write_run(tmp_path / 'run', WALK, 0, [(1000, 1.0)], **flags)
  with (folder / 'metrics.jsonl').open('w') as file:
    for step in range(1000, 9000, 1000):
      score = 40.0 if step <= 4000 else 900.0
      file.write(f'{{"step": {step}, "train/return": {score}}}\n')
      file.write(f'{{"step": {step}, "updates": {max(0, step - 3000)}}}\n')
  reader = panels.Reader()
  (run,) = run_folders.find_runs([tmp_path], read=reader)
  origins = [run_origins.origin(run)]
  assert run_origins.random_return(reader, [run], origins) == 40.0


def test_the_last_step_of_a_run_is_in_the_last_bin(tmp_path):
  # 31000 / 30 is rounded so that the last of 31 edges is below 31000.
  write_run(tmp_path / 'a', WALK, 0, [(10_000, 1.0), (31_000, 5.0)])
  edges, curves = plots.binned(run_folders.find_runs([tmp_path]))
  assert len(edges) == 31 and curves[0, -1] == 5.0


@pytest.mark.parametrize('step', [1e-323, 1e-310])
def test_numbers_near_zero_are_no_hindrance(tmp_path, step):
  pairs = [(step / 2, 1e-323), (step, step)]
  write_run(tmp_path / 'runs/a', WALK, 0, pairs)
  assert main('--indir', tmp_path / 'runs', '--outdir', tmp_path / 'site') == 0
  words = [f'--indir={tmp_path}/runs', f'--outdir={tmp_path}/plots']
  assert compare.main(words) == 0


# --- The folder -------------------------------------------------------------


def test_what_is_unchanged_is_not_written_again(tmp_path):
  indir, site = write_runs(tmp_path / 'runs'), tmp_path / 'site'
  assert main('--indir', indir, '--outdir', site) == 0
  before = {p: p.stat().st_mtime_ns for p in site.rglob('*.*')}
  with (indir / 'young/metrics.jsonl').open('a') as file:
    file.write('{"step": 2000, "test/return": 7.0}\n')
  assert main('--indir', indir, '--outdir', site) == 0
  after = {p: p.stat().st_mtime_ns for p in site.rglob('*.*')}
  changed = {p.name for p in after if after[p] != before.get(p)}
  assert changed == {'index.html', 'compare.json', 'toy_reach.html'}


def test_pages_of_runs_that_are_gone_go_and_other_files_stay(tmp_path):
  indir, site = write_runs(tmp_path / 'runs'), tmp_path / 'site'
  assert main('--indir', indir, '--outdir', site) == 0
  (site / 'mine.txt').write_text('mine')
  record = json.loads((site / 'report.json').read_text())
  record['files'] += ['../kept.txt']
  (site / 'report.json').write_text(json.dumps(record))
  (tmp_path / 'kept.txt').write_text('kept')
  words = ['--indir', indir, '--outdir', site, '--tasks', 'walker']
  assert main(*words) == 0
  assert [p.name for p in pages(site)] == ['index.html', f'{WALK}.html']
  assert (site / 'mine.txt').read_text() == 'mine'
  assert (tmp_path / 'kept.txt').read_text() == 'kept'


def test_many_long_runs_take_little_time(tmp_path):
  numbers = dict.fromkeys([*panels.NAMES, 'a', 'b', 'c', 'd'], 1 / 3)
  for seed in range(10):
    folder = write_run(tmp_path / f'runs/{seed}', WALK, seed, [])
    lines = (json.dumps({'step': s, **numbers}) + '\n' for s in range(5000))
    (folder / 'metrics.jsonl').write_text(''.join(lines))
  start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  make_site(tmp_path / 'runs', tmp_path / 'site')
  end = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  assert end - start < 6  # some 2; a tenth of a minute for a tenth of the runs


BROKEN = [
  dict(preset=5),
  dict(preset='none', inputs=[]),
  dict(inputs='state,,', prefill='many', clip_rewards='none'),
  dict(prefill=True, logdir=7, horizon=None, env_args='x'),
  dict(env_args={'a': ['<b>']}, logdir={'a': 1}, steps=[1, {}]),
  dict(task='toy_\ud800', preset='\ud801', logdir='\udcff'),
  dict(prefill=10**400, clip_rewards='none'),
]


def test_nonsense_in_files_of_a_run(tmp_path):
  for i, flags in enumerate(BROKEN):
    flags = dict(dict(task=f'gym_{i}'), **flags)
    folder = write_run(tmp_path / f'runs/{i}', seed=i, pairs=[(9, 1)], **flags)
    (folder / 'metrics.jsonl').write_text(
      '{"step": -5, "test/return": -1e300}\n{"step": 1e300, "div": 1e308}\n'
      f'{{"step": 3, "test/return": 1{"0" * 400}}}\n{"[" * 100_000}\n'
      '{"step": 4, "div": {"a": 1}}\n{"step": 5, "test/return": null}\n\0\n'
    )
  for i, text in enumerate(['[]', '{"code": [], "versions": {"a": {}}}', '\0']):
    (tmp_path / f'runs/{i}/run.json').write_text(text)
  strange = tmp_path / 'runs' / os.fsdecode(b'toy_\xff\n/m\xfe/0')
  write_metrics(strange, [(100, 1.0)])
  (tmp_path / 'runs/4/metrics.jsonl').unlink()
  make_site(tmp_path / 'runs', tmp_path / 'site')
  assert len(pages(tmp_path / 'site')) == 9


@pytest.mark.parametrize(
  'words, message',
  [
    (['--indir', '{}/runs'], '--outdir'),
    (['--indir', '{}/no', '--outdir', '{}/s'], 'no is not a folder'),
    (['--indir', '{}/full', '--outdir', '{}/s'], 'there is no run in'),
    (['--indir', '{}/runs', '--outdir', '{}/full'], '(a.txt); choose a new'),
    (['--indir', '{}/runs', '--outdir', '{}/fake'], 'holds something else'),
    (['--indir', '{}/runs', '--outdir', '{}/full/a.txt'], 'cannot write'),
    (['--indir', '{}/runs', '--outdir', '{}/runs'], 'holds something else'),
    (['--indir', '{}/runs', '--outdir', '{}/runs/a/s'], 'is inside of the run'),
    (['--indir', '{}/link', '--outdir', '{}/runs/a/s'], 'is inside of the run'),
    (['--indir', '{}/runs', '--outdir', '{}/deep'], 'holds something else'),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--pictures', '{}/no'],
      '--pictures',
    ),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--pictures', 'a/' * 2500],
      'is not a folder',
    ),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--tasks', 'x'],
      f'there are {WALK}',
    ),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--watch', '0'],
      'from 1 to 86,400',
    ),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--video'],
      'did you mean --videos?',
    ),
    (
      ['--indir', '{}/runs', '--outdir', '{}/s', '--videos', 'no'],
      'True or False',
    ),
  ],
)
def test_bad_input(tmp_path, words, message, capsys):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  for name in ('full', 'fake', 'deep', 'link'):
    (tmp_path / name).mkdir()
  (tmp_path / 'full/a.txt').write_text('a')
  (tmp_path / 'fake/report.json').write_text('{"program": "other"}')
  (tmp_path / 'deep/report.json').write_text('[' * 100_000)
  (tmp_path / 'link/a').symlink_to(tmp_path / 'runs/a')
  before = contents(tmp_path)
  assert main(*(word.format(tmp_path) for word in words)) == 2
  err = capsys.readouterr().err
  assert err.startswith('report.py: error: ') and message in err
  shutil.rmtree(tmp_path / 's', ignore_errors=True)  # made for the pages
  assert {**contents(tmp_path), tmp_path: 0} == {**before, tmp_path: 0}


def test_an_outdir_that_is_a_circle_of_links(tmp_path, capsys):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  words = '--indir', f'{tmp_path}/runs', '--outdir', f'{tmp_path}/loop/a'
  assert main(*words) == 2
  assert capsys.readouterr().err.startswith('report.py: error: ')


def test_watch_updates_pages_and_leaves_whole_ones(tmp_path):
  indir, site = write_runs(tmp_path / 'runs'), tmp_path / 'site'
  words = ['--indir', indir, '--outdir', site, '--watch', '1']
  process = subprocess.Popen(
    [sys.executable, ROOT / 'report.py', *words],
    stdout=subprocess.PIPE,
    text=True,
    # Shells let what runs in the background ignore it, tests among that.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  try:
    assert process.stdout.readline().startswith('Wrote ')
    assert 'http-equiv="refresh"' in (site / 'index.html').read_text()
    with (indir / 'young/metrics.jsonl').open('a') as file:
      file.write('{"step": 2000, "test/return": 7.125}\n')
    assert process.stdout.readline().endswith('Updated.\n')
    assert 'the last 7.1' in ' '.join(Page(site / 'tasks/toy_reach.html').texts)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
  finally:
    process.kill()
  assert 'http-equiv="refresh"' not in (site / 'index.html').read_text()


def test_watch_goes_on_when_runs_are_away(tmp_path, monkeypatch, capsys):
  """Its sleeps: they go, stay away, come back, go on, and go until the end."""
  indir, site = tmp_path / 'runs', tmp_path / 'site'
  run = write_run(indir / 'a', WALK, 0, [(100_000, 1.0)])
  away, found = tmp_path / 'away', []

  def take():
    indir.rename(away)

  def put_back():
    away.rename(indir)

  def go_on():
    write_metrics(run, [(100_000, 1.0), (110_000, 2.0)])

  def stop():
    take()
    raise KeyboardInterrupt

  steps = iter([take, int, put_back, go_on, stop])

  def sleep(seconds):
    found.append('data-refresh="7"' in (site / 'index.html').read_text())
    next(steps)()

  monkeypatch.setattr(time, 'sleep', sleep)
  words = ['--indir', indir, '--outdir', site, '--watch', '7']
  assert main(*words) == 130
  assert found == [True] * 5
  assert 'data-refresh="0"' in (site / 'index.html').read_text()
  out = capsys.readouterr().out
  assert out.count('is not a folder') == 1 and out.count('Updated') == 1
  page = ' '.join(Page(site / f'tasks/{WALK}.html').texts)
  assert 'data-refresh="0"' in (site / f'tasks/{WALK}.html').read_text()
  assert 'to 110k steps' in page


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  words = [f'--indir={tmp_path}/runs', f'--outdir={tmp_path}/site']
  pages_of = report.Report(report.parse_flags(words))

  def update(*_):
    raise OSError(errno.ENOSPC, 'No space left on device', 'page')

  monkeypatch.setattr(pages_of, 'update', update)
  assert 'No space left' in report.look(pages_of, 1, False)


def test_one_at_a_time_writes_to_a_folder(tmp_path, capsys):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  words = [f'--indir={tmp_path}/runs', f'--outdir={tmp_path}/site']
  first = report.Report(report.parse_flags(words))
  first.update()
  assert main(*words) == 2
  assert 'another report.py writes to --outdir' in capsys.readouterr().err
  del first
  assert main(*words) == 0


def test_pictures_of_a_run_go_with_it(tmp_path):
  """A logdir may be made again, and reach the same number of updates."""
  folder = write_run(tmp_path / 'run', WALK, 0, [(1, 1.0)])
  keys = []
  for started in ('2026-01-01', '2026-01-01', '2026-02-02'):
    record = json.loads((folder / 'config.json').read_text())
    record['started'] = started
    (folder / 'config.json').write_text(json.dumps(record))
    (run,) = run_folders.find_runs([tmp_path])
    keys.append(media.run_key(run))
  assert keys[0] == keys[1] != keys[2]


def test_an_error_of_the_watch_leaves_pages_at_rest(tmp_path, monkeypatch):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  words = ['--indir', tmp_path / 'runs', '--outdir', tmp_path / 'site']
  pages_of = report.Report(report.parse_flags(list(map(str, words))))
  pages_of.update(7)
  monkeypatch.setattr(run_folders, 'find_runs', lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    report.watch(pages_of, 0, False)
  for path in pages(tmp_path / 'site'):
    assert 'data-refresh="0"' in path.read_text()


def test_a_folder_with_what_a_kill_left_is_taken(tmp_path):
  write_run(tmp_path / 'runs/a', WALK, 0, [(100_000, 1.0)])
  (tmp_path / 'site').mkdir()
  (tmp_path / 'site/.report.json.123.tmp').write_text('{')
  assert main('--indir', tmp_path / 'runs', '--outdir', tmp_path / 'site') == 0
  assert not list(tmp_path.rglob('*.tmp'))


def test_a_kill_at_any_time_leaves_whole_pages(tmp_path):
  indir, site = write_runs(tmp_path / 'runs'), tmp_path / 'site'
  assert main('--indir', indir, '--outdir', site) == 0
  killed = 0
  for number in range(3):
    with (indir / 'young/metrics.jsonl').open('a') as file:
      file.write(f'{{"step": {5000 + number}, "test/return": 7.0}}\n')
    command = [sys.executable, ROOT / 'report.py', '--indir', indir]
    command += ['--outdir', site, '--title', f'Title {number}']
    process = subprocess.Popen(command)
    while process.poll() is None:  # until it writes, each time further on
      if list(site.rglob('.*.tmp')):
        time.sleep(0.01 * number)
        process.kill()
    killed += process.wait() == -signal.SIGKILL
    for path in pages(site):
      assert path.read_text().endswith('</html>\n')
  assert killed
  assert main('--indir', indir, '--outdir', site) == 0
  assert not list(site.rglob('*.tmp'))


# --- Pictures ---------------------------------------------------------------


def test_videos_are_within_the_limit():
  rng = np.random.default_rng(0)  # noise, which does not compress
  noise = rng.integers(0, 255, (60, 64, 64, 3)).astype(np.uint8)
  extension, data = media.encode(noise, 20)
  assert extension == '.mp4' and len(data) <= media.LIMIT
  image = rng.integers(0, 255, (900, 700, 3)).astype(np.uint8)
  assert len(media.encode_still(image)) <= media.LIMIT


def test_a_video_that_ffmpeg_refuses_is_none():
  with pytest.raises(ValueError, match='16 by 20000 pixels'):
    media.encode_mp4(np.zeros((3, 16, 20000, 3), np.uint8), fps=20)
  thin = media.encode(np.zeros((3, 300, 1, 3), np.uint8), 20)[1]
  assert len(imageio.imread(thin, extension='.mp4', plugin='FFMPEG')) == 3


def test_videos_of_odd_size_lose_a_row(caplog):
  frames = np.zeros((9, 301, 303, 3), np.uint8)
  _, data = media.encode(frames, 20)
  video = imageio.imread(data, extension='.mp4', plugin='FFMPEG')
  assert video.shape == (9, 300, 302, 3)
  assert not caplog.text


@pytest.mark.parametrize('program', ['/nowhere', '/bin/false'])
def test_a_program_that_does_not_run(monkeypatch, program):
  monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', program)
  assert not media.has_ffmpeg.__wrapped__()


def test_an_ffmpeg_without_h264(monkeypatch, tmp_path):
  program = tmp_path / 'ffmpeg'
  real = imageio_ffmpeg.get_ffmpeg_exe()
  program.write_text(
    f'#!/bin/sh\ncase "$*" in *libx264*) exit 1;; esac\nexec {real} "$@"\n'
  )
  program.chmod(0o755)
  monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(program))
  assert not media.has_ffmpeg.__wrapped__()


def test_a_picture_of_two_tasks(tmp_path):
  for task in ('atari_boxing', 'gym_boxing'):
    write_run(tmp_path / 'runs' / task, task, 0, [(100, 1.0)])
  PIL.Image.new('RGB', (32, 32)).save(tmp_path / 'boxing.png')
  make_site(tmp_path / 'runs', tmp_path / 'site', '--pictures', tmp_path)
  tasks = [x['alt'] for x in Page(tmp_path / 'site/index.html').all('img')]
  assert [x.partition(':')[0] for x in tasks] == ['atari_boxing', 'gym_boxing']


def test_gifs_keep_their_length_where_no_image_is_shown_once():
  shown = np.repeat(np.arange(40), [2, 3] * 20)
  frames = np.zeros((100, 64, 64, 3), np.uint8) + shown[:, None, None, None]
  data = logger.encode_gif((5 * frames).astype(np.uint8), 20)
  read, fps = media.read(data, '.gif')
  assert (len(read), fps) == (100, 20)


@pytest.mark.parametrize('still', [0, 30])
def test_gifs_keep_their_pace_where_images_are_equal(still):
  """Pillow makes equal images that follow each other one, shown for longer."""
  frames = np.zeros((50, 64, 64, 3), np.uint8)
  for index in range(50):
    place = 0 if still <= index < still + 20 else index
    frames[index, place : place + 9] = 255
  read, fps = media.read(logger.encode_gif(frames, 20), '.gif')
  assert fps == 20 and read.shape == frames.shape
  assert np.abs(read.astype(int) - frames).mean() < 1


@pytest.mark.parametrize(
  'image, color',
  [
    (np.full((9, 9), 0x8000, np.uint16), (128, 128, 128)),
    (np.full((9, 9, 2), [200, 255], np.uint8), (200, 200, 200)),
    (np.full((9, 9, 4), [1, 2, 3, 255], np.uint8), (1, 2, 3)),
  ],
)
def test_stills_of_all_kinds(image, color):
  data = imageio.imwrite('<bytes>', image, extension='.png')
  ((still,), _) = media.read(data, '.png')
  assert still.shape == (9, 9, 3)
  assert (still == color).all()


def test_a_gif_in_hundredths_of_a_second_keeps_its_images():
  """33 ms are not among them; ten would be their common part."""
  images = [PIL.Image.new('L', (64, 64), 20 * n) for n in range(9)]
  data, times = io.BytesIO(), [30, 30, 40] * 3
  images[0].save(
    data, 'gif', save_all=True, append_images=images[1:], duration=times
  )
  frames, fps = media.read(data.getvalue(), '.gif')
  assert (len(frames), round(fps)) == (9, 33)


def test_a_long_pause_in_a_gif_takes_no_memory():
  black, gray = (np.full((64, 64), n, np.uint8) for n in (0, 99))
  images = [PIL.Image.fromarray(x) for x in (black, gray)]
  data = io.BytesIO()
  images[0].save(
    data, 'gif', save_all=True, append_images=images[1:], duration=[10, 600_000]
  )
  tracemalloc.start()
  frames, _ = media.read(data.getvalue(), '.gif')
  assert tracemalloc.get_traced_memory()[1] < 100e6
  tracemalloc.stop()
  assert len(frames) == media.FRAMES
  assert (frames[0] < 9).all() and (frames[1:] > 90).all()


@pytest.mark.parametrize(
  'mode, white, suffix', [('1', 1, '.png'), ('CMYK', (0, 0, 0, 0), '.jpg')]
)
def test_given_stills_of_all_modes(tmp_path, mode, white, suffix):
  runs, pictures = tmp_path / 'runs', tmp_path / 'pictures'
  write_run(runs, WALK, 0, [(100_000, 1.0)])
  pictures.mkdir()
  PIL.Image.new(mode, (32, 32), white).save(pictures / f'{WALK}{suffix}')
  make_site(runs, tmp_path / 'site', '--pictures', pictures)
  (still,) = (tmp_path / 'site/media').iterdir()
  assert imageio.imread(still)[..., :3].min() > 250


def test_a_broken_picture_is_named_once(tmp_path, capsys):
  run = write_run(tmp_path / 'runs', WALK, 0, [(100_000, 1.0)])
  (tmp_path / f'{WALK}.gif').write_bytes(b'nonsense')
  words = ['--indir', run, '--outdir', tmp_path / 'site']
  words += ['--pictures', tmp_path]
  pages_of = report.Report(report.parse_flags(list(map(str, words))))
  for step in (200, 300):
    assert pages_of.update()
    add_lines(run, step)
  assert capsys.readouterr().out.count('is left out') == 1


def test_a_checkpoint_without_pictures_is_evaluated_once(tmp_path, monkeypatch):
  run = write_run(tmp_path / 'runs', 'toy_reach', 0, [(100, 1.0)])
  (run / 'checkpoints').mkdir()
  (run / 'checkpoints/ckpt-5.index').write_bytes(b'nonsense')
  tried = []
  monkeypatch.setattr(
    media, '_run_evaluation', lambda run, *_: tried.append(run.folder)
  )
  words = ['--indir', f'{tmp_path}/runs', '--outdir', f'{tmp_path}/site']
  pages_of = report.Report(report.parse_flags(words))
  for step in (200, 300):
    pages_of.update(videos=True)
    add_lines(run, step)
  assert pages_of.update(videos=True) and tried == [run]


def test_without_ffmpeg_videos_are_animated_webp():
  frames = np.zeros((9, 32, 48, 3), np.uint8)
  frames[:, :, :24] = np.arange(9, dtype=np.uint8)[:, None, None, None] * 25
  data = media._webp(frames, 20, 75)
  assert data[:4] == b'RIFF' and data[8:12] == b'WEBP'
  again = imageio.imread(data, extension='.webp', index=...)[..., :3]
  assert again.shape == frames.shape
  assert np.abs(again.astype(int) - frames).max() < 12


def test_names_of_files_are_safe_and_differ():
  names = ['dmc_a', 'DMC_A', 'a b', 'a/b', '../a', 'ä', '<', '', 'a' * 300]
  names += ['\udcff', '\ud800']  # not UTF-8, not Unicode
  slugs = [media.slug(name) for name in names]
  assert slugs[0] == 'dmc_a'
  assert len({slug.lower() for slug in slugs}) == len(names)
  for slug in slugs:
    assert re.fullmatch(r'[A-Za-z0-9_-]{1,100}', slug)


@pytest.mark.slow
def test_videos_are_rendered_once_for_each_checkpoint(tmp_path):
  source, run = ROOT / 'scores/trained/walker_walk', tmp_path / 'runs/walk'
  shutil.copytree(source, run)
  record = json.loads((run / 'config.json').read_text())
  record['config'].update(time_limit=60, batch_length=16)
  (run / 'config.json').write_text(json.dumps(record))
  broken = write_run(tmp_path / 'runs/b', 'toy_reach', 0, [(100, 1.0)])
  (broken / 'checkpoints').mkdir()
  (broken / 'checkpoints/ckpt-5.index').write_bytes(b'nonsense')
  site = tmp_path / 'site'
  done = make_site(tmp_path / 'runs', site, '--videos')
  assert f'no videos of {broken}' in done.stdout
  page = Page(site / f'tasks/{WALK}.html')
  best, worst = (x['aria-label'] for x in page.all('video'))
  returns = [float(re.search(r'return ([\d.]+)', x)[1]) for x in (best, worst)]
  assert 'Best of 4 episodes' in best and 'Worst' in worst
  assert 60 > returns[0] > returns[1] > 0
  frames = imageio.imread(site / 'tasks' / page.all('video')[0]['src'])
  assert frames.shape == (31, 128, 128, 3)
  before = {p: p.stat().st_mtime_ns for p in site.rglob('media/*')}
  assert len(before) == 6  # two videos, what they begin with, two pictures
  shutil.rmtree(broken)
  assert '4/8' in done.stderr  # episodes: none of the broken run
  again = make_site(tmp_path / 'runs', site, '--videos')
  assert 'episodes' not in again.stderr
  make_site(tmp_path / 'runs', site)  # and they stay without the flag
  assert {p: p.stat().st_mtime_ns for p in site.rglob('media/*')} == before
  words = ['--indir', str(tmp_path / 'runs'), '--outdir', str(tmp_path / 'new')]
  args = report.parse_flags([*words, '--videos'])
  assert report.Report(args).update()  # as at the end of --watch
  assert not any((tmp_path / 'new').rglob('media/*'))
  no_display = dict(os.environ, MUJOCO_GL='glfw')
  no_display.pop('DISPLAY', None)
  done = make_site(
    tmp_path / 'runs', tmp_path / 'new', '--videos', env=no_display
  )
  assert 'no videos' not in done.stdout
  page = Page(tmp_path / 'new' / f'tasks/{WALK}.html')
  assert not page.all('video')  # what is predicted is shown all the same
  assert len(list((tmp_path / 'new').rglob('media/*'))) == 2


# --- The page of this repository --------------------------------------------


def test_the_page_of_this_repository_is_of_its_runs():
  """If not: docs/usage.md has the command that makes it."""
  site = ROOT / 'docs/site'
  groups = run_folders.group_runs(run_folders.find_runs([ROOT / 'scores/runs']))
  rows = compare.compare(groups, paper_scores.load(), 1e5)
  shown = json.loads((site / 'compare.json').read_text())['rows']
  for name in ('task', 'method', 'steps', 'seeds', 'verdict'):
    assert [r[name] for r in shown] == [r[name] for r in rows]
  assert [r['mean'] for r in shown] == pytest.approx([r['mean'] for r in rows])
  sizes = [p.stat().st_size for p in site.rglob('*') if p.is_file()]
  assert sum(sizes) < 6e6 and max(sizes) < 2e6
