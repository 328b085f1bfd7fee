"""The processes of a run, as the environment variable TF_CONFIG lists them."""

import contextlib
import json
import math
import os
import signal
import socket
import time

import tensorflow as tf

from cli import UserError


def read():
  """(index, addresses of all processes) by TF_CONFIG; None without it."""
  text = os.environ.get('TF_CONFIG')
  if not text:
    return None
  try:
    record = json.loads(text)
    cluster, task = record['cluster'], record['task']
    kind, index = task['type'], int(task['index'])
    members = {
      (k, i): address
      for k in ('chief', 'worker')
      for i, address in enumerate(_addresses(cluster, k))
    }
    index, addresses = [*members].index((kind, index)), [*members.values()]
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
    raise UserError(
      f'TF_CONFIG is not a cluster and a task of type chief or worker in it: '
      f'{text[:200]}'
    ) from None
  for address in addresses:
    if addresses.count(address) > 1:
      raise UserError(f'TF_CONFIG gives the address {address} to two processes')
  return index, addresses


def _addresses(cluster, kind):
  addresses = cluster.get(kind, [])
  for address in addresses:
    host, _, port = address.rpartition(':')
    if not host or not 0 < int(port) < 2**16:
      raise ValueError(address)
  return addresses


def join(cluster):
  """The strategy of several processes, when all of them are there.

  Args:
    cluster: from `read`.

  Raises:
    UserError: there is no cluster, or this process cannot take its place.
  """
  if not cluster:
    raise UserError(
      '--strategy multiworker needs the environment variable TF_CONFIG, such '
      'as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": '
      '{"type": "worker", "index": 0}}, with another index in each process'
    )
  index, addresses = cluster
  workers = len(addresses)
  print(f'Process {index} of {workers}: waiting for the others.', flush=True)
  # TensorFlow waits in C++, where Python's handler would not be called.
  handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    _wait_for_peers(index, addresses)
    return tf.distribute.MultiWorkerMirroredStrategy()
  except (OSError, tf.errors.OpError) as error:
    reason = getattr(error, 'message', str(error)).partition('\n')[0]
    raise UserError(
      f'process {index} cannot begin at its address in TF_CONFIG ({reason}). '
      'Is its port free, on this host?'
    ) from None
  finally:
    signal.signal(signal.SIGINT, handler)


def _wait_for_peers(index, addresses):
  """Until a process listens at each address.

  TensorFlow would wait as well, but say nothing and heed no SIGTERM.

  Raises:
    OSError: this process cannot listen at its own.
    UserError: another's address is that of this process.
  """
  missing = dict.fromkeys(addresses[:index] + addresses[index + 1 :])
  port, said = int(addresses[index].rpartition(':')[2]), time.monotonic()
  both = socket.has_dualstack_ipv6()  # IPv4 and IPv6
  family = socket.AF_INET6 if both else socket.AF_INET
  with socket.create_server(
    ('', port), family=family, dualstack_ipv6=both
  ) as server:
    server.setblocking(False)
    while missing:
      missing = {k: why for k in missing if (why := _silence(k, server))}
      if missing and time.monotonic() > said + 10:
        said = math.inf
        peers = ', '.join(f'{k} ({why})' for k, why in missing.items())
        print(f'Still waiting for {peers}.', flush=True)
      time.sleep(0.2)


def _silence(address, server):
  """Why nobody answers at an address; '' where somebody does.

  A connection to a free port of this host may be one with itself.

  Raises:
    UserError: it is `server`, the socket of this process, that answers.
  """
  host, _, port = address.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), 2) as found:
      itself = found.getsockname() == found.getpeername()
      own = found.getsockname()[:2] in _callers(server)
  except OSError as error:
    return error.strerror or str(error)
  if own and not itself:
    raise UserError(
      f'{address} in TF_CONFIG is another process, and this one answers there: '
      'give each its own index, and the address of its host'
    )
  return 'Connection refused' if itself else ''


def _callers(server):
  """Addresses that have connected to a socket since the last look."""
  callers = set()
  with contextlib.suppress(BlockingIOError):
    while True:
      found, (host, port, *_) = server.accept()
      found.close()
      callers.add((host.removeprefix('::ffff:'), port))
  return callers
