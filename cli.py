"""Commands: parse, call, report."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import click

# Ray, torch and zarr load only when a command runs, so that --help answers at once.

TEACHER_NAMES = (*("pqft", "hd2s", "tased", "vinet", "vinet-s", "vinet-a", "unisal", "assistant"),)
VARIANT_NAMES = (
    *("tinyhd-s", "tinyhd-s-rc2", "tinyhd-s-rc4"),
    *("tinyhd-m", "tinyhd-m-rc2", "tinyhd-m-rc4"),
)
RUNTIME_NAMES = ("torch", "onnxruntime", "openvino")
PUBLISHED_LICENCES = {
    "tinyhd-s-rc4": "published; ask its authors for a licence",
    "tinyhd-m-rc4": "published; ask its authors for a licence",
}
PROTOCOL_NAMES = ("dhf1k", "tinyhd", "pysaliency")
MEASURE_NAMES = (*("auc_judd", "auc_borji", "auc_shuffled", "nss", "cc", "sim", "kld", "ig"),)
DATASET_KINDS = ("dhf1k", "hollywood2", "ucf", "kinetics", "plain")
EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130


class Size(click.ParamType[tuple[int, int]]):
    """Height and width in pixels, written 192x256."""

    name = "HEIGHTxWIDTH"

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[int, int]:
        """Parse ``value``; a pair passes through."""
        if isinstance(value, tuple):
            return value
        height, _, width = str(value).partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, such as 192x256", param, ctx)
        return int(height), int(width)


class StorePlace(click.ParamType[str]):
    """A folder, or a URL of an object store."""

    name = "PATH|URL"

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str:
        """Return ``value`` as it is: what lies there is seen when it is opened."""
        return str(value)


class Commands(click.Group):
    """A group that shows a user's mistakes as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to continue", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own; so is a reader of the output that has gone
        except Exception as error:  # sorted below: the user's are shown, ours raised again
            from stores.errors import TinyHDError

            if isinstance(error, MemoryError):
                error = TinyHDError(f"there is not enough memory: {error}")
            if not isinstance(error, TinyHDError | ValueError | OSError):
                raise  # our mistake, not the user's
            logging.getLogger(__name__).debug("where it happened:", exc_info=True)
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="tinyhd", message="%(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log more, and where an error happened.")
def cli(*, verbose: bool) -> None:
    """Distil video saliency: label videos with a teacher, train TinyHD students from the labels."""
    _set_up_logging(logging.DEBUG if verbose else logging.INFO)


def _read_pairs(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in given]
    if odd := [name for name, equals, _ in pairs if not (name and equals)]:
        raise click.UsageError(f"--teacher-option takes NAME=VALUE, got {odd[0]!r}")
    return {name: value for name, _, value in pairs}


TEACHER_OPTION = click.option(
    "--teacher-option",
    "teacher_options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_read_pairs,
    help="What else the teacher takes, e.g. head_mode=released for hd2s.",
)


SPLIT_OPTION = click.option(
    "--split", help="Take this split of a data set alone, e.g. val.  [default: all videos]"
)


@cli.command("distill")
@click.argument("videos", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--videos-from",
    "lists",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="List of videos: a path in each line, or a .csv with columns path and id.",
)
@SPLIT_OPTION
@click.option(
    "--teacher",
    required=True,
    help=f"Who labels: {', '.join(TEACHER_NAMES)}, or your own as package.module:factory.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The teacher's weights, if it has any.",
)
@TEACHER_OPTION
@click.option("--store", type=StorePlace(), required=True, help="Store to fill; made if needed.")
@click.option("--size", type=Size(), help="Frames fed to the teacher.  [default: as published]")
@click.option("--with-frames", type=Size(), help="Keep the frames too, at a student's size.")
@click.option("--actors", type=click.IntRange(min=1), help="Workers.  [default: what fits]")
@click.option("--cpus-per-actor", type=click.IntRange(min=1), default=1, help="Threads of each.")
@click.option(
    "--gpus-per-actor",
    type=click.FloatRange(min=0),
    help="GPUs of each; 0.5 lets two share one.  [default: 1 if there is a GPU here, else 0]",
)
@click.option("--batch", type=click.IntRange(min=1), help="Windows at once.  [default: teacher's]")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="What the teacher computes in; --calibrate says how far the lower ones drift.",
)
@click.option(
    "--shard-frames",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="Frames per file; what an interruption can cost.  [default: 256; 16 with blocks]",
)
@click.option(
    "--reader", type=click.Choice(["pyav", "skvideo"]), default="pyav", help="Who decodes."
)
@click.option(
    "--variant",
    type=click.Choice(["identity", "hflip", "both"]),
    default="identity",
    help="hflip: the teacher sees mirrored frames, a label set of its own; both decodes once.",
)
@click.option(
    "--blocks-per-video",
    type=click.IntRange(min=1),
    help="Label only so many blocks of 16 frames of each video; more later adds to them.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Which blocks.")
