"""Refuses modules that have taken the place of ours; imported before them.

The folder of a user's script comes first in `sys.path`, so that a file of the
same name there would be imported in the place of one of ours.
"""

import importlib.util
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent
# What is imported, and what is named as 'module.Class' to be imported later.
IMPORTED = re.compile(r"^ *(?:import|from) (\w+)|'(\w+)\.\w+'", re.MULTILINE)


def check():
  """ImportError that names the file, where one of our modules is another's."""
  seen, todo = set(), ['dreamer']
  while todo:
    name = todo.pop()
    ours = FOLDER / f'{name}.py'
    if name in seen or not ours.exists():
      continue
    seen.add(name)
    found = importlib.util.find_spec(name)
    if not found or not found.origin or not ours.samefile(found.origin):
      raise ImportError(
        f'{(found and found.origin) or name} has the name of a module of this '
        'library: rename it (in scripts that import dreamer)'
      )
    todo += [
      first or second for first, second in IMPORTED.findall(ours.read_text())
    ]


check()
