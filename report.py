"""A web page of one's own runs: curves, behaviors and dreams.

    python report.py --indir ./logdir --outdir ./site
    python report.py --indir ./logdir --outdir ./site --videos --watch 60

Writes a folder of static files, to be opened as they are (site/index.html) or
put on any web server: an index, a page for each task, pictures. Runs are found
and compared as compare.py does (see there by which rule), and only read.

--videos renders, by evaluate.py, the newest checkpoint of the best run of each
task and method, where that has not been done. --pictures names a folder of
pictures of your own, called by the task: walker_walk.gif or
walker_walk-behavior.mp4 for a behavior, walker_walk-openl.gif or
walker_walk-prediction.png for predictions.

--watch writes the pages again when a run has gone on, until Ctrl-C; open pages
then reload themselves. A page is there whole or as it was before.
"""

import collections
import contextlib
import datetime
import fcntl
import io
import itertools
import os
import pathlib
import re
import sys
import time
import weakref

import cli
import file_io

with cli.interruptible():
  import jinja2
  import markupsafe

  import arguments
  import charts
  import compare
  import media
  import panels
  import paper_scores
  import run_folders
  import run_origins
from cli import UserError

RECORD = 'report.json'  # by which a folder is known to be of this program
OWN = r'((tasks|media)/)?[\w-]+\.\w+'  # names of files in such a folder


# --- The folder -------------------------------------------------------------


class Site:
  """A folder of files of which it knows that they are its own.

  Raises:
    UserError: it holds something else, or another process writes to it.
  """

  def __init__(self, folder):
    self.folder = folder
    self._path = folder / RECORD
    file_io.make_folders(folder)
    weakref.finalize(self, os.close, _hold(folder))
    self.record = self._read()
    for name in ('', 'tasks', 'media'):
      file_io.remove_temporary_files(folder / name)

  def _read(self):
    names = sorted(path.name for path in self.folder.iterdir())
    names = [
      name for name in names if not re.fullmatch(file_io.TEMPORARY, name)
    ]
    if not names:
      return dict(files=[], media={})
    record = file_io.read_json(self._path)
    with contextlib.suppress(ValueError, KeyError, TypeError):
      if record['program'] == 'report.py':
        files = [name for name in record['files'] if re.fullmatch(OWN, name)]
        return dict(files=files, media=dict(record['media']))
    raise UserError(
      f'--outdir {self.folder} holds something else ({", ".join(names[:3])}); '
      'choose a new folder, an empty one, or one that report.py made'
    )

  def has(self, names):
    known = set(self.record['files'])
    return all(n in known and (self.folder / n).is_file() for n in names)

  def write(self, files):
    """Writes {name: bytes}, but for files that are like that already."""
    new = [name for name in files if name not in self.record['files']]
    if new or not self._path.exists():
      self.record['files'] += new
      self._save()
    for name, data in files.items():
      path = self.folder / name
      if not path.is_file() or path.read_bytes() != data:
        file_io.make_folders(path.parent)
        with file_io.atomic_write(path) as file:
          file.write(data)

  def keep(self, names, pictures):
    """Removes own files with other names; `pictures` go into the record."""
    old = set(self.record['files']) - set(names)
    for name in old:
      (self.folder / name).unlink(missing_ok=True)
    record = dict(files=sorted(names), media=pictures)
    if record != self.record:
      self.record = record
      self._save()

  def _save(self):
    file_io.write_json(self._path, dict(program='report.py', **self.record))