@click.option(
    "--grid-step",
    type=click.Choice(["1/32", "1/16", "1/8", "1/4"]),
    default="1/32",
    help="Distance of neighbouring stored logits.",
)
@click.option(
    "--replace-changed",
    is_flag=True,
    help="Label a video anew that has other content than the store knows under its name.",
)
@click.option(
    "--executor",
    type=click.Choice(["ray", "inline"]),
    default="ray",
    help="Where workers run; inline: one, in this process, where nothing stops what hangs.",
)
@click.option("--address", help="Ray cluster to use.  [default: one of its own on this machine]")
@click.option("--dry-run", is_flag=True, help="Say what is missing and what it takes; do nothing.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="With --dry-run: label for half a minute, elsewhere, and say hours and size.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what failed in earlier runs, too.")
@click.option(
    "--hang-seconds",
    type=click.FloatRange(min=1),
    default=600.0,
    help="Stop a worker that gets nothing done for so long, and try elsewhere.",
)
def distill_command(
    *,
    videos: tuple[Path, ...],
    lists: tuple[Path, ...],
    split: str | None,
    store: str,
    dry_run: bool,
    calibrate: bool,
    **options: Any,  # noqa: ANN401 - fields of DistillSettings
) -> None:
    """Label VIDEOS, files, data sets or catalogues, with a teacher and keep its soft targets.

    What is in the store already is not done again: a stopped run is continued by the same command.
    Interrupted once, it finishes what is begun; twice, it stops at once. Exits with 3 if some
    videos could not be labelled; what failed is tried again with --retry-failed.

    \b
    Example:
        python cli.py distill videos/ --teacher pqft --store targets.zarr
    """
    from fractions import Fraction

    from distill import Budget, DistillSettings, label_videos
    from stores.memory import keep_freed_memory

    keep_freed_memory()  # of what is labelled in this very process
    if not (videos or lists):
        raise click.UsageError("name VIDEOS, or a list of them with --videos-from")
    if calibrate and not dry_run:
        raise click.UsageError("--calibrate goes with --dry-run")
    blocks, seed = options.pop("blocks_per_video"), options.pop("seed")
    shard_frames = options.pop("shard_frames")
    for name in ("hang_seconds", "gpus_per_actor"):
        if options[name] is not None and not math.isfinite(options[name]):
            raise click.UsageError(
                f"--{name.replace('_', '-')} takes a number, got {options[name]}"
            )
    if blocks is not None and shard_frames not in (None, "16"):
        raise click.UsageError("--blocks-per-video labels shards of 16 frames; drop --shard-frames")
    settings = DistillSettings(
        budget=Budget(blocks, seed) if blocks is not None else None,
        shard_frames=int(shard_frames or (256 if blocks is None else 16)),
        grid_step=float(Fraction(options.pop("grid_step"))),
        **options,
    )
    if dry_run:
        from distill.forecast import forecast_run

        click.echo(
            forecast_run(videos, store, settings, lists=lists, split=split, calibrate=calibrate)
        )
        return
    report = label_videos(videos, store, settings, lists=lists, split=split)
    click.echo(report)
    for line in sorted({f"  failed: {item.video}: {item.reason}" for item in report.failures}):
        click.echo(line)
    if report.passed_over:
        click.echo("  of these, what failed before was not tried again; do so with --retry-failed")
    if report.failures:
        sys.exit(EXIT_SOME_FAILED)


SHORTCUTS = {
    "variant": "student.variant",
    "size": "student.size",
    "data": "supervision.ground_truth.data",
    "epochs": "optimisation.epochs",
    "batch": "optimisation.batch_size",
    "lr": "optimisation.learning_rate",
    "clips_per_video": "sampling.clips_per_video",
    "holdout": "sampling.holdout",
    "holdout_of": "sampling.holdout_of",
    "workers": "optimisation.workers",
    "max_bad_share": "sampling.max_bad_share",
    "seed": "seed",
}
"""Options of train, and the keys of the recipe that they are short for."""


def _recipe_changes(given: dict[str, Any]) -> list[str]:
    """Return options of train as changes of the recipe."""
    import json

    changes = []
    for name, key in SHORTCUTS.items():
        value = given[name]
        if value is not None:
            value = "x".join(map(str, value)) if name == "size" else value
            changes.append(f"{key}={json.dumps(value)}")
    return changes


def _label_changes(given: dict[str, Any]) -> dict[str, Any]:
    """Return options of train as changes of the recipe's label set."""
    values = {
        "labels": given["labels"],
        "saliency": given["teacher_weight"],
        "hierarchical": given["hierarchical_weight"],
    }
    return {key: value for key, value in values.items() if value is not None}


def _list_presets(context: click.Context, _parameter: click.Parameter, given: bool) -> None:  # noqa: FBT001 - click's signature
    if given:
        from student.experiment import presets

        click.echo("\n".join(presets()))
        context.exit()


@cli.command("train")
@click.option("--store", type=StorePlace(), required=True, help="Store with the soft targets.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; made if needed.",
)
@click.option(
    "--config",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe, a YAML file; every run leaves one in its folder.",
)
@click.option("--preset", help="Recipe to begin with, e.g. tinyhd-m-rc4-dhf1k; see --list-presets.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, e.g. optimisation.ema=0.999; may be repeated.",
)
@click.option("--labels", help="Label set, or the beginning of its name.  [default: the only one]")
@click.option(
    "--variant", type=click.Choice(VARIANT_NAMES), help="Student.  [default: tinyhd-s-rc4]"
)
@click.option("--size", type=Size(), help="Frames fed to the student.  [default: 192x256]")
@click.option("--data", help="Catalogue or folder with recorded eyes, to learn from them, too.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes.  [default: 200]")
@click.option(
    "--clips-per-video", type=click.IntRange(min=1), help="Clips of each per epoch.  [default: 2]"
)
@click.option(
    "--batch", type=click.IntRange(min=1), help="Clips at once, of each worker.  [default: 2]"
)
@click.option("--lr", type=float, help="Learning rate at first.  [default: 0.01]")
@click.option("--teacher-weight", type=float, help="Weight of the saliency term.  [default: 1]")
@click.option("--hierarchical-weight", type=float, help="Of the hierarchical one.  [default: 1]")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the videos, or of each one's frames, kept for validation.  [default: 0.1]",
)
@click.option(
    "--holdout-of",
    type=click.Choice(["videos", "frames"]),
    help="Keep whole videos, or the end of each.  [default: videos]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of weights and clips.  [default: 0]")
