"""The pages of report.py in a real browser, Debian's Chromium.

Needs the packages `chromium` of apt and `playwright` and
`axe-playwright-python` of pip.
"""

import functools
import http.server
import json
import shutil
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from pages import (
  EVIL,
  HOSTILE,
  WALK,
  Page,
  make_site,
  write_pictures,
  write_runs,
)

pytestmark = pytest.mark.slow
SCHEMES = dict(light=(251, 251, 250), dark=(20, 23, 26))  # and their grounds
both = pytest.mark.parametrize('scheme', SCHEMES)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('browser')
  runs, pictures = folder / 'runs', folder / 'pictures'
  write_runs(runs)
  write_pictures(pictures)
  outdir = folder / 'ein Ordner #1 ü'
  make_site(runs, outdir, '--pictures', pictures, '--title', f'Mine {EVIL}')
  return outdir


@pytest.fixture(scope='module')
def chromium():
  names = 'chromium', 'chromium-browser', 'google-chrome'
  path = next(filter(None, map(shutil.which, names)), None)
  if not path:
    pytest.fail('no browser: apt-get install chromium, as .ci/run does')
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=path, args=['--no-sandbox', '--disable-dev-shm-usage']
    )
    yield browser
    browser.close()


@pytest.fixture
def visit(chromium):
  """Opens a page: visit(path or address, **options of the context).

  At the end there must have been no error on the console, and no request that
  left the folder or failed.
  """
  contexts, problems, roots = [], [], []

  def visit(path, root=None, **options):
    options = {'viewport': dict(width=1280, height=900), **options}
    context = chromium.new_context(**options)
    contexts.append(context)
    page = context.new_page()
    roots.append(root or path.parent.as_uri().removesuffix('/tasks') + '/')

    def check(request):
      if not request.url.startswith((*roots, 'data:')):
        problems.append(request.url)

    page.on('request', check)
    page.on('requestfailed', lambda x: problems.append(f'failed: {x.url}'))
    page.on('console', lambda x: problems.append(x.text))
    page.on('pageerror', lambda x: problems.append(str(x)))
    page.on('dialog', lambda x: problems.append(x.message))
    page.goto(path if root else path.as_uri())
    return page

  yield visit
  for context in contexts:
    context.close()
  assert not [p for p in problems if not is_stopped_video(p)]


def is_stopped_video(problem):
  """A page that goes stops the loading of its videos."""
  return problem.startswith('failed: ') and problem.endswith('.mp4')


def some(site):
  """The index, a page with everything, and one with names that are no words."""
  (bad,) = site.glob('tasks/*script*')
  return [site / 'index.html', site / f'tasks/{WALK}.html', bad]


def fits(page):
  """Whether nothing makes the page scroll sideways."""
  return page.evaluate(
    'document.documentElement.scrollWidth <= window.innerWidth'
  )


@both
def test_pages_fit_in_both_schemes(site, visit, scheme):
  for path in some(site):
    page = visit(path, color_scheme=scheme)
    for width in (320, 375, 1280):
      page.set_viewport_size(dict(width=width, height=800))
      assert fits(page), (path.name, width)
    color = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert color == 'rgb({}, {}, {})'.format(*SCHEMES[scheme])


def test_pictures_decode(site, visit):
  seen = 0
  for path in [*some(site), site / 'tasks/dmc_cheetah_run.html']:
    page = visit(path)
    for image in page.locator('img').all():
      image.evaluate('x => { x.loading = "eager"; return x.decode(); }')
      seen += 1
    for video in page.locator('video').all():
      video.scroll_into_view_if_needed()
      page.wait_for_function(
        'x => x.readyState >= 3 && x.videoWidth && !x.paused',
        arg=video.element_handle(),
      )
      script = 'x => Object.assign(new Image(), {src: x.poster}).decode()'
      video.evaluate(script)
      seen += 1
  assert seen == 8  # those of two tasks, on the index and on their own pages


def test_videos_are_loaded_and_play_only_where_they_are_seen(site, visit):
  page = visit(site / 'index.html', viewport=dict(width=600, height=300))
  video = page.locator('video').last
  assert video.evaluate('x => x.paused && x.readyState === 0')
  video.scroll_into_view_if_needed()
  handle = video.element_handle()
  page.wait_for_function('x => !x.paused && x.readyState', arg=handle)
  page.evaluate('scrollTo(0, document.body.scrollHeight)')
  page.wait_for_function('x => x.paused', arg=handle)
  video.focus()
  assert video.evaluate('x => x.controls')  # for the keyboard


