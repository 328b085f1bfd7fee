"""When a run saves and evaluates, and what it resumes from."""

import math
import time

import tensorflow as tf

import checkpoints
import episode_files
import tools
from cli import UserError


class Progress:
  """What a run has done: its checkpoints, and the evaluations made.

  Args:
    run: a `run_kinds.Run`.
    learner: a `learner.Learner`.
  """

  exact = False

  def __init__(self, run, learner):
    self._run, self._learner = run, learner
    self._c, self._team = run.config, run.team
    self._evaluations = 0
    self._perhaps_begun = True  # the next evaluation, by an earlier process
    self._should_eval = tools.Every(self._c.eval_every)
    self._state = checkpoints.RunState(self._collect)
    self._checkpoints = checkpoints.Checkpoints(
      self._c.logdir / 'checkpoints',
      should_eval=self._should_eval,
      run=self._state,
      **learner.trackable(),
    )
    self._saved = time.monotonic()
    self._mark = None  # what changes, at the last portion

  def _collect(self):
    return dict(
      exact=self.exact,
      evaluations=self._evaluations,
      steps=self._run.steps(),
      newest=episode_files.newest(self._run.datadir),
      metrics_size=self._run.logger.size(),
      sums=self._learner.unlogged(),
    )

  def portion(self):
    """What is collected until the next look at evaluations and checkpoints."""
    left = self._c.steps - self._run.collected(self._learner.step)
    steps = min(self.steps_to_evaluation(), left)
    share = self._c.action_repeat * self._team.workers
    return dict(steps=math.ceil(steps / share))

  def steps_to_evaluation(self):
    """Environment steps until evaluations are due again."""
    return self._should_eval.until(self._learner.step)

  def after_portion(self):
    """When a portion was collected; saves, unless nothing has changed."""
    self._learner.catch_up()
    mark = self._run.steps(), self._learner.updates, self._evaluations
    if mark != self._mark:
      self.save()
    self._mark = mark

  def save(self):
    self._saved = time.monotonic()  # first, as another may be due meanwhile
    if self._team.chief:
      self._checkpoints.save(self._learner.updates)

  def save_if_due(self):
    """Between updates."""
    if time.monotonic() > self._saved + 60 * self._c.save_every:
      self.save()

  def save_at_end(self):
    """When the run has finished or is stopped: logs and saves all."""
    self._learner.finish()
    self.save()

  def save_when_stopped(self):
    """As `save_at_end`; returns what to say of it."""
    self.save_at_end()
    return ''

  def evaluate_if_due(self, env):
    """Episodes without learning, exploration noise or stored rows.

    Args:
      env: for evaluations, or None where there is none.
    """
    step = self._learner.step
    if not self._should_eval.due(step):
      return
    if env:
      done = self._take_interrupted()
      env.number(self._evaluations + done)
      left = max(0, self._c.eval_episodes - done)
      tools.simulate(self._learner.evaluate, [env], episodes=left)
      self._evaluations += done + left
    # Not before, or what stops here would skip it. One evaluation of the same
    # weights is enough, however many are due.
    self._should_eval.catch_up(step)
    if env:  # or a run that is killed later makes these again
      self._save_soon()

  def _save_soon(self):
    """At once, unless updates go on in another thread."""
    self.save()

  def _take_interrupted(self):
    """Episodes of an evaluation that an earlier process left; once."""
    if not self._perhaps_begun:
      return 0
    self._perhaps_begun = False
    steps = self._run.logger.steps_of('test/return')
    return steps.count(self._run.steps())

  def resume(self):
    """Restores the newest checkpoint; steps are those of whole episodes."""
    restored = self._team.chief and self._checkpoints.restore(repair=True)
    if self._team.chief:
      self._check_lost(restored)
    if restored:
      self._rewind(self._state.restored)
    before = self._learner.step
    self._learner.step = self._run.steps()
    known = 0 if self._c.offline else self._state.restored.get('steps', 0)
    gone = max(0, known - self._learner.step)
    if gone or self._c.offline:  # whose steps follow from flags
      self._go_back()
    self._perhaps_begun &= not gone  # steps made again have other weights
    self._should_eval.repeat_from(self._learner.step)
    self._learner.repeat_entries()
    if known and restored:  # due since then, though none was made
      self._learner.count_due(min(known, self._learner.step))
    schedules = dict(should_eval=self._should_eval)
    receive(
      self._team, {**self._learner.trackable(), **schedules}, self._c.seed
    )
    if not restored:
      # From now on, a run without a checkpoint is one that has lost it.
      self.save()
      return
    self._evaluations = self._state.restored['evaluations']
    line = (
      f'Resumed at step {self._learner.step}, {self._learner.updates} updates.'
    )
    if self._learner.step + gone < before and not self._c.offline:
      dropped = before - self._learner.step - gone
      line += f' ({dropped} steps of unfinished episodes were dropped.)'
    if gone:
      line += f' Episodes of {gone} steps are gone, and are made again.'
    self._run.say(line)
    self._resumed(self._state.restored)

  def _go_back(self):
    """What is due follows from the episodes that are left."""
    parts = [self._should_eval, *self._learner.trackable().values()]
    for schedule in parts:
      if isinstance(schedule, tools.Every):
        schedule.go_back(self._learner.step)

  def _rewind(self, saved):
    """Deletes data newer than the checkpoint, if it will be regenerated."""

  def _resumed(self, saved):
    updates = self._learner.updates
    self._run.logger.scalars(
      self._learner.step, dict(resumed=1, updates=updates)
    )

  def _check_lost(self, restored):
    """UserError if the run has learned, and would begin anew now.

    Args:
      restored: path of the checkpoint that was restored, or None.
    """
    trace = self._checkpoints.newest_trace()
    if restored:
      number = int(restored.rpartition('-')[2])
      lost = trace > number + 1 or (
        trace > number and self._run.logger.largest('updates')
      )
      anew = self._learner.updates == 0 and lost
    else:
      anew = trace or self._run.logger.largest('updates')
    if anew:
      folder = self._c.logdir
      raise UserError(
        f'--logdir {folder} holds a run that has learned, but no checkpoint '
        f'with its weights. Put whole files ckpt-* back into '
        f'{folder / "checkpoints"} (those ending in .broken have wrong bytes). '
        'To learn anew from its episodes, move checkpoints and metrics.jsonl '
        'out of the logdir'
      )