@click.option(
    "--max-bad-share",
    type=click.FloatRange(0, 1),
    help="Share of the clips that may be unreadable, and replaced.  [default: 0.05]",
)
@click.option(
    "--videos-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the videos lie now.  [default: where they were labelled]",
)
@click.option("--device", help="Where to train, e.g. cuda:1.  [default: a GPU if there is one]")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that share each step, on Ray, a GPU each if there are.  [default: 1]",
)
@click.option("--address", help="Ray cluster of the workers.  [default: one on this machine]")
@click.option(
    "--teacher",
    help="Have this teacher label clips in the step, in place of the label set; to compare.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of that teacher, if it has any.",
)
@TEACHER_OPTION
@click.option("--loader-workers", type=click.IntRange(min=0), default=0, help="Reading processes.")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="List the presets and exit.",
)
def train_command(
    *,
    store: str,
    out: Path,
    recipe_file: Path | None,
    preset: str | None,
    changes: tuple[str, ...],
    videos_root: Path | None,
    device: str | None,
    loader_workers: int,
    address: str | None,
    teacher: str | None,
    weights: Path | None,
    teacher_options: dict[str, str],
    **shortcuts: Any,  # noqa: ANN401 - values of the recipe
) -> None:
    """Train a student from the soft targets of a store.

    What is trained, and how, is a recipe: a preset, a file over it, --set over both, and the
    options from --labels to --max-bad-share, --workers and --teacher over all. A stopped run is
    continued exactly by the same command. The store is only read, unless a stage is to learn from
    another through it. Show curves and pictures with: tensorboard --logdir OUT

    \b
    Example:
        python cli.py train --store targets.zarr --out runs/first
    """
    from functools import partial

    from stores.memory import keep_freed_memory
    from student.experiment import change_label_set, gather_values, merge_values, put_online
    from student.stages import build_stages, train_stages

    keep_freed_memory()
    own = [*changes, *_recipe_changes(shortcuts)]
    values = gather_values(recipe_file, preset=preset, changes=own)
    if preset is None:
        values = merge_values({"student": {"variant": "tinyhd-s-rc4"}}, values)
    if change := _label_changes(shortcuts):
        values = change_label_set(values, change)
    if teacher is not None and shortcuts["labels"] is not None:
        raise click.UsageError("--teacher takes the place of --labels; give one of them")
    if teacher is None and (weights is not None or teacher_options):
        raise click.UsageError("--weights and --teacher-option are of a --teacher; name it")
    if teacher is not None:
        path = str(weights) if weights is not None else ""
        values = put_online(
            values, {"teacher": teacher, "weights": path, "options": teacher_options}
        )
    stages = build_stages(values)
    device = device or _best_device()
    if stages[-1].name:
        click.echo(f"stages: {', '.join(stage.name for stage in stages)}")
    handed: dict[str, Any] = {}
    # The trainer knows neither teachers nor how stores are filled: both are handed to it.
    if any(stage.config.supervision.online is not None for stage in stages):
        from distill.online import open_teacher

        handed["open_teacher"] = open_teacher
    if any(stage.learns_through_store for stage in stages):
        from distill.assist import label_with_student

        handed["label"] = partial(
            label_with_student, store, videos_root=videos_root, device=device, address=address
        )
    state = train_stages(
        store,
        out,
        stages,
        videos_root=videos_root,
        device=device,
        loader_workers=loader_workers,
        address=address,
        **handed,
    )
    if not state.is_complete:
        click.echo(f"stopped after step {state.step}; run the same command again to continue")
        sys.exit(EXIT_INTERRUPTED)
    folder = out / stages[-1].name if stages[-1].name else out
    click.echo(f"{folder}: {state.step} steps done, the best weights in {folder / 'best.pt'}")
    if state.bad_clips:
        click.echo(f"{state.bad_clips} of {state.clips} clips could not be read, and were replaced")
    if state.validation:
        told = ", ".join(f"{name} {value:.4f}" for name, value in state.validation.items())
        click.echo(f"theirs on held-out clips: {told}")