def _hold(folder):
  """Locks a folder for as long as the file descriptor is open, returned."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UserError(
      f'another report.py writes to --outdir {folder}, such as one with '
      '--watch: stop it, or choose another folder'
    ) from None
  except OSError:  # the file system has no locks
    pass
  return descriptor


# --- Pages ------------------------------------------------------------------


def make_templates():
  """Templates that escape whatever a name holds."""
  templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(media.ROOT / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  templates.filters.update(short=charts.short, breakable=breakable)
  return templates


def breakable(name):
  """A name that may go on in a new line after each underscore."""
  return markupsafe.Markup('_<wbr>').join(name.split('_'))


class Report:
  """All pages of some runs.

  Args:
    args: from `parse_flags`.
  """

  def __init__(self, args):
    self._args = args
    self._reader = panels.Reader()
    self._paper = paper_scores.load()
    self._templates = make_templates()
    self._state = None
    self._site = None
    self._failed = {}  # what gave no pictures, for `media.Gallery`
    self._pages = {}  # {name: (template, its values)}, as they were written

  def update(self, refresh=0, videos=False):
    """Writes what has changed.

    Args:
      refresh: seconds after which a page loads itself again; 0: never.
      videos: whether to render what is missing.

    Returns:
      Whether anything had changed.
    """
    args = self._args
    runs = run_folders.find_runs(args.indir, read=self._reader)
    if not self._site:
      _check_place(args.outdir, runs)
      self._site = Site(args.outdir)
    runs = run_folders.select(runs, args.tasks, args.methods)
    state = refresh, [(run.folder, *self._state_of(run)) for run in runs]
    if state == self._state:
      return False
    gallery = media.Gallery(self._site, self._failed)
    groups = run_folders.group_runs(runs)
    files = self._files(groups, gallery, videos)
    files |= self._render(refresh)
    self._site.write(files)
    self._site.keep([*files, *gallery.files()], gallery.media)
    self._state = state
    return True

  def end(self):
    """Pages that load themselves again would wait for nothing."""
    self._site.write(self._render(0))  # first, as runs may be away
    with contextlib.suppress(cli.Failure, OSError), _unwarned():
      self.update()

  def _state_of(self, run):
    """What changes when something on the pages does."""
    names = 'config.json', 'run.json', 'checkpoints'
    others = [panels.file_state(run.folder / name) for name in names]
    return self._reader.state(run), *others

  def _files(self, groups, gallery, videos):
    """{name: bytes} of all files but pages, whose values it makes."""
    rows = compare.compare(groups, self._paper, self._args.window)
    pictures = self._pictures(groups, rows, gallery, videos)
    origins = {
      k: [run_origins.origin(r) for r in runs] for k, runs in groups.items()
    }
    tasks = list(dict.fromkeys(task for task, _ in groups))
    names = {task: f'tasks/{media.slug(task)}.html' for task in tasks}
    shared = dict(title=self._args.title, names=names)
    summary = compare.summarize(rows)
    figures = compare.figures(
      rows, summary, run_folders.AXES, self._args.window
    )
    files = {'compare.json': file_io.to_json(figures)}
    for name in ('style.css', 'page.js'):
      files[name] = (media.ROOT / 'templates' / name).read_bytes()
    pages = {}
    for task in tasks:
      own = {m: runs for (t, m), runs in groups.items() if t == task}
      page = self._task_page(task, own, origins)
      page['table'] = table([row for row in rows if row['task'] == task])
      page['pictures'] = [p for p in pictures if p.task == task]
      page.update(shared, root='../')
      pages[names[task]] = 'task.html', page
    page = self._index_page(groups, rows, summary, pictures, origins)
    pages['index.html'] = 'index.html', {**page, **shared}
    self._pages = pages
    return files

  def _index_page(self, groups, rows, summary, pictures, origins):
    """What the index shows."""
    paper, axes, window = self._paper, run_folders.AXES, self._args.window
    return dict(
      root='',
      table=table(rows),
      panels=panels.score_charts(groups, paper),
      sentences=list(compare.sentences(rows, summary, paper, axes, window)),
      rule=rule(window),
      behaviors=first_of_each(pictures, 'behavior', 'best'),
      dreams=first_of_each(pictures, 'dream'),
      facts=facts(groups),
      provenance=provenance(itertools.chain(*origins.values())),
      made=datetime.datetime.now(datetime.UTC),
    )

  def _render(self, refresh):
    """{name: bytes} of all pages, the index last."""
    files = {}
    for name, (template, values) in self._pages.items():
      template = self._templates.get_template(template)
      text = template.render(values, refresh=refresh)
      files[name] = text.encode('utf-8', 'backslashreplace')
    return files

  def _pictures(self, groups, rows, gallery, videos):
    """All pictures: those given, and of the best run of each group."""
    pictures = []
    if self._args.pictures:
      tasks = dict.fromkeys(task for task, _ in groups)
      pictures += gallery.given(self._args.pictures, tasks)
    best = [
      sorted(runs, key=lambda run, row=row: -row['scores'].get(run.seed, -1e99))
      for runs, row in zip(groups.values(), rows, strict=True)
    ]
    if videos:
      return pictures + gallery.render(best)
    return pictures + gallery.rendered(best)

  def _task_page(self, task, groups, origins):
    """What the page of a task shows besides its table and pictures.

    Args:
      task: its name.
      groups: {method: runs}.
      origins: {(task, method): `run_origins.Origin` of each run}.
    """
    reader, colors = self._reader, panels.method_colors(groups)
    runs = [run for group in groups.values() for run in group]
    abouts = [about for method in groups for about in origins[task, method]]
    random = run_origins.random_return(reader, runs, abouts)
    sections = {
      'Returns': [
        panels.return_chart(task, groups, colors, self._paper, random),
        panels.panel_chart(panels.TRAIN, reader, groups, colors),
      ]
    }
    for title, section in panels.SECTIONS.items():
      sections[title] = [
        panels.panel_chart(panel, reader, groups, colors) for panel in section
      ]
    shown = {k: list(filter(None, v)) for k, v in sections.items()}
    return dict(
      task=task,
      sections={k: v for k, v in shown.items() if v},
      runs=[
        (run, last_evaluation(run), about)
        for run, about in zip(runs, abouts, strict=True)
      ],
      differences={
        method: run_origins.differences(group, origins[task, method])
        for method, group in groups.items()
      },
    )


def _unwarned():
  """Leaves out warnings about runs, which the first look has printed."""
  return contextlib.redirect_stderr(io.StringIO())


def _check_place(outdir, runs):
  place = pathlib.Path(os.path.realpath(outdir))
  for run in runs:
    if pathlib.Path(os.path.realpath(run.folder)) in (place, *place.parents):
      raise UserError(
        f'--outdir {outdir} is inside of the run {run.folder}, where nothing '
        'may change; choose a folder beside it'
      )


def rule(window):
  """Items of `compare.rule`, without Markdown."""
  text = compare.rule(run_folders.AXES, window)
  items = text.replace('`', '').split('- ')[1:]
  return [' '.join(item.split()) for item in items]


def table(rows):
  """What the template needs of the rows of `compare.compare`.

  Returns:
    Dictionary of header, (text, whether numbers are below it) each, and lines
    of (text, number or text to sort by).
  """
  lines = [compare.cells(row) for row in rows]
  numeric = [
    not any(isinstance(key, str) for _, key in column)
    for column in zip(*lines, strict=True)
  ]
  header = list(zip(compare.TITLES, numeric, strict=True))
  return dict(header=header, lines=lines)


def first_of_each(pictures, *kinds):
  """One picture of each task, of the first kind that it has."""
  found = {}
  for kind in kinds:
    for picture in pictures:
      if picture.kind == kind:
        found.setdefault(picture.task, picture)
  return list(found.values())


def last_evaluation(run):
  """Returns of the episodes of a run's last evaluation, the lowest first."""
  return sorted(run.scores[run.steps == run.steps[-1:]].tolist())


