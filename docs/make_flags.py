"""Writes the tables of flags in docs/usage.md, from configs.py.

    python docs/make_flags.py            rewrites the tables
    python docs/make_flags.py --check    exits with 1 if they would differ

No TensorFlow.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arguments  # noqa: E402
import configs  # noqa: E402

PAGE = ROOT / 'docs' / 'usage.md'
BEGIN, END = '<!-- flags begin -->\n', '<!-- flags end -->\n'
LARGE = 10**15  # of `arguments.Whole`, where there is no other limit
HEADER = (
  '| flag | default | values | meaning and unit | source | on resume |\n'
  '|---|---|---|---|---|---|\n'
)


def number(value):
  """A number as a user would type it: 5e6, 8e-5, 0.99, 1000."""
  mantissa, _, exponent = f'{value:e}'.partition('e')
  short = f'{float(mantissa):g}e{int(exponent)}'
  large = value >= 100_000 and float(short) == value
  return short if large or 0 < value < 0.01 else f'{value:.12g}'


def default(flag):
  if flag.name == 'logdir':
    return 'required'
  if flag.default == '':
    return 'none'
  plain = isinstance(flag.default, (bool, str, dict))
  return f'`{flag.default if plain else number(flag.default)}`'


def values(kind):
  """What a flag takes, in few words."""
  if isinstance(kind, arguments.Choice):
    return ', '.join(f'`{word}`' for word in kind.words)
  if isinstance(kind, arguments.Truth):
    return '`True`, `False`'
  if isinstance(kind, arguments.Whole):
    end = '' if kind.high == LARGE else f' to {number(kind.high)}'
    return f'integer, {kind.low}{end or " or more"}'
  if isinstance(kind, arguments.Number):
    low, high = re.search(r'(\S+)(?:,| to).* (\S+)$', str(kind)).groups()
    if 'above' in str(kind):
      low = f'above {low},'
    return f'number, {low} to {number(float(high.replace(",", "")))}'
  words = {arguments.Text: 'name', arguments.Arguments: 'JSON object'}
  return words.get(type(kind)) or str(kind).removeprefix('a ')


def row(flag):
  cells = (
    f'`--{flag.name}`',
    default(flag),
    values(flag.kind),
    flag.meaning,
    flag.source,
    'fixed' if flag.fixed else '',
  )
  return '| ' + ' | '.join(x.replace('|', r'\|') for x in cells) + ' |\n'


def tables():
  """All tables, as Markdown."""
  return '\n'.join(
    f'**{group}**\n\n{HEADER}{"".join(map(row, flags))}'
    for group, flags in configs.FLAGS.items()
  )


def main(argv):
  """Returns the exit code."""
  if argv not in ([], ['--check']):
    print(__doc__)
    return 2
  page = PAGE.read_text()
  head, begin, rest = page.partition(BEGIN)
  _, end, tail = rest.partition(END)
  if not begin or not end:
    print(f'{PAGE} lacks the line {(END if begin else BEGIN).strip()}')
    return 1
  new = f'{head}{begin}\n{tables()}\n{end}{tail}'
  if argv:
    if new != page:
      print(f'{PAGE} differs from configs.py: run python docs/make_flags.py')
    return int(new != page)
  PAGE.write_text(new)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
