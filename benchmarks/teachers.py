"""What a teacher's window costs, plain and shared: all forms take turns in one run.

Run: python benchmarks/teachers.py [NAME ...] [--batch 8] [--rounds 5] [--threads 2]
     python benchmarks/teachers.py --device cuda --precision bfloat16 --compile
     python benchmarks/teachers.py vinet --size 32x32 --batch 256    (arithmetic in long batches)
     python benchmarks/teachers.py --taps

Weights are random. Windows follow each other by one frame, as in a video. Each row adds something
to the one before it:

- one window at a time: the network as it is written down, default memory layout, norms apart
- in a batch
- channels last: numbers of one pixel lie together
- norms folded: worked into the weights of the convolution before them
- freed memory kept: see ``stores/memory.py``
- windows shared: see ``teachers/shared.py``; the row that ``tinyhd distill`` is at
- compiled: by ``torch.compile``, if asked for

The arithmetic is that of PyTorch's own counter, padded taps included.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package teachers.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stores.memory import keep_freed_memory
from teachers import s3d, shared, vinet_s
from teachers.base import DTYPES
from teachers.network import NetworkTeacher
from teachers.registry import build
from teachers.shared import Features, convolve

NAMES = ("hd2s", "tased", "vinet", "vinet-s", "vinet-a", "unisal")


@dataclass(frozen=True)
class Form:
    """A way to label the same frames."""

    name: str
    batched: bool = True
    channels_last: bool = True
    folded: bool = True
    kept: bool = True
    shared: bool = False
    compiled: bool = False


PLAIN = Form("one window at a time", batched=False, channels_last=False, folded=False, kept=False)
BATCHED = replace(PLAIN, name="in a batch", batched=True)
LAID_OUT = replace(BATCHED, name="channels last", channels_last=True)
FOLDED = replace(LAID_OUT, name="norms folded", folded=True)
KEPT = replace(FOLDED, name="freed memory kept", kept=True)
SHARED = replace(KEPT, name="windows shared", shared=True)
FORMS = (PLAIN, BATCHED, LAID_OUT, FOLDED, KEPT, SHARED)
COMPILED = (
    replace(KEPT, name="compiled", compiled=True),
    replace(SHARED, name="windows shared, compiled", compiled=True),
)


def main() -> None:
    """Print a table for each teacher asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all if not given")
    parser.add_argument("--batch", type=int, help="windows at once; the teacher's own if not given")
    parser.add_argument("--size", help="HxW; the published one if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--taps", action="store_true", help="of kernels that meet padding alone")
    parser.add_argument("--child", choices=["given back", "kept"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.names[0], options)))
        return
    if options.taps:
        skip_taps(options)
        return
    print(f"{options.precision} on {device_name(options)}, median of {options.rounds} rounds")
    print(f"a dense convolution alone: {dense_rate(options):.0f} GMAC/s")
    for name in options.names or NAMES:
        show(name, options)


def device_name(options: argparse.Namespace) -> str:
    """Return what the teachers run on, in words."""
    if options.device == "cpu":
        return f"the CPU, {options.threads} threads"
    return torch.cuda.get_device_name(options.device)


def dense_rate(options: argparse.Namespace) -> float:
    """Return how many GMAC a second convolutions can reach: one that has much to do on little."""
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.precision]
    features = torch.randn(4, 256, 8, 28, 48, device=options.device, dtype=dtype)
    weight = torch.randn(256, 256, 3, 3, 3, device=options.device, dtype=dtype)
    features = features.contiguous(memory_format=torch.channels_last_3d)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        F.conv3d(features, weight, padding=1)
        if options.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return features[:, 0].numel() * weight.numel() / min(seconds) / 1e9


def skip_taps(options: argparse.Namespace) -> None:
    """Time HD2S's last temporal reductions with and without taps that only meet padding."""
    torch.set_num_threads(options.threads)
    for channels, height, width in ((1024, 6, 8), (832, 6, 8), (480, 12, 16), (192, 24, 32)):
        features = torch.randn(8, channels, 2, height, width, device=options.device)
        weight = torch.randn(channels, channels, 3, 1, 1, device=options.device)
        features = features.contiguous(memory_format=torch.channels_last_3d)
        kernels = {"padded": (weight, 1), "without such taps": (weight[:, :, 1:], 0)}
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(4 * options.rounds):
            for name, (kernel, padding) in kernels.items():
                kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
                began = time.perf_counter()
                F.conv3d(features, kernel, None, (2, 1, 1), (padding, 0, 0))
                if options.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
        told = (f"{name} {1e3 * statistics.median(t):.2f} ms" for name, t in times.items())
        print(f"{channels} channels, 8 windows: {', '.join(told)}")


