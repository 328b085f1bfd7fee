"""Pictures of a page: what agents do and dream, in files that browsers take.

Videos are MP4 (H.264) where imageio-ffmpeg is installed, else animated WebP,
which is larger at equal looks: 150 images of a pole, 25 kB beside 9 kB.

`evaluate.py` renders in a process of its own, so nothing here has TensorFlow.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import PIL.ImageSequence
import tqdm

import cli
import file_io
import runfile

ROOT = pathlib.Path(__file__).parent
LIMIT = 200_000  # bytes of a picture
FRAMES = 600  # images of a video that are read
FASTEST = 60  # images a second
EPISODES = 4  # that are rendered of a run: as many as evaluate.py draws
SMALL = 200  # pixels; lower videos are doubled, as H.264 halves the colors'
QUALITIES = dict(mp4=(26, 32, 38), webp=(75, 50, 25))  # the best first
VIDEOS = ('.gif', '.mp4')
STILLS = ('.png', '.webp', '.jpg')
# What follows the task's name in the name of a file, and what it then shows.
ENDINGS = {
  '': 'behavior',
  '-behavior': 'behavior',
  '-openl': 'dream',
  '-prediction': 'dream',
}


@dataclasses.dataclass
class Picture:
  """A video with a first image to show before it plays, or a picture.

  Attributes:
    kind: one of `WORDS`.
    task: its name.
    text: what it shows.
    file, poster: names in the site; a picture has no poster.
    width, height: pixels.
    source: number of the checkpoint that was rendered; 0: none was.
  """

  kind: str
  task: str
  text: str
  file: str
  poster: str
  width: int
  height: int
  source: int = 0

  @property
  def video(self):
    return self.file.endswith('.mp4')


def digest(*parts):
  """Ten characters that stand for texts and bytes."""
  data = [
    p if isinstance(p, bytes) else str(p).encode('utf-8', 'surrogatepass')
    for p in parts
  ]
  return hashlib.sha256(b'\0'.join(data)).hexdigest()[:10]


def slug(name):
  """A file's name for any name: as it is where that is safe, else unique."""
  if re.fullmatch(r'[a-z0-9_-]{1,80}', name):
    return name
  plain = re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:80].strip('-')
  return f'{plain or "name"}-{digest(name)}'


# --- Reading and writing ----------------------------------------------------


def read(data, extension):
  """A video as uint8 [T, H, W, 3] and its images a second."""
  if extension == '.gif':
    return _read_gif(data)
  images = imageio.imiter(data, extension=extension)
  frames = [_color(x) for x in itertools.islice(images, FRAMES)]
  fps = imageio.immeta(data, extension=extension).get('fps', 20)
  return np.stack(frames), min(max(fps, 1), FASTEST)


def _read_gif(data):
  """As `read`, of images that are shown for different times.

  Equal images that follow each other are one that is shown for longer.
  """
  images = PIL.ImageSequence.Iterator(PIL.Image.open(io.BytesIO(data)))
  frames, times = [], []
  for image in itertools.islice(images, FRAMES):
    frames.append(np.asarray(image.convert('RGB')))
    times.append(image.info.get('duration') or 50)  # milliseconds
  unit = math.gcd(*map(round, times))
  if unit < 1000 / FASTEST:  # of images that are shown for 30, 30 and 40 ms
    unit = min(times)
  counts = [min(round(time / unit), FRAMES) for time in times]
  index = np.repeat(np.arange(len(frames)), counts)[:FRAMES]
  return np.stack(frames)[index], min(max(1000 / unit, 1), FASTEST)


def _color(image):
  """uint8 [H, W, 3] of a gray, colored or transparent image."""
  image = np.asarray(image)
  image = (image >> 8 if image.dtype == np.uint16 else image).astype(np.uint8)
  if image.ndim == 2:
    image = image[..., None]
  if image.shape[2] < 3:  # gray, perhaps with alpha
    image = image[..., :1].repeat(3, 2)
  return image[..., :3]


