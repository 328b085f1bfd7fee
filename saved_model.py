"""A trained agent as a SavedModel, which acts with TensorFlow alone."""

import errno
import keyword
import os
import pathlib
import re
import shutil
import tempfile

import tensorflow as tf

import configs
import file_io
import spaces
from cli import Failure, UserError
from pure_policy import Policy

ABOUT = 'agent.json'
PARTIAL = '.export-'  # names begin so while files are written


def export(agent, folder):
  """Writes a SavedModel that acts with TensorFlow alone.

  Its signatures, with the names and shapes of their tensors:

    reset  batch int32 [], seed int32 [2]    -> memory_*
    act    the inputs [E, ...], and memory_*  -> action [E, A], and memory_*

  Args:
    agent: `dreamer.Dreamer`.
    folder: which it makes.

  Raises:
    UserError: two inputs would have one name, or the folder holds something
      else or cannot be written.
  """
  folder = pathlib.Path(folder)
  if not _replaceable(folder):
    raise UserError(
      f'--export {folder} holds something else; choose a new folder, an empty '
      'one, or one that was exported to before'
    )
  policy = Policy(agent)
  signatures = _signatures(policy, agent.world.inputs)
  about = dict(
    task=agent.config.task,
    method=configs.method_name(agent.config),
    action_repeat=agent.config.action_repeat,
    inputs={k: [_plain(k), list(v)] for k, v in agent.world.inputs.items()},
    actions=spaces.action_record(agent.action_space),
  )
  _save_whole(policy, signatures, about, folder)


def _signatures(policy, inputs):
  """The two functions of `export`, {name: concrete function}."""
  state = policy.start(1, tf.zeros([2], tf.int32))

  @tf.function(autograph=False)
  def reset(batch, seed):
    return _prefixed(policy.start(batch, seed))

  @tf.function(autograph=False)
  def act(**tensors):
    before = {k: tensors[f'memory_{k}'] for k in state}
    obs = {k: tensors[_plain(k)] for k in inputs}
    action, after = policy.act(obs, before)
    return dict(_prefixed(after), action=action)

  specs = {}
  for name, shape in inputs.items():
    taken = {k.lower() for k in (*specs, *_prefixed(state))}
    if _plain(name).lower() in taken:  # TensorFlow looks at no case
      raise UserError(
        f'--export: two inputs would be called {_plain(name)}, but for case'
      )
    specs[_plain(name)] = tf.TensorSpec(
      [None, *shape], spaces.dtype(name), _plain(name)
    )
  for name, value in _prefixed(state).items():
    shape = value.shape if name == 'memory_seed' else [None, *value.shape[1:]]
    specs[name] = tf.TensorSpec(shape, value.dtype, name)
  start = dict(
    batch=tf.TensorSpec([], tf.int32), seed=tf.TensorSpec([2], tf.int32)
  )
  return dict(
    reset=reset.get_concrete_function(**start),
    act=act.get_concrete_function(**specs),
  )


def _replaceable(folder):
  """Whether nothing is there but what an export wrote."""
  if not folder.is_dir():
    return True
  names = {path.name for path in folder.iterdir()}
  killed = any(name.startswith(PARTIAL) for name in names)
  return not names or ABOUT in names or killed


def _save_whole(policy, signatures, about, folder):
  """Writes all files, or none where one cannot be written.

  What says that they are all there comes last.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f'{PARTIAL}*'):  # by one that was killed
      shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as temporary:
      tf.saved_model.save(policy, temporary, signatures)
      pathlib.Path(temporary, ABOUT).write_bytes(file_io.to_json(about))
      files = pathlib.Path(temporary).iterdir()
      for made in sorted(files, key=lambda path: path.name == ABOUT):
        before = folder / made.name
        if before.is_dir():
          shutil.rmtree(before)
        made.rename(before)
  except (OSError, tf.errors.OpError) as error:
    reason = str(error).partition('\n')[0]
    full = os.strerror(errno.ENOSPC) in str(error)
    kind = Failure if full else UserError
    raise kind(f'cannot write to {folder}: {reason}') from None


def _prefixed(state):
  return {f'memory_{k}': v for k, v in state.items()}


def _plain(name):
  """The name of an observation as one of a tensor, and of an argument."""
  name = re.sub(r'\W+', '_', name, flags=re.ASCII)
  taken = keyword.iskeyword(name) or name == 'self'
  plain = name[:1].isalpha() and not taken
  return name if plain else f'obs_{name.lstrip("_")}'