def show(name: str, options: argparse.Namespace) -> None:
    """Measure a teacher in processes that keep what they free and in others, and print it."""
    times: dict[str, list[float]] = {}
    told: dict[str, Any] = {}
    for _ in range(options.rounds):
        for child in ("given back", "kept"):
            command = [sys.executable, __file__, name, "--child", child, "--rounds", "1"]
            for option in ("batch", "size", "threads", "device", "precision"):
                if getattr(options, option) is not None:
                    command += [f"--{option}", str(getattr(options, option))]
            command += ["--compile"] if options.compile else []
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            told |= found["told"]
            for form, seconds in found["times"].items():
                times.setdefault(form, []).extend(seconds)
    print(f"\n{name} at {told['size']}, {told['batch']} windows in a batch")
    medians = {form: statistics.median(seconds) for form, seconds in times.items()}
    first = medians[PLAIN.name]
    for form, median in medians.items():
        known = f", {told[form]:.4g} GMAC per window" if form in told else ""
        print(
            f"  {form:26} {1e3 * median:7.1f} ms per window, {1 / median:6.2f} windows/s, "
            f"{first / median:.2f} times the first row{known}"
        )


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the forms that a process can have, turn by turn."""
    keeps = options.child == "kept"
    if keeps:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    height, _, width = (options.size or "").partition("x")
    size = (int(height), int(width)) if options.size else None
    teacher = build(name, size=size, device=options.device, precision=options.precision)
    assert isinstance(teacher, NetworkTeacher)
    batch = options.batch or teacher.spec.batch
    forms = [form for form in FORMS + COMPILED * options.compile if form.kept == keeps]
    forms = [form for form in forms if teacher.shares_windows or not form.shared]
    can_share, logits = teacher.shares_windows, teacher.logits
    compiled = torch.compile(logits) if options.compile else logits
    layout = teacher.spec.layout
    told = {"size": f"{layout.height}x{layout.width}", "batch": batch}
    start = 0 if teacher.is_recurrent else 4 * teacher.spec.window  # behind the head
    num_frames = start + batch + 2 * teacher.spec.window
    context = teacher.context_of(range(start, start + batch), num_frames)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (len(context), layout.height, layout.width, 3), generator=rng, dtype=torch.uint8
    )
    frames = teacher.prepare(pixels.numpy())

    def label(form: Form) -> float:
        teacher.reset()
        step = batch if form.batched or teacher.is_recurrent else 1
        spans = [range(at, at + step) for at in range(start, start + batch, step)]
        began = time.perf_counter()
        for span in spans:
            teacher.label(frames, first=context.start, span=span, num_frames=num_frames)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / batch

    times: dict[str, list[float]] = {form.name: [] for form in forms}
    for turn in range(options.rounds + 1):
        for form in forms:
            teacher.shares_windows = can_share and form.shared
            teacher.logits = compiled if form.compiled else logits  # type: ignore[method-assign]
            with written_as(form, teacher):
                if turn == 0 and form in (KEPT, SHARED):
                    # The counter does not know oneDNN's convolution by its name.
                    plain = patch.object(shared, "HAS_ONE_DNN", new=False)
                    with plain, FlopCounterMode(display=False) as counter:
                        label(form)
                    told[form.name] = counter.get_total_flops() / 2e9 / batch
                seconds = label(form)
            if turn:  # the first one warms up
                times[form.name].append(seconds)
    return {"times": times, "told": told}


@contextmanager
def written_as(form: Form, teacher: NetworkTeacher) -> Iterator[None]:
    """Undo what a form has not."""

    def by_default(tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def apart(
        features: Features, conv: nn.Conv3d, norm: nn.BatchNorm3d, *, relu: bool = True
    ) -> Features:
        convolved = convolve(features, conv, conv.weight, conv.bias)
        assert isinstance(convolved, Tensor)
        return F.relu(norm(convolved)) if relu else norm(convolved)

    undone: list[Any] = []
    if not form.channels_last:
        undone.append(patch.object(teacher, "lay_out", by_default))
        undone.append(patch.object(shared, "HAS_ONE_DNN", new=False))  # as PyTorch chooses
    if not form.folded:
        undone += [patch.object(module, "convolve_norm", apart) for module in (s3d, vinet_s)]
    for change in undone:
        change.start()
    for parameter in teacher.network.parameters():
        parameter.data = teacher.lay_out(parameter.data)
    try:
        yield
    finally:
        for change in undone:
            change.stop()


if __name__ == "__main__":
    main()
