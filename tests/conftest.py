"""Of several test processes (pytest -n 2), each computes on its share of cores.

TensorFlow's threads would else wait for each other on cores that are taken.
"""

import os

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:
  threads = str(max(1, (os.cpu_count() or 1) // workers))
  os.environ.setdefault('TF_NUM_INTRAOP_THREADS', threads)