def encode(frames, fps):
  """(extension, bytes) of a video: the best that is within the limit.

  Args:
    frames: uint8 [T, H, W, 3].
    fps: images a second.
  """
  if frames.shape[1] <= SMALL:
    frames = frames.repeat(2, 1).repeat(2, 2)
  kind = 'mp4' if has_ffmpeg() else 'webp'
  while True:
    for quality in QUALITIES[kind]:
      data = _ENCODERS[kind](frames, fps, quality)
      if len(data) <= LIMIT:
        return f'.{kind}', data
    if len(frames) > 20:
      frames = frames[: len(frames) // 2]
    else:
      frames = frames[:, ::2, ::2]


@functools.cache
def has_ffmpeg():
  """Whether imageio-ffmpeg is there, with a program that makes H.264."""
  try:
    import imageio_ffmpeg  # noqa: F401

    return bool(_mp4(np.zeros([2, 64, 64, 3], np.uint8), 20, 30))
  except (ImportError, RuntimeError, OSError, ValueError):
    return False


def encode_mp4(frames, **options):
  """Bytes of a video of uint8 frames [T, H, W, 3]; ValueError if refused."""
  data = b''
  with contextlib.suppress(OSError):  # a pipe to ffmpeg that has ended
    # Bytes, as imageio finds more than a file's name in some names.
    data = imageio.imwrite(
      '<bytes>', frames, extension='.mp4', plugin='FFMPEG', **options
    )
  if not data:
    size = ' by '.join(map(str, frames.shape[1:3]))
    raise ValueError(f'ffmpeg makes no video of images of {size} pixels')
  return data


def _mp4(frames, fps, quality):
  """As H.264, which has the colors of two by two pixels: an odd row goes."""
  height, width = (size // 2 * 2 or size for size in frames.shape[1:3])
  return encode_mp4(
    frames[:, :height, :width],
    fps=fps,
    codec='libx264',
    quality=None,
    macro_block_size=2,
    output_params=f'-crf {quality} -preset slow -movflags +faststart'.split(),
  )


def _webp(frames, fps, quality):
  return imageio.imwrite(
    '<bytes>',
    frames,
    extension='.webp',
    quality=quality,
    duration=round(1000 / fps),
    loop=0,
  )


_ENCODERS = dict(mp4=_mp4, webp=_webp)


def encode_still(image):
  """A picture uint8 [H, W, 3] as WebP within the limit."""
  while True:
    for quality in (90, *QUALITIES['webp']):
      data = imageio.imwrite(
        '<bytes>', image, extension='.webp', quality=quality
      )
      if len(data) <= LIMIT:
        return data
    image = image[::2, ::2]


# --- The pictures of a site -------------------------------------------------


class Gallery:
  """Makes pictures, and knows those that a site has already.

  Args:
    site: a `report.Site`, whose record has a dictionary `media`.
    failed: what gave no pictures, which it fills: {key of a run: checkpoint},
      {path of a picture: True}.
  """

  def __init__(self, site, failed):
    self._site = site
    self._failed = failed
    self._known = site.record['media']  # as it is filled, so is the record
    self.media = {}  # those in use, for the record

  def given(self, folder, tasks):
    """Pictures in a folder, by the names of the files, as docs/usage.md says.

    Args:
      folder: of the pictures.
      tasks: names.
    """
    names = collections.defaultdict(list)
    for task in tasks:
      for name in {task, task.partition('_')[2]}:
        for ending, kind in ENDINGS.items():
          names[name + ending].append((task, kind))
    for path in sorted(folder.iterdir()):
      if path.suffix in VIDEOS + STILLS:
        for task, kind in names.get(path.stem, ()):
          yield from self._given(path, task, kind)

  def _given(self, path, task, kind):
    try:
      data = path.read_bytes()
      key = digest(kind, task, data)
      if not self._use(key):
        picture = self._import(path, data, task, kind, key)
        self._known[key] = [dataclasses.asdict(picture)]
      yield from self._use(key)
    except Exception as error:  # Pillow and ffmpeg raise all kinds
      if path not in self._failed:
        reason = str(error).partition('\n')[0]
        cli.warn(f'{path} is left out: {reason}')
        self._failed[path] = True

  def _import(self, path, data, task, kind, key):
    if path.suffix in STILLS:
      image = PIL.Image.open(io.BytesIO(data))
      deep = image.mode.startswith('I')  # 16 bits
      image = _color(image if deep else image.convert('RGB'))
      return self._still(key, kind, task, WORDS[kind], image)
    frames, fps = read(data, path.suffix)
    return self._video(key, kind, task, WORDS[kind], frames, fps)

  def rendered(self, groups):
    """Pictures that were rendered earlier, of one run of each group.

    Args:
      groups: lists of runs, the best first.
    """
    return [p for runs in groups for p in self._rendered(runs)]

  def _rendered(self, runs):
    found = (self._use(run_key(run)) for run in runs)
    return next(filter(None, found), [])

  def render(self, groups):
    """The same, of the best run that has a checkpoint, and of its newest."""
    chosen = [next(filter(checkpoint, runs), None) for runs in groups]
    chosen = [run for run in chosen if run]
    due = [run for run in chosen if not self._current(run)]
    failed = self._failed
    due = [x for x in due if failed.get(run_key(x)) != checkpoint(x)]
    with tqdm.tqdm(
      total=len(due) * EPISODES, unit=' episodes', disable=not due
    ) as bar:
      for run in due:
        pictures = self._evaluate(run, bar)
        if pictures:
          self._known[run_key(run)] = list(map(dataclasses.asdict, pictures))
        else:
          failed[run_key(run)] = checkpoint(run)
    return self.rendered(groups)

  def _current(self, run):
    known = self._use(run_key(run))
    return known and known[0].source == checkpoint(run)

  def _use(self, key):
    """Pictures of the record, for the next; [] if there are none."""
    with contextlib.suppress(KeyError, TypeError):
      pictures = [Picture(**each) for each in self._known[key]]
      if self._site.has(_files(pictures)):
        self.media[key] = self._known[key]
        return pictures
    return []

  def files(self):
    """Names of all files in use."""
    return _files(Picture(**p) for group in self.media.values() for p in group)

  def _evaluate(self, run, bar):
    number = checkpoint(run)
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      if not _run_evaluation(run, folder, bar):
        return []
      key = digest(run_key(run), number)
      pictures = list(self._pictures_of(run, folder, key))
    return [dataclasses.replace(p, source=number) for p in pictures]

  def _pictures_of(self, run, folder, key):
    """The best and the worst episode, and predictions."""
    returns = json.loads((folder / 'returns.json').read_text())['returns']
    by = f'{run.method}, seed {run.seed}'
    behavior = folder / 'behavior.gif'
    if behavior.exists():  # else the task shows no images
      frames, fps = read(behavior.read_bytes(), '.gif')
      episodes = np.split(frames, EPISODES, 2)
      places = dict(best=np.argmax(returns), worst=np.argmin(returns))
      for kind, index in places.items():
        text = f'{WORDS[kind]}, return {returns[index]:.4g} ({by})'
        yield self._video(key, kind, run.task, text, episodes[index], fps)
    text = f'{WORDS["dream"]} ({by})'
    video = folder / 'prediction.gif'
    if video.exists():
      yield self._video(
        key, 'dream', run.task, text, *read(video.read_bytes(), '.gif')
      )
    names = 'prediction_*.png' if video.exists() else 'prediction*.png'
    for path in sorted(folder.glob(names)):
      image = _color(imageio.imread(path))
      name = path.stem.removeprefix('prediction').strip('_') or 'reward'
      text = f'True and imagined {name} ({by})'
      yield self._still(f'{key}-{name}', 'dream', run.task, text, image)

  def _video(self, key, kind, task, text, frames, fps):
    extension, data = encode(frames, fps)
    poster = ''
    if extension == '.mp4':
      poster = self._write(key, kind, task, '.webp', encode_still(frames[0]))
    file = self._write(key, kind, task, extension, data)
    height, width = frames.shape[1:3]
    return Picture(kind, task, text, file, poster, width, height)

  def _still(self, key, kind, task, text, image):
    file = self._write(key, kind, task, '.webp', encode_still(image))
    height, width = image.shape[:2]
    return Picture(kind, task, text, file, '', width, height)

  def _write(self, key, kind, task, extension, data):
    name = f'media/{slug(task)}-{kind}-{key}{extension}'
    self._site.write({name: data})
    return name


WORDS = dict(
  behavior='An episode',
  best=f'Best of {EPISODES} episodes',
  worst=f'Worst of {EPISODES} episodes',
  dream='Truth, imagined from 5 images and the actions, difference',
)


def checkpoint(run):
  """Updates before a run's newest checkpoint; 0 without one to be read."""
  with contextlib.suppress(PermissionError):
    numbers = runfile.checkpoint_numbers(run.folder / 'checkpoints')
    return max(numbers, default=0)
  return 0


def run_key(run):
  """Of a run: a logdir that is made again has another one."""
  record = file_io.read_json(run.folder / 'config.json')
  return digest(run.folder, record.get('started'))


def _files(pictures):
  return [name for p in pictures for name in (p.file, p.poster) if name]


def _run_evaluation(run, folder, bar):
  """Runs evaluate.py; False, with a warning, where that fails."""
  # fmt: off
  command = [
    sys.executable, ROOT / 'evaluate.py', '--logdir', run.folder,
    '--episodes', str(EPISODES), '--outdir', folder,
    '--json', folder / 'returns.json',
  ]
  # fmt: on
  last = collections.deque(maxlen=1)
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors='replace',
  )
  with process:
    try:
      for line in process.stdout:
        last.append(line.strip())
        bar.update(line.startswith('Episode '))
    except BaseException:  # such as Ctrl-C
      process.kill()
      raise
  if process.returncode:
    reason = ' '.join(last).removeprefix('evaluate.py: error: ')
    cli.warn(f'no videos of {run.folder}: {reason}')
  return not process.returncode