@cli.command("runs")
@click.argument(
    "folders",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
def runs_command(*, folders: tuple[Path, ...]) -> None:
    """Compare the training runs in FOLDERS: what each was trained from, and its best validation.

    \b
    Example:
        python cli.py runs runs/
    """
    from student.comparison import compare_runs, find_runs

    click.echo(compare_runs(find_runs(folders)))


@cli.group("data")
def data_group() -> None:
    """Look at data sets: DHF1K, Hollywood-2, UCF-Sports, Kinetics, any folder of videos."""


@data_group.command("scan")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(DATASET_KINDS), help="Data set.  [default: recognised]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Catalogue to write, ending in .jsonl.  [default: named as PATH, in this folder]",
)
@click.option("--strict", is_flag=True, help="Exit with 3 if there are problems.")
def scan_command(*, path: Path, kind: Any, out: Path | None, strict: bool) -> None:  # noqa: ANN401
    """Find out which data set lies in PATH, decode all of it once, and write a catalogue.

    Says what it found: videos, frames, splits, recorded eyes, and what is wrong with which file.
    The other commands take the catalogue where they take a folder. What was learnt of a video is
    kept, so that a stopped scan is continued by the same command.

    \b
    Example:
        python cli.py data scan DHF1K
    """
    from stores.catalogue import CATALOGUE_SUFFIX, is_catalogue, scan

    out = out or Path(f"{path.resolve().name}{CATALOGUE_SUFFIX}")
    if out.suffix != CATALOGUE_SUFFIX:
        raise click.UsageError(f"--out must end in {CATALOGUE_SUFFIX}, got {out}")
    if not out.parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {out.parent}")
    if out.exists() and not is_catalogue(out):
        raise click.ClickException(f"{out} is no catalogue, and is not written over")
    catalogue = scan(path, kind=kind)
    catalogue.save(out)
    click.echo(catalogue)
    click.echo(f"catalogue: {out}")
    if strict and catalogue.all_problems():
        sys.exit(EXIT_SOME_FAILED)


@cli.command("predict")
@click.argument("videos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Student: a checkpoint, or an ONNX file of tinyhd export.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIME_NAMES),
    help="What computes.  [default: torch; onnxruntime for an ONNX file]",
)
@click.option(
    "--device", help="Where torch computes, e.g. cuda:1.  [default: a GPU if there is one]"
)
@click.option(
    "--batch", type=click.IntRange(min=1), help="Clips at once.  [default: 1, or the ONNX file's]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all CPUs]")
