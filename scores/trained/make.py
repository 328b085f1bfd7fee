"""Makes a folder with a trained agent alone: its weights and its config.json.

    python scores/trained/make.py --logdir ./logdir/walker --outdir ./walker

Optimizers and episodes stay behind, so the agent acts and imagines, and other
runs may begin with its weights, but training cannot go on there.
"""

import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import quiet  # noqa: F401  (before TensorFlow)

# isort: split
import arguments
import checkpoints
import cli
import dreamer
import file_io
import library
import run_setup
import runfile


def run(argv):
  parser = arguments.Parser(__doc__)
  parser.flag('--logdir', arguments.Path(), help='of the run', required=True)
  parser.flag('--outdir', arguments.Path(), help='new folder', required=True)
  args = parser.parse(argv)
  file_io.make_folders(args.outdir)
  config = runfile.load_config(args.logdir)
  run_setup.setup_precision(config.precision)
  agent = library.load_dreamer(config, dreamer.Dreamer)
  shutil.copy(args.logdir / 'config.json', args.outdir)
  config.logdir = args.outdir
  runfile.write_config(config, agent.world.inputs, agent.action_space)
  saved = checkpoints.Checkpoints(
    args.outdir / 'checkpoints', **agent.knowledge()
  )
  print(f'Wrote {saved.save(int(agent.updates.numpy()))}.')


if __name__ == '__main__':
  sys.exit(cli.main('make.py', run))
