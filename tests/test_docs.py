"""README and docs: links, names, flags and commands that are still true."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]
LINK = re.compile(r'\]\(([^)\s]+)\)')
FILE = re.compile(r'`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|json|toml))`')
# Files that a run or a user makes, and those of the recipes.
MADE = {'config.json', 'agent.json', 'behavior.gif', 'line.py', 'run.json'}

pages = pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)


def prose(page):
  """The text of a page, without its blocks of code."""
  return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)


def anchors(page):
  """What GitHub calls the headings of a page."""
  titles = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
  plain = [re.sub(r'[^\w\- ]', '', title.lower()) for title in titles]
  return {title.replace(' ', '-') for title in plain}


@pages
def test_links_lead_somewhere(page):
  for link in LINK.findall(prose(page)):
    if link.startswith('http'):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pages
def test_files_that_are_named_exist(page):
  for name in FILE.findall(page.read_text()):
    found = (ROOT / name).exists() or (page.parent / name).exists()
    assert found or name in MADE, name


def test_every_page_is_in_the_contents():
  linked = set(LINK.findall(README.read_text()))
  assert {f'docs/{page.name}' for page in PAGES[1:]} <= linked


def test_readme_is_short():
  assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize(
  'marker, end', [('run', 'dmc_walker_walk'), ('test', '--dist loadfile')]
)
def test_marked_commands_are_one_line(marker, end):
  pattern = rf'^<!-- {marker} command -->\n```bash\n(.*)\n```$'
  (command,) = re.findall(pattern, README.read_text(), re.MULTILINE)
  assert command.startswith('P="libegl1') and command.endswith(end)


def test_the_quick_start_installs_what_the_command_does():
  start, command = (
    part.partition('```bash\n')[2].partition('```')[0]
    for part in README.read_text()
    .split('## Quick start')[1]
    .split('<!-- run command -->')
  )
  packages = re.search(r'P="([^"]*)"', command)[1]
  assert f'apt-get install -y {packages}\n' in start
  for step in re.findall(r'"\$VENV/bin/pip" (install [^&]*?) &&', command):
    assert f'pip {step}' in start


def defined(path):
  """Names that a file defines: functions, classes and their methods, tables."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
      inner = [x for x in node.body if isinstance(x, ast.FunctionDef)]
      names |= {f'{node.name}.{x.name}' for x in inner}
    elif isinstance(node, ast.Assign):
      names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
  return names


def test_places_of_equations_exist():
  table = README.read_text().split('## Equations')[1].split('## ')[0]
  places = re.findall(r'`(\w+)\.([A-Z_a-z.]+)`', table.split('|---|')[1])
  assert len(places) > 20
  for module, name in places:
    assert name in defined(ROOT / f'{module}.py'), f'{module}.{name}'


def test_tables_of_flags_are_those_of_the_code():
  script = [sys.executable, str(ROOT / 'docs' / 'make_flags.py'), '--check']
  done = subprocess.run(script, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_tables_of_flags_that_differ_are_noticed(tmp_path):
  (tmp_path / 'docs').mkdir()
  for path in [*ROOT.glob('*.py'), *ROOT.glob('docs/*.*')]:
    (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
  page = tmp_path / 'docs' / 'usage.md'
  before = page.read_text()
  page.write_text(
    before.replace('| `--horizon` | `15`', '| `--horizon` | `16`')
  )
  script = [sys.executable, str(tmp_path / 'docs' / 'make_flags.py')]
  assert subprocess.run([*script, '--check']).returncode == 1
  subprocess.run(script, check=True)
  assert page.read_text() == before


def test_the_container_has_the_commands_of_the_readme():
  """Its packages, what pip installs, and what it runs."""
  text = (ROOT / 'Dockerfile').read_text()
  steps = re.sub(r'^#.*\n', '', text, flags=re.M).replace('\\\n', ' ')
  instructions = [line.split(None, 1) for line in steps.splitlines() if line]
  done = ' ; '.join(rest for name, rest in instructions if name == 'RUN')
  done = re.sub(r'\s+', ' ', done).replace('"', '')
  given = [
    ' '.join(ast.literal_eval(rest))
    for name, rest in instructions
    if name in ('ENTRYPOINT', 'CMD')
  ]
  blocks = re.findall(
    r'<!-- \w+ command -->\n```bash\n(.*)\n', README.read_text()
  )
  assert len(blocks) == 2
  for block in blocks:
    packages = re.match(r'P="([^"]*)"', block)[1]
    assert f'--no-install-recommends {packages} ' in done
    for step in re.findall(r'"\$VENV/bin/pip" install ([^&]*)', block):
      for part in step.strip().replace('-e ', ' -e ').split('  -e '):
        assert part in done, part
  train, test = (b.rpartition('"$VENV/bin/python" ')[2] for b in blocks)
  assert f'python {test}' in given
  script, _, flags = train.partition(' ')
  assert f'python {script}' in given
  assert flags.replace('./logdir', '/logdir') in given
  for name, rest in instructions:
    if name == 'COPY':
      assert all((ROOT / source).exists() for source in rest.split()[:-1])
    if name == 'RUN':
      subprocess.run(['bash', '-n', '-c', rest], check=True)