@click.option(
    "--post-processing",
    type=click.Choice(["plain", "paper"]),
    default="plain",
    help="From maps to pictures; paper: as the published maps were made.",
)
@SPLIT_OPTION
@click.option("--maps/--no-maps", default=True, help="Write a gray PNG for each frame.")
@click.option("--overlay/--no-overlay", default=True, help="Write a video with the maps laid over.")
def predict_command(
    *,
    videos: tuple[Path, ...],
    checkpoint: Path,
    out: Path,
    runtime: Any,  # noqa: ANN401 - one of the choices
    device: str | None,
    batch: int | None,
    threads: int | None,
    split: str | None,
    **settings: Any,  # noqa: ANN401 - fields of PredictSettings
) -> None:
    """Write a saliency map for every frame of VIDEOS, files, data sets or catalogues.

    Each video gets a folder below OUT with maps/<frame>.png, at the video's size, and overlay.mp4.
    Frames of videos are numbered from 0, those that are images keep their names.
    A stopped run is continued by the same command. Exits with 3 if some videos failed.

    \b
    Example:
        python cli.py predict holiday.mp4 --checkpoint tinyhd-m-rc4.pt --out saliency
    """
    from stores.memory import keep_freed_memory
    from stores.videos import hash_file
    from student.predict import PredictSettings, predict_videos
    from student.runtimes import load_runtime

    keep_freed_memory()
    runtime = runtime or ("onnxruntime" if checkpoint.suffix == ".onnx" else "torch")
    student = load_runtime(
        checkpoint,
        runtime=runtime,
        device=device or (_best_device() if runtime == "torch" else "cpu"),
        batch=batch,
        threads=threads,
    )
    report = predict_videos(
        videos,
        out,
        student,
        PredictSettings(**settings),
        split=split,
        weights_hash=hash_file(checkpoint).hex(),
    )
    click.echo(f"{out}: {report}")
    for name, reason in report.failures:
        click.echo(f"  failed: {name}: {reason}")
    if report.failures:
        sys.exit(EXIT_SOME_FAILED)


def _read_measures(
    _context: click.Context, _parameter: click.Parameter, given: str | None
) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, (given or "").split(","))))
    if odd := [name for name in names if name not in MEASURE_NAMES]:
        raise click.UsageError(f"--measures takes {','.join(MEASURE_NAMES)}, got {odd[0]!r}")
    return names or MEASURE_NAMES


