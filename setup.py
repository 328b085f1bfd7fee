"""Installs the modules of Dreamer; requirements.txt pins the tested set."""

import setuptools

# dm-control asks for labmaze, which has no wheel for Python 3.13. The control
# suite does not use it: there, these are the rest of what dm-control asks for,
# and `pip install --no-deps dm-control` follows (see README.md).
WITHOUT_LABMAZE = [
  f'{requirement}; python_version >= "3.13"'
  for requirement in (
    'absl-py',
    'dm-env',
    'dm-tree',
    'glfw',
    'lxml',
    'protobuf',
    'pyopengl>=3.1.4',
    'pyparsing>=3',
    'requests',
    'setuptools',
  )
]

SWEEP = ['ray>=2.40,<3', 'rich>=13']

setuptools.setup(
  name='dreamer-tf2',
  version='0.1.0',
  description='Dreamer: learning behaviors by latent imagination',
  license='MIT',
  py_modules=[
    'arguments',
    'behaviors',
    'checkpoints',
    'cli',
    'cmaes',
    'commandline',
    'configs',
    'distribute',
    'dreamer',
    'environments',
    'episode_files',
    'evolution',
    'exploration',
    'free',
    'gym_env',
    'layers',
    'learner',
    'library',
    'logger',
    'models',
    'progress',
    'quiet',
    'ray_workers',
    'replay',
    'representations',
    'run_kinds',
    'runfile',
    'spaces',
    'suites',
    'tools',
    'toys',
    'training',
    'worker_calls',
    'worker_process',
    'workers',
    'world_model',
    'wrappers',
  ],
  python_requires='>=3.11,<3.14',
  install_requires=[
    'tensorflow>=2.18,<2.22',
    'keras>=3.8,<4',
    'tensorflow-probability>=0.25,<0.26',
    'tf-keras>=2.18,<2.22',
    'dm-control>=1.0.50,<2; python_version < "3.13"',
    *WITHOUT_LABMAZE,
    'mujoco>=3.17,<4',
    'gym>=0.26.2,<0.27',
    'ale-py>=0.12,<0.13',
    'numpy>=2,<3',
    'imageio>=2.38,<3',
    'pillow>=11',
    'jinja2>=3.1,<4',
    'matplotlib>=3.9,<4',
    'scipy>=1.15',
    'tqdm>=4.66,<5',
    'cloudpickle>=3,<4',
    'cma>=4.5,<4.6',
    'tensorboard>=2.18,<2.22',
  ],
  extras_require={
    'sweep': SWEEP,
    'test': [
      *SWEEP,
      *(
        'pytest>=8',
        'pytest-xdist>=3.7',
        'hypothesis>=6.100',
        'ruff>=0.17,<0.18',
      ),
      *('gymnasium[box2d]>=1.4', 'imageio-ffmpeg>=0.5'),
      *('playwright>=1.50', 'axe-playwright-python>=0.1.7'),
    ],
  },
)