class ExactProgress(Progress):
  """Progress of a run that is the same however often it is interrupted.

  With --deterministic and one environment: checkpoints are made between
  episodes only, and a resumed run deletes what is newer than its checkpoint,
  in replay and metrics.jsonl; it will be regenerated. Where other runs have
  added episodes since, all stays, and the run goes on from there.
  """

  exact = True
  _goes_back = False  # to what the checkpoint knows

  def portion(self):
    return dict(episodes=1)

  def save_if_due(self):
    pass

  def save_at_end(self):
    self.save()  # a longer run goes on as if it had not ended here
    self._learner.finish()

  def save_when_stopped(self):
    return ' what came after the last whole episode will be regenerated;'

  def _rewind(self, saved):
    names = episode_files.list_episodes(self._run.datadir)
    stamped = filter(episode_files.is_stamped, names)
    if 'newest' not in saved:
      self._run.say('Its checkpoint is of older code: all episodes stay.')
      return
    later = [name for name in stamped if name > saved['newest']]
    self._goes_back = saved['exact'] and all(map(episode_files.is_exact, later))
    if not self._goes_back:
      if later:
        self._run.say(f'{len(later)} episodes newer than its checkpoint stay.')
      return
    for name in later:
      (self._run.datadir / name).unlink()
    if self._run.logger.size() > saved['metrics_size']:
      self._run.logger.rewind(saved['metrics_size'])
    if later:
      self._run.say(f'{len(later)} episodes will be regenerated.')

  def _resumed(self, saved):
    if self._goes_back:
      self._learner.restore_unlogged(saved.get('sums', {}))
    else:
      super()._resumed(saved)


def receive(team, objects, seed):
  """Gives all processes the chief's weights, optimizers and schedules.

  Args:
    team: `distribute.Team`.
    objects: {name: variable, list of them, module, optimizer or generator}.
    seed: of the noise of acting, which differs between processes.
  """
  variables = []
  for name, item in objects.items():
    if isinstance(item, tf.Variable):
      variables.append(item)
    elif name != 'random':  # a list, a module or an optimizer
      variables += getattr(item, 'variables', item)
  team.broadcast(variables)
  if not team.chief:
    objects['random'].reset_from_seed(team.seed(seed + int(objects['step'])))