@cli.command("evaluate")
@click.argument("source")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Folder of a data set with recorded eyes, or its catalogue of tinyhd data scan.",
)
@click.option(
    "--split", help="Videos to score on.  [default: val of DHF1K, else test, val, or all]"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the scores.")
@click.option(
    "--compare",
    multiple=True,
    metavar="SOURCE",
    help="Score this, too, and say how sure the differences are; may be repeated.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOL_NAMES),
    default="dhf1k",
    help="Rules of the measures; dhf1k: as the benchmark's, made exact.",
)
@click.option(
    "--measures",
    callback=_read_measures,
    metavar="NAME,...",
    help=f"Any of {', '.join(MEASURE_NAMES)}.  [default: all]",
)
@click.option(
    "--other",
    type=click.Choice(["scored", "train"]),
    default="scored",
    help="Videos whose fixations are the negatives of shuffled AUC.",
)
@click.option("--through-png", is_flag=True, help="Make maps 8-bit first, as the paper's were.")
@click.option("--max-frames", type=click.IntRange(min=1), help="Score so many random frames.")
@click.option("--skip-bad", is_flag=True, help="Leave out what is missing or damaged and list it.")
@click.option(
    "--baselines/--no-baselines", default=True, help="Score centre prior and observers, too."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is drawn.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: all CPUs]")
@click.option("--device", help="Where to compute, e.g. cuda:1.  [default: a GPU if there is one]")
@click.option("--batch", type=click.IntRange(min=1), help="Clips that a student sees at once.")
def evaluate_command(
    *,
    source: str,
    compare: tuple[str, ...],
    data: Path,
    split: str | None,
    out: Path,
    device: str | None,
    batch: int | None,
    **options: Any,  # noqa: ANN401 - fields of EvaluateSettings
) -> None:
    """Score the saliency maps of SOURCE against the recorded eyes of a data set.

    SOURCE is a checkpoint, or an ONNX file of tinyhd export; a folder of maps that any model has
    written, with a folder for each video; or a label set of a store, as STORE/labels/NAME. With
    NAME= before it, it is called so. In OUT are then report.json, a .csv for each source with a row
    per video, and the scores of all frames. A stopped evaluation is continued by the same command.
    Exits with 3 if something was left out.

    \b
    Example:
        python cli.py evaluate runs/first/best.pt --data DHF1K.jsonl --out scores
    """
    from stores.memory import keep_freed_memory
    from student.evaluate import evaluate
    from student.scored_set import EvaluateSettings
    from student.sources import open_source

    keep_freed_memory()
    device = device or _best_device()
    settings = EvaluateSettings(device=device, **options)
    sources = [open_source(given, device=device, batch=batch) for given in (source, *compare)]
    report = evaluate(sources, data, out, settings, split=split)
    click.echo(report)
    click.echo(f"see {out / 'report.json'}")
    if report.skipped:
        sys.exit(EXIT_SOME_FAILED)


@cli.command("models")
def models_command() -> None:
    """List the students: parameters, arithmetic, and the licence of published weights.

    MACs are multiply-accumulates for a clip of 16 frames at 192x256, and for each saliency map.

    \b
    Example:
        python cli.py models
    """
    from student import VARIANTS, cost_of

    click.echo(
        f"{'variant':<14}{'parameters':>12}{'MACs per clip':>16}{'maps':>6}{'MACs per map':>16}"
        "  weights"
    )
    for name, config in VARIANTS.items():
        cost = cost_of(config)
        click.echo(
            f"{name:<14}{cost.parameters:>12,}{cost.macs:>16,}{cost.output_frames:>6}"
            f"{cost.macs_per_map:>16,.0f}  {PUBLISHED_LICENCES.get(name, 'none published')}"
        )
    click.echo(
        "\nWeights are not part of this program. Those that you train are yours, as far as your "
        "teacher's and\nyour videos' licences allow. Published ones are turned into checkpoints by "
        "tinyhd weights import."
    )


@cli.group("teachers", invoke_without_command=True)
@click.pass_context
def teachers_command(ctx: click.Context) -> None:
    """List the teachers: what they see, what they say, and the licence of published weights.

    \b
    Example:
        python cli.py teachers
    """
    if ctx.invoked_subcommand is not None:
        return
    from teachers import TEACHERS, build

    for name in TEACHERS:
        if name == "assistant":
            click.echo(f"{name}\n  a TinyHD of a checkpoint (--weights), with the maps that it has")
            continue
        teacher = build(name)
        spec, layout = teacher.spec, teacher.spec.layout
        seen = f"{spec.window} frames of {layout.height}x{layout.width}"
        if teacher.is_recurrent:
            seen = f"frames of {layout.height}x{layout.width}, one after the other"
        click.echo(
            f"{name}\n  {spec.paper}\n  weights: {spec.licence}\n  sees {seen}, "
            f"says: {', '.join(layout.names)}"
        )
    click.echo("\nYour own: --teacher package.module:Class, see docs/own-teacher.md.")


@teachers_command.command("check")
@click.argument("name")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of its weights; nothing in it is run.",
)
@click.option("--size", type=Size(), help="Frames fed to the teacher.  [default: as published]")
@TEACHER_OPTION
@click.option("--device", default="cpu", help="Where it runs, e.g. cuda:1.")
def teachers_check_command(
    *,
    name: str,
    weights: Path | None,
    size: tuple[int, int] | None,
    teacher_options: dict[str, str],
    device: str,
) -> None:
    """Import weights into the teacher NAME and look at what it says of a built-in clip.

    Exits with 1 if a map is not finite or is constant.

    \b
    Example:
        python cli.py teachers check hd2s --weights hd2s.pth
    """
    from teachers.check import check_weights
    from teachers.registry import WITH_WEIGHTS

    if weights is None and name in WITH_WEIGHTS:
        raise click.UsageError(f"the teacher {name!r} needs its weights; give them with --weights")
    report = check_weights(name, weights, size=size, device=device, **teacher_options)
    click.echo(report)
    if not report.is_good:
        sys.exit(1)


@cli.command("export")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "format_", type=click.Choice(["onnx"]), default="onnx", help="Kind.")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Clips at once.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
)
def export_command(*, checkpoint: Path, format_: str, batch: int, out: Path) -> None:
    """Write the student of CHECKPOINT for other runtimes, and check the file's maps.

    \b
    Example:
        python cli.py export tinyhd-m-rc4.pt --format onnx --out tinyhd-m-rc4.onnx
    """
    from student import load_model
    from student.export import export_onnx

    if out.suffix != ".onnx":
        raise click.UsageError(f"--out must end in .onnx, got {out}")
    model = load_model(checkpoint)
    difference = export_onnx(model, out, batch=batch)
    height, width = model.config.height, model.config.width
    click.echo(
        f"{out}: {format_}, clip ({batch}, 3, 16, {height}, {width}) float32 to saliency; "
        f"its maps are within {difference:.0e} of the checkpoint's"
    )


@cli.group("store")
def store_group() -> None:
    """Look at target stores, check, join and thin them."""


JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@store_group.command("info")
@click.argument("store", type=StorePlace())
@JSON_OPTION
def info_command(*, store: str, as_json: bool) -> None:
    """Say what STORE holds: videos, label sets, sizes, bounds, who made it when.

    \b
    Example:
        python cli.py store info targets.zarr
    """
    import json

    from stores import TargetStore
    from stores.summary import summarise

    summary = summarise(TargetStore.open(store))
    click.echo(json.dumps(summary.to_dict(), indent=2) if as_json else summary)


