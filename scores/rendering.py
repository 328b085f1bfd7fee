"""How long an image of the control suite takes, and how alike faster ones are.

    python scores/rendering.py --states 40

All settings draw the same states, in turns. Prints, for each task and setting:
milliseconds (median), the share of the suite's, and the mean and the largest
difference from the suite's image, of 255. Then the environment steps a second
of dmc_walker_walk in a worker, from images and from vectors.
"""

import functools
import pathlib
import sys
import time

import numpy as np
from dm_control import suite

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import arguments
import cli
import dmc_env
import suites
import workers

TASKS = 'walker_walk', 'cheetah_run', 'cartpole_swingup', 'ball_in_cup_catch'
TASKS = *TASKS, 'quadruped_walk'
# What differs from the suite; `materials` is of the model, the rest of its
# quality.
LOW = dmc_env.LOW_DETAIL
SETTINGS = {
  'suite': {},
  'shadow map 512': dict(shadowsize=512),
  'low': LOW,
  'low, shadow map 256': dict(LOW, shadowsize=256),
  'low, no antialiasing': dict(LOW, offsamples=0),
  'low, 16 slices': dict(LOW, numslices=16),
  'low, no reflections': dict(LOW, materials=0),
}


def make(task, changes):
  """A task of the suite, with changes before its first image."""
  env = suite.load(*dmc_env.DMC_TASKS[task], task_kwargs={'random': 0})
  model = env.physics.model
  for name, value in changes.items():
    if name == 'materials':
      model.mat_reflectance[:] = value
    else:
      setattr(model.vis.quality, name, value)
  if changes:  # as here, with or without less detail
    model.vis.global_.offheight = model.vis.global_.offwidth = 64
  return env


def compare(task, states):
  """{setting: (seconds of each image, differences from the suite's)}."""
  envs = {name: make(task, changes) for name, changes in SETTINGS.items()}
  rng, found = np.random.default_rng(0), {name: ([], []) for name in envs}
  camera = 2 if task.startswith('quadruped') else 0
  spec = envs['suite'].action_spec()
  for env in envs.values():
    env.reset()
  for _ in range(states + 2):
    action, images = rng.uniform(spec.minimum, spec.maximum), {}
    for name in rng.permutation(list(envs)):
      envs[name].step(action)
      start = time.perf_counter()
      image = envs[name].physics.render(64, 64, camera_id=camera)
      found[name][0].append(time.perf_counter() - start)
      images[name] = image.astype(int)
    for name, image in images.items():
      found[name][1].append(np.abs(image - images['suite']))
  return {k: (seconds[2:], parts[2:]) for k, (seconds, parts) in found.items()}


def rate(inputs, detail, steps):
  """Environment steps a second of the walker in a worker."""
  env = workers.Async(
    functools.partial(
      suites.make_task, 'dmc_walker_walk', inputs=inputs, detail=detail
    )
  )
  rng, seconds = np.random.default_rng(0), []
  try:
    env.reset()
    for _ in range(steps):
      action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
      start = time.perf_counter()
      env.step(action)
      seconds.append(time.perf_counter() - start)
  finally:
    env.close()
  return suites.Options.action_repeat / np.median(seconds[10:])


def run(argv):
  parser = arguments.Parser(__doc__)
  parser.flag('--states', arguments.Whole(1), 40, 'of each task (40)')
  args = parser.parse(argv)
  for task in TASKS:
    found = compare(task, args.states)
    base = np.median(found['suite'][0])
    for name, (seconds, parts) in found.items():
      middle = np.median(seconds)
      print(
        f'{task:18} {name:22} {1e3 * middle:6.1f} ms {middle / base:5.2f} '
        f'{np.mean(parts):6.3f} {np.max(parts):4d}',
        flush=True,
      )
  for inputs, detail in (('image', 'full'), ('image', 'low'), ('state', 'low')):
    steps = 400 if inputs == 'state' else 100
    print(
      f'{inputs} {detail}: {rate(inputs, detail, steps):.0f} steps a second'
    )


if __name__ == '__main__':
  sys.exit(cli.main('rendering.py', run))
