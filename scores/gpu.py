"""Times a full-size agent on a GPU: compiling, updates, actions, memory.

    python scores/gpu.py --json gpu.json
    python scores/gpu.py --ways 16,True 16,False

Each way (precision, XLA) is a process of its own; all compile at the same time
and are timed one after the other. benchmark.py times more, but compiles every
part of an update on its own, which takes XLA several minutes. No simulator.
"""

import argparse
import fcntl
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import arguments
import cli
import configs
import file_io

WAYS = '16,True', '16,False', 'bfloat16,True', '32,True'


def measure(precision, jit, preset, lock):
  """Figures of one way, in this process.

  Args:
    precision, jit, preset: flags of those names.
    lock: path of a file that is held while timing.

  Returns:
    Dictionary: `first_update_s`, `update_s` and `policy_ms` as (median, least,
    largest), and on a GPU `peak_gib`.
  """
  import gym
  import numpy as np
  import tensorflow as tf

  import benchmark
  import dreamer
  import run_setup

  for gpu in tf.config.list_physical_devices('GPU'):
    tf.config.experimental.set_memory_growth(gpu, True)
  config = configs.define_config('dmc_walker_walk', preset)
  config.update(precision=precision, jit=jit)
  run_setup.setup_precision(precision)
  space = gym.spaces.Box(-1, 1, (6,), np.float32)
  agent = dreamer.Dreamer(config, space)
  size = config.batch_size, config.batch_length
  draw = np.random.default_rng(0)
  data = dict(
    image=draw.integers(0, 255, (*size, 64, 64, 3), np.uint8),
    action=draw.uniform(-1, 1, (*size, 6)).astype(np.float32),
    reward=draw.uniform(0, 1, size).astype(np.float32),
    discount=np.ones(size, np.float32),
  )
  data = {k: tf.constant(v) for k, v in data.items()}
  agent.set_learning_rates()

  def update():
    metrics = agent.train(data)
    agent.updates.assign_add(1)
    return {k: float(v) for k, v in metrics.items()}

  obs, reset = dict(image=np.zeros((1, 64, 64, 3), np.uint8)), np.zeros(1, bool)
  start = time.perf_counter()
  update()
  figures = dict(first_update_s=time.perf_counter() - start)
  with open(lock, 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    figures['update_s'] = benchmark.median(update, 30)
    state = agent(obs, reset)[1]
    act = benchmark.median(lambda: agent(obs, reset, state), 100)
    figures['policy_ms'] = [1e3 * x for x in act]
  if tf.config.list_physical_devices('GPU'):
    memory = tf.config.experimental.get_memory_info('GPU:0')
    figures['peak_gib'] = memory['peak'] / 2**30
  return figures


def run(argv):
  parser = arguments.Parser(__doc__)
  each = itertools.product(('16', 'bfloat16', '32'), ('True', 'False'))
  ways = arguments.Choice(*map(','.join, each))
  parser.flag('--ways', ways, WAYS, 'precision and jit', nargs='+')
  parser.flag('--preset', configs.PRESET, 'release')
  parser.flag('--json', arguments.Path(), help='file for the figures')
  parser.flag('--one', arguments.Text(), help=argparse.SUPPRESS, nargs=2)
  args = parser.parse(argv)
  if args.one:
    way, lock = args.one
    print(json.dumps(measure(*way.split(','), args.preset, lock)))
    return
  file_io.make_outputs(args.json)
  with tempfile.NamedTemporaryFile() as lock:
    command = [sys.executable, __file__, '--preset', args.preset, '--one']
    processes = {
      way: subprocess.Popen(
        [*command, way, lock.name], stdout=subprocess.PIPE, text=True
      )
      for way in args.ways
    }
    results = {}
    try:
      for way, process in processes.items():
        output = process.communicate()[0].splitlines()
        if process.returncode:
          raise cli.Failure(f'{way} failed')
        results[way] = json.loads(output[-1])
        print(way, json.dumps(results[way]))
    finally:  # the others, where one failed
      for process in processes.values():
        process.kill()
        process.wait()
  if args.json:
    file_io.write_json(args.json, results)


def main(argv=None):
  """Returns the exit code; see `cli.main`."""
  return cli.main('gpu.py', run, argv)


if __name__ == '__main__':
  sys.exit(main())