@store_group.command("ls")
@click.argument("store", type=StorePlace())
@JSON_OPTION
def ls_command(*, store: str, as_json: bool) -> None:
    """List the videos of STORE and how much of each is labelled.

    \b
    Example:
        python cli.py store ls targets.zarr
    """
    import json
    from dataclasses import asdict

    from stores import TargetStore
    from stores.summary import summarise_videos, video_table

    videos = summarise_videos(TargetStore.open(store))
    if as_json:
        click.echo(json.dumps([asdict(video) for video in videos], indent=2))
    elif videos:
        click.echo(video_table(videos))


@store_group.command("verify")
@click.argument("store", type=StorePlace())
@click.option("--repair", is_flag=True, help="Take back the receipts of what is damaged.")
@click.option(
    "--relabel", type=click.IntRange(min=1), help="Label N random shards anew and compare."
)
@click.option("--labels", help="Label set for --relabel.  [default: the only one]")
@click.option("--teacher", help="Your own teacher for --relabel, as package.module:factory.")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of the teacher for --relabel, if it has any.",
)
@click.option(
    "--videos-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the videos lie now, for --relabel.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which shards --relabel takes.")
def verify_command(
    *,
    store: str,
    repair: bool,
    relabel: int | None,
    labels: str | None,
    teacher: str | None,
    weights: Path | None,
    videos_root: Path | None,
    seed: int,
) -> None:
    """Check STORE: structure, tables, receipts, and the hash and values of every shard.

    Exits with 1 if something is wrong. What --repair takes back is made again by distill.

    \b
    Example:
        python cli.py store verify targets.zarr
    """
    from stores.verify import verify_store

    report = verify_store(store, repair=repair)
    for problem in report.problems:
        click.echo(problem)
    click.echo(f"{store}: {report}")
    if relabel is not None and report.is_clean:
        from distill.relabel import relabel_shards

        compared = relabel_shards(
            store,
            relabel,
            labels=labels,
            teacher=teacher,
            weights=weights,
            videos_root=videos_root,
            seed=seed,
        )
        click.echo(compared)
        if not compared.is_within_bounds:
            sys.exit(1)
    elif relabel is not None:
        click.echo("no shard was labelled anew, as the store has problems")
    if not report.is_clean:
        sys.exit(1)


@store_group.command("merge")
@click.argument("store", type=StorePlace())
@click.argument("others", type=StorePlace(), nargs=-1, required=True)
def merge_command(*, store: str, others: tuple[str, ...]) -> None:
    """Copy into STORE what OTHERS have and it has not.

    A stopped run is continued by the same command.

    \b
    Example:
        python cli.py store merge targets.zarr from-other-machine.zarr
    """
    from stores import TargetStore
    from stores.upkeep import merge

    sources = [TargetStore.open(other) for other in others]
    target = TargetStore.open_or_create(store)
    is_damaged = False
    for source in sources:
        report = merge(target, source)
        click.echo(f"{source.url}: {report}")
        for key in report.damaged:
            click.echo(f"  damaged, not copied: {key}")
            is_damaged = True
    if is_damaged:
        sys.exit(EXIT_SOME_FAILED)


@store_group.command("drop")
@click.argument("store", type=StorePlace())
@click.option("--labels", multiple=True, help="Label set, or the beginning of its name.")
@click.option("--frames", multiple=True, help="Frame set, or the beginning of its name.")
@click.option("--video", multiple=True, help="Name of a video.")
@click.option("--replaced", is_flag=True, help="What is left of videos that were replaced.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop_command(
    *,
    store: str,
    labels: tuple[str, ...],
    frames: tuple[str, ...],
    video: tuple[str, ...],
    replaced: bool,
    yes: bool,
) -> None:
    """Delete label sets, frame sets or videos from STORE; without any, finish what was begun.

    What is not there any more is passed over, so that a stopped command can be repeated.

    \b
    Example:
        python cli.py store drop targets.zarr --video holiday
    """
    from stores import TargetStore
    from stores.upkeep import sweep

    target = TargetStore.open(store, mode="r+")
    keys = []
    for folder, name in [*(("labels", n) for n in labels), *(("frames", n) for n in frames)]:
        found = target.find_sets(folder, name)
        if len(found) > 1:
            raise click.UsageError(f"{name!r} is the beginning of several: {', '.join(found)}")
        if not found:
            click.echo(f"{store} holds no {folder}/{name}")
        keys += found
    there = [name for name in video if target.find_video(name) is not None]
    for name in video:
        if name not in there:
            click.echo(f"{store} holds no video {name!r}")
    names = [*keys, *there]
    if replaced:
        names.append("replaced videos")
    if names and not yes:
        click.confirm(f"delete {', '.join(names)} from {store}?", abort=True)
    with target.writer():
        for key in keys:
            target.drop_set(key)
        target.drop_videos(there)
        if replaced:
            rows = [n for n, row in enumerate(target.rows) if row.superseded_by >= 0]
            target.drop_rows(rows)
        deleted = sweep(target)
    click.echo(f"{store}: {deleted} objects deleted")


