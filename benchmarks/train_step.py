"""What a training step costs, and where the time goes.

Run: python benchmarks/train_step.py [--size 64x96] [--batch 2] [--threads 2]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from student.config import build_config
from student.tinyhd import TinyHD

PARTS = {
    "convolutions, backward": ("aten::convolution_backward",),
    "convolutions, forward": ("aten::mkldnn_convolution", "aten::slow_conv3d_forward"),
    "batch norms": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    "copies": ("aten::copy_",),
}


def main() -> None:
    """Time steps on random clips and profile one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="tinyhd-s-rc4")
    parser.add_argument("--size", default="64x96")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    height, width = map(int, options.size.split("x"))
    model = TinyHD(build_config(options.variant, height=height, width=width)).train()
    clips = torch.randn(options.batch, 3, 16, height, width)

    def step() -> None:
        output = model(clips)
        loss = output.saliency_logits.mean() + output.map_logits["d1"].mean()
        torch.autograd.backward(loss)

    step()
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times = {row.key: row.self_cpu_time_total for row in profiler.key_averages()}
    total = sum(times.values())
    print(
        f"{options.variant} {options.size}, batch {options.batch}, {options.threads} threads: "
        f"median {statistics.median(seconds):.3f} s per step "
        f"(fastest {min(seconds):.3f}, slowest {max(seconds):.3f})"
    )
    for name, keys in PARTS.items():
        print(f"  {name}: {sum(times.get(key, 0) for key in keys) / total:.0%}")


if __name__ == "__main__":
    main()
