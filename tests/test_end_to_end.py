"""A real teacher through Ray into a store, and a student that learns from what is there."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import av
import pytest
import torch
from click.testing import CliRunner

from cli import cli
from stores.targets import TargetStore
from student.agreement import compare_with_teacher
from student.checkpoints import load_model
from student.clips import ClipContent, ClipDataset, load_batches
from student.config import build_config
from student.pools import ClipKey, find_pools
from student.recipe import Sampling
from student.tinyhd import TinyHD

FRAMES = 60
SIZE = (32, 64)
HOLDOUT = 0.4  # clips share no frame with those that are trained on


def tinyhd(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def cut(video: Path, frames: int, out: Path) -> Path:
    """Keep the first frames of a video, without loss."""
    with av.open(str(video)) as source, av.open(str(out), "w") as target:
        (pictures,) = source.streams.video
        stream = target.add_stream("ffv1", rate=pictures.average_rate)
        stream.height, stream.width, stream.pix_fmt = pictures.height, pictures.width, "yuv420p"
        for frame in islice(source.decode(pictures), frames):
            frame.pts = None
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return out


@pytest.mark.shared
@pytest.mark.usefixtures("local_ray")
def test_a_student_learns_from_a_store_that_a_published_network_filled(
    shared: Path, tmp_path: Path
) -> None:
    video = cut(shared / "video" / "0068.AVI", FRAMES, tmp_path / "0068.avi")
    published = shared / "weights" / "d123m_rc4_rc1T.pth"
    weights, store, run = (tmp_path / name for name in ("m.pt", "targets.zarr", "run"))
    size = "x".join(map(str, SIZE))

    tinyhd("weights", "import", published, "--variant", "tinyhd-m-rc4", "--out", weights)
    distill = ["distill", video, "--store", store, "--teacher", "assistant", "--weights", weights]
    assert f"{FRAMES} frames" in tinyhd(*distill, "--with-frames", size, "--shard-frames", 32)
    learn = ["train", "--store", store, "--out", run, "--size", size, "--holdout", HOLDOUT]
    learn += ["--epochs", 25, "--clips-per-video", 4, "--device", "cpu", "--seed", 0]

    refused = CliRunner().invoke(cli, [str(argument) for argument in learn])
    assert refused.exit_code == 1
    assert "0 hierarchical maps" in refused.output
    assert "--hierarchical-weight 0" in refused.output
    assert not run.exists()

    tinyhd(*learn, "--hierarchical-weight", 0)

    labels = TargetStore.open(store).label_set()
    assert labels.request.provenance["weights_sha256"]
    content = ClipContent(height=SIZE[0], width=SIZE[1], labels=(labels.name,))
    dataset = ClipDataset(str(store), content)
    sampling = Sampling(holdout=HOLDOUT, holdout_of="frames")
    pools = find_pools(labels.store.videos, [labels], sampling, target_frames=1)
    spans = pools.validation.items()
    kept = [ClipKey(video, last) for video, ranges in spans for span in ranges for last in span]
    assert len(kept) == 24 - 15
    torch.manual_seed(0)
    start = TinyHD(build_config("tinyhd-s-rc4", height=SIZE[0], width=SIZE[1])).eval()
    before, after = (
        compare_with_teacher(model, load_batches(dataset, kept, batch_size=4), labels.layout)
        for model in (start, load_model(run / "last.pt"))
    )
    assert after.cc > before.cc + 0.3, (before, after)
    assert after.kl < before.kl, (before, after)
