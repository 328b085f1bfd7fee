"""Kinds of runs: what each collects, evaluates and learns, and its steps."""

import dataclasses
import os
import pathlib
import time
import typing

import cli
import configs
import distribute
import replay
import runfile
from logger import Logger


@dataclasses.dataclass
class Run:
  """What the parts of a run share."""

  config: cli.AttrDict
  team: distribute.Team
  stop: cli.StopSignal
  logger: Logger
  make_agent: typing.Callable | None = None  # `dreamer.Dreamer`
  function: typing.Callable | None = None  # makes custom environments
  # `Behavior.after_episode`
  after_episode: typing.Callable = lambda index, episode: {}
  recorded: bool = False  # whether its config.json is that of this process

  # What kinds of runs do.
  collects: typing.ClassVar = True
  evaluates: typing.ClassVar = True
  learns: typing.ClassVar = True
  LOOK: typing.ClassVar = 1.0  # seconds between looks for what others make

  @property
  def datadir(self):
    """Folder of the training episodes."""
    return self.config.logdir / 'episodes'

  @property
  def home(self):
    """Folder of its log and metrics."""
    return self.config.logdir

  @property
  def exact(self):
    """Whether it is the same however often it is interrupted."""
    alone = self.config.envs == self.team.workers == 1
    return self.config.deterministic and alone and not self.config.offline

  def steps(self):
    """Environment steps in the replay, of all processes."""
    return replay.count_steps(self.datadir, self.config, self.team.folders)

  def collected(self, acted):
    """Environment steps that count to --steps: those of whole episodes.

    Args:
      acted: steps that were acted; several processes, which have to end at
        once, count these.
    """
    return acted if self.team.workers > 1 else self.steps()

  def wait_for_other_process(self):
    """Until there is what another process brings."""

  def attach(self, learner):
    """Called when there is a learner."""

  def episode_ended(self, index, episode):
    """Called when environment `index` has ended an episode of training."""
    metrics = self.after_episode(index, episode)
    if metrics:
      self.logger.scalars(self.steps(), metrics)

  def say(self, line):
    self.logger.say(line)

  def wait_until(self, ready, line):
    """Until a function returns true; says `line` first if it does not yet."""
    if not ready():
      self.say(line)
    while not ready():
      self.stop.check()
      time.sleep(self.LOOK)


@dataclasses.dataclass
class OfflineRun(Run):
  """A run on the episodes of a folder, whose steps follow from its updates."""

  updates: typing.Callable = lambda: 0
  collects: typing.ClassVar = False

  @property
  def datadir(self):
    folder = pathlib.Path(self.config.offline)
    inner = folder / 'episodes'  # of a logdir
    return inner if os.path.isdir(inner) else folder

  def steps(self):
    return configs.steps_of(self.config, self.updates())

  def attach(self, learner):
    self.updates = lambda: learner.updates

  @property
  def total(self):
    """Updates of the whole run."""
    c = self.config
    return c.updates or configs.updates_of(c, c.steps)


@dataclasses.dataclass
class ActorRun(Run):
  """One that acts beside one that learns (`--role act`)."""

  learns: typing.ClassVar = False

  @property
  def home(self):
    return self.config.logdir / runfile.ACT


@dataclasses.dataclass
class LearnerRun(Run):
  """One that learns beside one that acts (`--role learn`)."""

  collects: typing.ClassVar = False
  evaluates: typing.ClassVar = False
  _counted: tuple = (0.0, 0)  # when, and how many

  def steps(self):
    if time.monotonic() > self._counted[0] + self.LOOK:
      self._counted = time.monotonic(), super().steps()
    return self._counted[1]

  def wait_for_other_process(self):
    """Until the prefill is there."""
    self.wait_until(
      self._prefilled,
      f'Waiting for {self._prefill()} environment steps: the same command with '
      '--role act makes them.',
    )

  def _prefill(self):
    """Environment steps; the process that acts may have other flags."""
    actor = runfile.load_actor(self.config)
    return max(1, (actor or self.config).prefill)

  def _prefilled(self):
    logdir, actor = self.config.logdir, runfile.load_actor(self.config)
    known = actor or runfile.has_checkpoint(logdir)
    return known and self.steps() >= self._prefill()


def kind_of_run(config):
  """The class of a run."""
  if config.offline:
    return OfflineRun
  return dict(both=Run, act=ActorRun, learn=LearnerRun)[config.role]
