"""What all tests need, in whatever order their files run.

Of several test processes (pytest -n 2), each computes on its share of cores:
TensorFlow's threads would else wait for each other on cores that are taken.
"""

import os
import sys

import pytest

for helper in ('logdirs', 'pages', 'processes', 'soak', 'worlds'):
  pytest.register_assert_rewrite(helper)

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:
  threads = str(max(1, (os.cpu_count() or 1) // workers))
  os.environ.setdefault('TF_NUM_INTRAOP_THREADS', threads)


@pytest.fixture(autouse=True, scope='module')
def float32():
  """Each file begins in float32, whatever a run in the one before it set."""
  yield
  if 'keras' in sys.modules:
    sys.modules['keras'].config.set_dtype_policy('float32')