@cli.group("weights")
def weights_group() -> None:
    """Turn published weights into checkpoints, and back."""


@weights_group.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--variant", type=click.Choice(VARIANT_NAMES), required=True, help="Their network.")
@click.option("--d1-last", is_flag=True, help="The fusion takes the maps of d1 last.")
@click.option("--size", type=Size(), default="192x256", help="Frames that it was trained on.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Checkpoint."
)
def import_command(
    *, file: Path, variant: str, d1_last: bool, size: tuple[int, int], out: Path
) -> None:
    """Make a checkpoint, which knows its configuration, of published weights in FILE.

    The file does not tell its variant: files of different flags have the same names and shapes.
    Published TinyHD-M of reduction 1 trained on DHF1K needs --d1-last.

    \b
    Example:
        python cli.py weights import d123m_rc4_rc1T.pth --variant tinyhd-m-rc4 --out tinyhd-m-rc4.pt
    """
    from dataclasses import replace

    from student import build_config, import_weights, read_weights, save_checkpoint

    _refuse_same(file, out)
    height, width = size
    config = replace(build_config(variant, height=height, width=width), d1_last=d1_last)
    model = import_weights(read_weights(file), **config.to_dict())
    save_checkpoint(out, model)
    click.echo(f"{out}: {variant}, {model.num_parameters:,} parameters")


@weights_group.command("export")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
)
def export_weights_command(checkpoint: Path, out: Path) -> None:
    """Write the weights of CHECKPOINT under the published names.

    \b
    Example:
        python cli.py weights export runs/first/best.pt --out weights.pth
    """
    from student import load_model, save_published_weights

    _refuse_same(checkpoint, out)
    save_published_weights(out, load_model(checkpoint))
    click.echo(f"{out}: weights under the published names; they do not tell the configuration")


@weights_group.command("inflate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--variant", type=click.Choice(VARIANT_NAMES), required=True, help="Student.")
@click.option("--size", type=Size(), default="192x256", help="Frames fed to the student.")
@click.option(
    "--rule",
    type=click.Choice(["aligned", "reference"]),
    default="aligned",
    help="How kernels and channels are carried over; reference: as in the published code.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the decoders' weights.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Checkpoint."
)
def inflate_command(
    *,
    file: Path,
    variant: str,
    size: tuple[int, int],
    rule: Any,  # noqa: ANN401 - one of the choices
    seed: int,
    out: Path,
) -> None:
    """Start a student's encoder from a 2-D MobileNetV2 in FILE (torchvision's names).

    \b
    Example:
        python cli.py weights inflate mobilenet_v2.pth --variant tinyhd-s-rc4 --out start.pt
    """
    import torch

    from student import TinyHD, build_config, inflate_encoder, read_weights, save_checkpoint

    _refuse_same(file, out)
    height, width = size
    torch.manual_seed(seed)
    model = TinyHD(build_config(variant, height=height, width=width))
    inflate_encoder(model, read_weights(file), rule=rule)
    save_checkpoint(out, model)
    click.echo(f"{out}: {variant} with the encoder of {file}, decoders at random")


@cli.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), help="Folder for all results."
)
def demo_command(out: Path) -> None:
    """Do the main job on three real clips: distill, train, score, draw; minutes on two cores.

    \b
    Example:
        python cli.py demo
    """
    from distill.demo import run_demo

    report = run_demo(out)
    if report is None:
        click.echo("stopped; run the same command again to continue")
        sys.exit(EXIT_INTERRUPTED)
    click.echo(report)
    click.echo(f"see {out}/report.json, {out}/contact_sheet.png, {out}/overlay.mp4")


class _BarSafeHandler(logging.Handler):
    """Write log lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging(level: int) -> None:
    root = logging.getLogger()
    root.handlers = [_BarSafeHandler()]
    root.setLevel(logging.WARNING)
    for name in ("distill", "student", "teachers", "stores", __name__):
        logging.getLogger(name).setLevel(level)


def _refuse_same(given: Path, out: Path) -> None:
    if out.exists() and out.samefile(given):
        raise click.UsageError(f"--out is the file that is read, {given}; choose another")


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    cli(prog_name="tinyhd")