def test_videos_wait_for_those_who_want_no_motion(site, visit):
  page = visit(site / 'index.html', reduced_motion='reduce')
  page.locator('video').first.scroll_into_view_if_needed()
  page.wait_for_timeout(300)
  states = page.locator('video').evaluate_all(
    'all => all.map(x => x.paused && x.controls)'
  )
  assert states == [True] * 3


def column(page, index):
  cells = page.locator(f'table.sortable tbody td:nth-child({index + 1})')
  return cells.evaluate_all('all => all.map(x => x.dataset.value)')


def test_tables_are_sorted_by_each_column(site, visit):
  page = visit(site / 'index.html')
  rows = json.loads((site / 'compare.json').read_text())['rows']
  means = sorted(row['mean'] for row in rows if row['mean'] is not None)
  buttons = page.locator('table.sortable th button')
  assert buttons.count() == 12
  buttons.nth(4).click()
  assert [float(x) for x in column(page, 4) if x] == means
  assert column(page, 4)[-1] == ''  # runs without evaluation are last
  buttons.nth(4).focus()
  page.keyboard.press('Enter')
  assert [float(x) for x in column(page, 4) if x] == means[::-1]
  assert column(page, 4)[-1] == ''
  header = page.locator('table.sortable th').nth(4)
  assert header.get_attribute('aria-sort') == 'descending'
  for index in (0, 1, 7):
    before = sorted(column(page, index))
    buttons.nth(index).click()
    script = 'all => all.sort((a, b) => a.localeCompare(b))'
    assert column(page, index) == page.evaluate(script, before)
  assert header.get_attribute('aria-sort') is None


def test_pages_are_whole_without_javascript(site, visit):
  for path in some(site):
    page = visit(path, java_script_enabled=False)
    assert fits(page)
    texts = {
      ' '.join(x.split()) for x in page.locator('body').all_inner_texts()
    }
    shown = ' '.join(texts)
    for text in Page(path).texts[1:40]:  # after the title
      assert text in shown
    for video in page.locator('video').all():
      assert video.get_attribute('controls') is not None


def test_text_of_charts_can_be_selected(site, visit):
  page = visit(site / f'tasks/{WALK}.html')
  page.keyboard.press('Control+A')
  text = page.evaluate('getSelection().toString()')
  for word in ('KL divergence', '100k', '1000', 'paper at 5e6, 961.7'):
    assert word in text
  chart = page.locator('figure', has_text='KL divergence')
  box = chart.locator('svg.area path').last.bounding_box()
  assert box['width'] > 100 and box['height'] > 20


def test_names_are_text(site, visit):
  page = visit(site / 'index.html')
  assert page.get_by_role('heading', level=1).inner_text() == f'Mine {EVIL}'
  page.get_by_role('link', name=HOSTILE, exact=True).click()
  assert page.get_by_role('heading', level=1).inner_text() == HOSTILE
  page.get_by_role('link', name='Mine').click()
  assert page.url == (site / 'index.html').as_uri()


@both
def test_axe_finds_nothing(site, visit, scheme):
  """Contrast, alternative texts, names of controls and headings."""
  for path in (site / 'index.html', site / f'tasks/{WALK}.html'):
    page = visit(path, color_scheme=scheme)
    result = Axe().run(page, options=dict(preload=False))
    assert result.violations_count == 0, result.generate_report()
    assert len(result.response['passes']) > 20


def test_below_any_path_of_a_web_server(site, visit):
  class Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path):
      return super().translate_path(path.removeprefix('/a/b'))

    def log_message(self, *args):
      pass

  handler = functools.partial(Handler, directory=site)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    root = f'http://127.0.0.1:{server.server_port}/a/b/'
    page = visit(f'{root}index.html', root)
    page.get_by_role('link', name=WALK).first.click()
    assert page.get_by_role('heading', level=1).inner_text() == WALK
    page.wait_for_function('!document.querySelector("video").paused')
  finally:
    server.shutdown()
    server.server_close()