def facts(groups):
  """Words and counts for the top of the index."""
  runs = [run for group in groups.values() for run in group]
  return {
    'tasks': len({task for task, _ in groups}),
    'methods': len({method for _, method in groups}),
    'runs': len(runs),
    'episodes of evaluation': sum(len(run.steps) for run in runs),
  }


def provenance(origins):
  """{kind: {what runs say: number of runs}} of versions, commits, machines."""
  found = collections.defaultdict(collections.Counter)
  for about in origins:
    for package, version in about.versions.items():
      found[str(package)][str(version)] += 1
    found['commit'][about.code or 'not recorded'] += 1
    found['machine'][about.machine or 'not recorded'] += 1
  return dict(sorted(found.items()))


# --- The command ------------------------------------------------------------


def parse_flags(argv):
  parser = arguments.Parser(__doc__)
  compare.add_run_flags(parser)
  parser.flag(
    '--outdir', arguments.Path(), help='folder to write', required=True
  )
  parser.flag('--title', arguments.Text(), 'Dreamer', 'of the pages (Dreamer)')
  parser.flag('--pictures', arguments.Path(), help='folder of pictures')
  text = 'render those that are missing'
  bare = dict(nargs='?', const='True')
  parser.flag('--videos', arguments.Truth(), False, text, **bare)
  text = 'seconds between looks for changes, until Ctrl-C (once)'
  parser.flag('--watch', arguments.Whole(1, 86_400), 0, text)
  return parser.parse(argv)


def watch(report, seconds, videos):
  """Updates until Ctrl-C; what cannot be read may be there again later."""
  hindrance = ''
  try:
    while True:
      time.sleep(seconds)
      before, hindrance = hindrance, look(report, seconds, videos)
      if hindrance not in ('', before):
        cli.warn(f'{hindrance}; the pages stay as they are until it is mended')
  finally:
    report.end()


def look(report, seconds, videos):
  """Updates, without warnings again; returns what hinders it, or ''."""
  try:
    with _unwarned(), file_io.file_errors():
      changed = report.update(seconds, videos)
  except cli.Failure as error:
    return str(error)
  if changed:
    print(f'{datetime.datetime.now():%H:%M:%S} Updated.', flush=True)
  return ''


def run(argv):
  args = parse_flags(argv)
  if args.pictures:
    run_folders.check_folder('--pictures', args.pictures)
  with file_io.file_errors():
    report = Report(args)
    report.update(args.watch, args.videos)
    print(f'Wrote {args.outdir / "index.html"}.', flush=True)
    if args.watch:
      watch(report, args.watch, args.videos)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('report.py', run, argv)


if __name__ == '__main__':
  cli.end_by_sigterm()
  sys.exit(main())
