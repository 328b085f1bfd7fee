"""How files hang together: imports one way, none missing in setup.py."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import configs

ROOT = pathlib.Path(__file__).parent.parent
MODULES = {p.stem: p for p in ROOT.glob('*.py') if p.stem != 'setup'}
RAY = 'ray_cluster', 'ray_workers'
# What may be imported inside a function: packages that are optional or slow to
# load.
OPTIONAL = {
  *('ray', 'rich', 'gym', 'ale_py', 'deepmind_lab', 'dm_control'),
  *('cma', 'matplotlib', 'OpenGL', 'imageio_ffmpeg', *RAY),
}


def imports(name):
  """Names of modules imported by a file: at its top, and in functions."""
  tree = ast.parse(MODULES[name].read_text())
  functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
  inner = set().union(*map(imported, functions))
  return imported(tree) - inner, inner


def imported(tree):
  """Names of modules imported anywhere in a piece of code."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {x.name for x in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add(node.module)
  return {x.partition('.')[0] for x in names}


def named():
  """Modules that a registry names, and nothing imports."""
  arms = [*configs.BEHAVIORS.values(), *configs.REPRESENTATIONS.values()]
  return {arm.path.partition('.')[0] for arm in arms}


def reached(*names):
  """Modules of this project that these import, with themselves."""
  done, todo = set(), set(names)
  while todo:
    name = todo.pop()
    done.add(name)
    todo |= (imports(name)[0] & MODULES.keys()) - done
  return done


def test_no_file_of_tests_imports_another():
  """What several need lies in files of its own."""
  for path in pathlib.Path(__file__).parent.glob('*.py'):
    names = imported(ast.parse(path.read_text()))
    assert not [name for name in names if name.startswith('test_')], path


def test_imports_go_one_way():
  graph = {name: imports(name)[0] & MODULES.keys() for name in MODULES}
  order = list(graphlib.TopologicalSorter(graph).static_order())
  assert order.index('cli') < order.index('training') < order.index('dreamer')


@pytest.mark.parametrize('name', sorted(MODULES))
def test_functions_import_only_what_is_optional(name):
  # ray_workers holds functions that run on other hosts, without this project.
  standard = sys.stdlib_module_names if name == 'ray_workers' else set()
  assert imports(name)[1] <= OPTIONAL | standard


@pytest.mark.parametrize(
  'name', ['suites', 'commandline', 'compare', 'sweep', 'report']
)
def test_loads_without_tensorflow(name):
  """Workers must not have it, and tables and flags should not wait for it."""
  code = f'import sys, {name}; sys.exit("tensorflow" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_setup_installs_what_the_agent_imports():
  tree = ast.parse((ROOT / 'setup.py').read_text())
  installed = next(
    ast.literal_eval(node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.keyword) and node.arg == 'py_modules'
  )
  assert installed == sorted(reached('dreamer', *named()) | {*RAY})


def defined(name):
  """Names at the top of a module, imported ones among them."""
  names, todo = set(), [*ast.parse(MODULES[name].read_text()).body]
  while todo:
    node = todo.pop()
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
      names |= {(x.asname or x.name).partition('.')[0] for x in node.names}
    else:
      names |= {
        x.id
        for x in ast.walk(node)
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
      }
      todo += getattr(node, 'body', [])
  return names


def test_names_of_modules_exist():
  """`module.name` in all code; also in scripts that no other test runs."""
  known, wrong = {name: defined(name) for name in MODULES}, []
  folders = [ROOT / name for name in ('docs', 'scores', 'tests')]
  files = [path for folder in folders for path in folder.rglob('*.py')]
  for path in sorted({*ROOT.glob('*.py'), *files}):
    tree = ast.parse(path.read_text())
    ours = {
      x.asname or x.name: x.name
      for node in ast.walk(tree)
      if isinstance(node, ast.Import)
      for x in node.names
      if x.name in MODULES
    }
    wrong += [
      f'{path.relative_to(ROOT)}:{node.lineno} {node.value.id}.{node.attr}'
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id in ours
      and not node.attr.startswith('__')
      and node.attr not in known[ours[node.value.id]]
    ]
  assert not wrong
