"""How fast the student is: plain layers in PyTorch against ours in every runtime.

All forms of a network take turns in one run; medians count. The plain layers are
benchmarks/plain.py. "limit" is the network's multiply-accumulates at 29 GMAC/s, which a dense
network reached on two cores of an AVX2 machine.

Run: python benchmarks/student.py [--rounds 9] [--threads 2] [--training] [--streaming]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.plain import PlainTinyHD
from stores.memory import keep_freed_memory
from student.config import VARIANTS, TinyHDConfig
from student.cost import computed_macs, cost_of
from student.export import export_onnx
from student.reference import export_weights
from student.runtimes import OnnxRuntime, OpenVino
from student.streaming import StreamingStudent
from student.tinyhd import TinyHD

GMACS_PER_SECOND = 29e9
DEFAULT_VARIANTS = ("tinyhd-s-rc4", "tinyhd-m-rc4", "tinyhd-s", "tinyhd-m")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="clips of a training step")
    parser.add_argument("--training", action="store_true", help="time training steps instead")
    parser.add_argument("--streaming", action="store_true", help="time frame after frame instead")
    parser.add_argument("--keep-memory", action="store_true", help="as tinyhd predict does")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_freed_memory()
    print(
        f"{_processor()}, {options.threads} threads, torch {torch.__version__}, median of "
        f"{options.rounds} interleaved rounds{', freed memory kept' if kept else ''}"
    )
    compare = (
        _compare_training
        if options.training
        else _compare_streaming
        if options.streaming
        else _compare_inference
    )
    for variant in options.variants:
        compare(variant, VARIANTS[variant], options)


def _compare_inference(variant: str, config: TinyHDConfig, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = TinyHD(config).eval()
    plain, ours = _plain(model), model.for_inference()
    clip = torch.randn(1, 3, 16, config.height, config.width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.onnx"
        export_onnx(model, file)
        onnxruntime = OnnxRuntime(file, threads=options.threads)
        openvino = OpenVino(file, threads=options.threads)
    forms: dict[str, Callable[[], object]] = {
        "plain layers, torch": lambda: plain(clip)[0],
        "ours, torch": lambda: ours(clip).saliency,
        "ours, onnxruntime": lambda: onnxruntime.predict(clip.numpy()),
        "ours, openvino": lambda: openvino.predict(clip.numpy()),
    }
    with torch.inference_mode():
        seconds = _take_turns(forms, options.rounds)
    cost = cost_of(config)
    limit = cost.macs / GMACS_PER_SECOND
    computed = computed_macs(ours, clip)
    print(
        f"\n{variant}: {cost.macs / 1e9:.2f} GMAC per clip, limit {limit:.3f} s; "
        f"ours computes {computed / 1e9:.2f} GMAC in torch ({computed / cost.macs - 1:+.1%})"
    )
    base = seconds["plain layers, torch"]
    for name, time_ in seconds.items():
        print(
            f"  {name:<20} {time_:.3f} s per clip, {base / time_:5.2f} times as fast, "
            f"{time_ / limit:5.2f} x limit, {cost.output_frames / time_:6.1f} maps/s"
        )


def _compare_training(variant: str, config: TinyHDConfig, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = TinyHD(config).train()
    plain = _plain(model)
    plain.training = True
    clips = torch.randn(options.batch, 3, 16, config.height, config.width)
    for key, tensor in plain.weights.items():
        if tensor.is_floating_point() and "running" not in key:
            tensor.requires_grad_()

    def step_plain() -> None:
        saliency, maps = plain(clips)
        _backward(saliency, maps)

    def step_ours() -> None:
        output = model(clips)
        _backward(output.saliency, output.maps)

    seconds = _take_turns({"plain layers": step_plain, "ours": step_ours}, options.rounds)
    base = seconds["plain layers"]
    print(f"\n{variant}: training step (forward and backward) of {options.batch} clips")
    for name, time_ in seconds.items():
        print(f"  {name:<20} {time_:.3f} s per step, {base / time_:5.2f} times as fast")


def _compare_streaming(variant: str, config: TinyHDConfig, options: argparse.Namespace) -> None:
    if config.is_multi:
        return
    torch.manual_seed(0)
    model = TinyHD(config).for_inference()
    student = StreamingStudent(model)
    video = torch.randn(1, 3, 17 + options.rounds, config.height, config.width)
    clips = [video[:, :, start : start + 16].contiguous() for start in range(options.rounds + 2)]
    for start in (0, 1):
        student.see(clips[start], start)
    numbers = {name: iter(range(1, options.rounds + 2)) for name in ("whole", "shared")}

    def see_whole() -> None:
        model(clips[next(numbers["whole"])])

    def see_shared() -> None:
        start = next(numbers["shared"])
        student.see(clips[start], start)

    with torch.inference_mode():
        seconds = _take_turns({"whole clips": see_whole, "shared": see_shared}, options.rounds)
    base = seconds["whole clips"]
    print(f"\n{variant}: a map for each frame of a video, clips one frame apart")
    for name, time_ in seconds.items():
        print(f"  {name:<20} {time_:.3f} s per frame, {base / time_:5.2f} times as fast")


def _backward(saliency: Tensor, maps: Mapping[str, Tensor]) -> None:
    torch.autograd.backward(saliency.mean() + sum(m.mean() for m in maps.values()))


def _plain(model: TinyHD) -> PlainTinyHD:
    config = model.config
    return PlainTinyHD(
        export_weights(model),
        config.channel_reduction,
        config.decoders,
        config.single,
        config.output_frames,
        config.force_multi,
        config.d1_last,
    )


def _take_turns(forms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each form, after one call that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else platform.processor()} ({vectors})"


if __name__ == "__main__":
    main()
