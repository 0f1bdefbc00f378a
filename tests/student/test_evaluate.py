"""Maps are scored as they deserve, whoever made them; a stopped evaluation goes on."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cli import cli
from distill.run import label_videos
from distill.settings import DistillSettings
from stores.catalogue import CatalogueVideo, scan
from stores.errors import DatasetError, GroundTruthError
from stores.ground_truth import GroundTruth
from student.checkpoints import save_checkpoint
from student.evaluate import evaluate
from student.fixations import draw_others
from student.metrics import score
from student.pictures import PostProcessing
from student.predict import PredictSettings, predict_videos
from student.protocols import Measure
from student.reference import import_weights
from student.report import EvaluationReport
from student.runtimes import load_runtime
from student.scored_set import EvaluateSettings
from student.scores import ScoresError
from student.sources import FolderSource, MapBatch, Source, SourceError, open_source
from student.tinyhd import TinyHD
from tests.miniature import Kind
from tests.student.networks import CONFIGS, fill_weights

Miniatures = Callable[[Kind], Path]
QUICK = EvaluateSettings(measures=("nss", "cc"), baselines=False, workers=2)
VAL = ("0601", "0602")


@pytest.fixture(scope="module")
def dhf1k(miniatures: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue of a small DHF1K."""
    path = tmp_path_factory.mktemp("catalogue") / "dhf1k.jsonl"
    scan(miniatures("dhf1k")).save(path)
    return path


@pytest.fixture(scope="module")
def maps(miniatures: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of maps: the ground truth itself, a blurred half of it, and noise."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    for video in VAL:
        for file in sorted((miniatures("dhf1k") / "annotation" / video / "maps").glob("*.png")):
            truth = np.asarray(Image.open(file))
            noise = rng.integers(0, 256, truth.shape, np.uint8)
            half = (0.5 * truth + 0.2 * noise).astype(np.uint8)
            for name, values in {"truth": truth, "half": half, "noise": noise}.items():
                (folder / name / video).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / name / video / file.name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with weights that follow from names."""
    path = tmp_path_factory.mktemp("student") / "m.pt"
    save_checkpoint(path, small_student())
    return path


def small_student() -> TinyHD:
    config = CONFIGS["m_rc8"]
    return import_weights(fill_weights(config), **config, height=64, width=96)


def mean(report: EvaluationReport, name: str, measure: Measure) -> float:
    (scores,) = (scores for scores in report.scores if scores.name == name)
    return scores.average(measure).micro


def folders(maps: Path, *names: str) -> list[Source]:
    return [FolderSource(name, maps / name) for name in names]


def test_maps_rank_as_they_must(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    """Ground truth before half of it, before the centre prior, before noise."""
    sources = folders(maps, "truth", "half", "noise")
    report = evaluate(sources, dhf1k, tmp_path, EvaluateSettings(workers=2))
    order = ("truth", "half", "centre prior", "noise")
    measure: Measure
    for measure in ("auc_judd", "nss", "cc"):
        values = [mean(report, name, measure) for name in order]
        assert values == sorted(values, reverse=True), measure
    sims = [mean(report, name, "sim") for name in ("truth", "centre prior", "noise")]
    assert sims == sorted(sims, reverse=True)  # a pedestal of noise is worth less there
    for measure in ("auc_shuffled", "ig"):
        values = [mean(report, name, measure) for name in ("truth", "half", "noise")]
        assert values == sorted(values, reverse=True), measure
    assert mean(report, "truth", "cc") == pytest.approx(1)
    assert mean(report, "truth", "sim") == pytest.approx(1)
    assert mean(report, "truth", "kld") == pytest.approx(0, abs=1e-9)
    assert mean(report, "truth", "auc_judd") > 0.9
    assert mean(report, "noise", "auc_borji") == pytest.approx(0.5, abs=0.03)
    assert mean(report, "noise", "auc_shuffled") == pytest.approx(0.5, abs=0.05)
    assert mean(report, "centre prior", "ig") == pytest.approx(0, abs=1e-9)
    assert report.prior == "mean of 122 training maps"  # the first 3 of 125 have no fixation


def test_scores_are_those_of_single_frames(
    miniatures: Miniatures, dhf1k: Path, maps: Path, tmp_path: Path
) -> None:
    measures: tuple[Measure, ...] = ("auc_judd", "auc_borji", "nss", "cc", "sim", "kld")
    settings = EvaluateSettings(measures=measures, baselines=False, workers=2)
    evaluate(folders(maps, "half"), dhf1k, tmp_path, settings)
    kept = tmp_path / "scores" / "half.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()][1:]
    assert [line["video"] for line in lines] == list(VAL)
    every = []
    for line in lines:
        annotation = miniatures("dhf1k") / "annotation" / line["video"]
        for row, frame in enumerate(line["frames"]):
            name = f"{frame + 1:04d}.png"
            read = [maps / "half" / line["video"], annotation / "maps", annotation / "fixation"]
            prediction, density, fixations = (
                np.asarray(Image.open(folder / name)) for folder in read
            )
            expected = score(prediction, density, fixations)
            found = {measure: line["scores"][measure][row] for measure in measures}
            assert found == pytest.approx({measure: expected[measure] for measure in measures})
            every.append(found["nss"])
    report = json.loads((tmp_path / "report.json").read_text())
    (source,) = report["sources"]
    assert source["measures"]["nss"]["micro"] == pytest.approx(np.mean(every))
    per_video = [np.mean(line["scores"]["nss"]) for line in lines]
    assert source["measures"]["nss"]["macro"] == pytest.approx(np.mean(per_video))
    rows = list(csv.DictReader((tmp_path / "half.csv").read_text().splitlines()))
    assert [float(row["nss"]) for row in rows] == pytest.approx(per_video, abs=1e-6)
    assert [int(row["frames"]) for row in rows] == [48, 42]


def test_a_checkpoint_is_scored_as_its_published_pictures(
    miniatures: Miniatures, dhf1k: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Through 8 bits, the student itself and what predict wrote of it score the same."""
    videos = [miniatures("dhf1k") / "video" / f"{int(name):03d}.AVI" for name in VAL]
    how: PostProcessing = "paper"
    predict_videos(
        videos,
        tmp_path / "predicted",
        load_runtime(checkpoint),
        PredictSettings(post_processing=how, overlay=False),
        weights_hash="",
    )
    settings = EvaluateSettings(
        measures=("auc_judd", "nss", "cc"), through_png=True, baselines=False, workers=2
    )
    sources = [open_source(f"live={checkpoint}"), FolderSource("kept", tmp_path / "predicted")]
    report = evaluate(sources, dhf1k, tmp_path / "scores", settings)
    live, kept = report.scores
    for video, other in zip(live.videos, kept.videos, strict=True):
        assert video.frames == other.frames
        for measure in settings.measures:
            # Rounding in another thread may move a pixel by a gray level.
            np.testing.assert_allclose(video.values[measure], other.values[measure], atol=1e-3)
    # Floats that are only resized score nearly the same, and not exactly.
    plain = EvaluateSettings(measures=("cc",), baselines=False, workers=2)
    report = evaluate([open_source(f"live={checkpoint}")], dhf1k, tmp_path / "plain", plain)
    assert mean(report, "live", "cc") != live.average("cc").micro
    assert mean(report, "live", "cc") == pytest.approx(live.average("cc").micro, abs=0.05)


def test_a_label_set_is_scored_by_content(
    miniatures: Miniatures, dhf1k: Path, tmp_path: Path
) -> None:
    """What a teacher said of a video under another name is found; what it did not see is told."""
    shutil.copy(miniatures("dhf1k") / "video" / "601.AVI", tmp_path / "other name.avi")
    store = tmp_path / "targets.zarr"
    settings = DistillSettings(teacher="pqft", size=(64, 64), shard_frames=16, executor="inline")
    done = label_videos([tmp_path / "other name.avi"], store, settings)
    source = open_source(f"teacher={store}/labels/{done.label_sets[0]}")
    with pytest.raises(SourceError, match=r"602\.AVI"):
        evaluate([source], dhf1k, tmp_path / "scores", QUICK)
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    report = evaluate([source], dhf1k, tmp_path / "scores", skipping)
    assert [len(video.frames) for video in report.scores[0].videos] == [48, 0]
    assert report.scores[0].average("nss").videos == 1
    assert [item.video for _, item in report.skipped] == ["0602"]


class Stopping(FolderSource):
    """Maps whose reader is interrupted before some video; notes which videos are read."""

    def __init__(self, name: str, folder: Path, stop_at: str = "") -> None:
        super().__init__(name, folder)
        self.stop_at = stop_at
        self.read: list[str] = []

    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        if video.record.id == self.stop_at:
            raise KeyboardInterrupt
        self.read.append(video.record.id)
        yield from super().batches(video, truth, frames)


def test_a_stopped_evaluation_goes_on(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    whole = evaluate(folders(maps, "half"), dhf1k, tmp_path / "whole", QUICK)
    with pytest.raises(KeyboardInterrupt):
        evaluate([Stopping("half", maps / "half", "0602")], dhf1k, tmp_path / "parts", QUICK)
    file = tmp_path / "parts" / "scores" / "half.jsonl"
    with file.open("a") as lines:
        lines.write('{"video": "0602", "frames": [0, 1')  # a kill in the middle of a line
    again = Stopping("half", maps / "half")
    parts = evaluate([again], dhf1k, tmp_path / "parts", QUICK)
    assert again.read == ["0602"]
    assert parts.to_dict() == whole.to_dict()
    assert file.read_bytes() == (tmp_path / "whole" / "scores" / "half.jsonl").read_bytes()
    once_more = Stopping("half", maps / "half")
    evaluate([once_more], dhf1k, tmp_path / "parts", QUICK)
    assert once_more.read == []


def test_changed_maps_are_scored_anew(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    shutil.copytree(maps / "half", tmp_path / "half")
    before = evaluate(folders(tmp_path, "half"), dhf1k, tmp_path / "scores", QUICK)
    shutil.copy(maps / "truth" / "0602" / "0001.png", tmp_path / "half" / "0602" / "0001.png")
    source = Stopping("half", tmp_path / "half")
    after = evaluate([source], dhf1k, tmp_path / "scores", QUICK)
    assert source.read == ["0602"]
    assert after.scores[0].average("cc").micro > before.scores[0].average("cc").micro


def test_another_evaluation_is_not_written_over(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    evaluate(folders(maps, "half"), dhf1k, tmp_path, QUICK)
    other = EvaluateSettings(measures=("nss",), baselines=False, workers=2)
    with pytest.raises(ScoresError, match=r"another evaluation \(measures differ\).*--out"):
        evaluate(folders(maps, "half"), dhf1k, tmp_path, other)
    with pytest.raises(ValueError, match="two sources are called 'half' and 'half'"):
        evaluate(folders(maps, "half", "half"), dhf1k, tmp_path / "twice", QUICK)


def test_what_is_shuffled_does_not_depend_on_workers(
    dhf1k: Path, maps: Path, tmp_path: Path
) -> None:
    found = []
    for workers in (1, 3):
        settings = EvaluateSettings(measures=("auc_shuffled",), baselines=False, workers=workers)
        report = evaluate(folders(maps, "half"), dhf1k, tmp_path / str(workers), settings)
        found.append(report.scores[0].videos)
    for video, other in zip(*found, strict=True):
        np.testing.assert_array_equal(video.values["auc_shuffled"], other.values["auc_shuffled"])
    settings = EvaluateSettings(
        measures=("auc_shuffled",), other="train", baselines=False, workers=2
    )
    report = evaluate(folders(maps, "half"), dhf1k, tmp_path / "train", settings)
    assert report.scores[0].average("auc_shuffled").frames == 90


def test_some_frames_stand_for_all(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(measures=("nss",), max_frames=20, baselines=False, workers=2)
    frames = [
        {video.video: video.frames for video in report.scores[0].videos}
        for name in ("half", "truth")
        if (report := evaluate(folders(maps, name), dhf1k, tmp_path / name, settings))
    ]
    assert frames[0] == frames[1]
    assert sum(map(len, frames[0].values())) == 20


def test_bad_labels_stop_an_evaluation_unless_they_are_left_out(
    miniatures: Miniatures, maps: Path, tmp_path: Path
) -> None:
    root = miniatures("broken")
    with pytest.raises(GroundTruthError, match=r"0602/maps/0007\.png is 45x80"):
        evaluate(folders(maps, "half"), root, tmp_path / "scores", QUICK, split="val")
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    report = evaluate(folders(maps, "half"), root, tmp_path / "scores", skipping, split="val")
    assert [(item.video, item.frame) for _, item in report.skipped] == [("0602", 6)]
    assert [len(video.frames) for video in report.scores[0].videos] == [48, 41]
    assert "left out" in str(report)
    with pytest.raises(GroundTruthError, match=r"0007\.png"):  # what was left out is asked for now
        evaluate(folders(maps, "half"), root, tmp_path / "scores", QUICK, split="val")


def test_missing_and_damaged_maps_are_told(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    shutil.copytree(maps / "half", tmp_path / "half")
    (tmp_path / "half" / "0601" / "0003.png").unlink()
    with pytest.raises(SourceError, match=r"no map for frame 2 of '0601'.*0003\.png"):
        evaluate(folders(tmp_path, "half"), dhf1k, tmp_path / "scores", QUICK)
    damaged = tmp_path / "half" / "0602" / "0005.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    Image.new("L", (9, 9)).save(tmp_path / "half" / "0602" / "0009.png")
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    report = evaluate(folders(tmp_path, "half"), dhf1k, tmp_path / "scores", skipping)
    found = {(item.video, item.frame) for _, item in report.skipped}
    assert found == {("0601", 2), ("0602", 4)}  # a map of another size is resized where alone
    shutil.copytree(maps / "half" / "0601", tmp_path / "half" / "0601", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "half" / "0602")
    with pytest.raises(SourceError, match="no maps of '0602'"):
        evaluate(folders(tmp_path, "half"), dhf1k, tmp_path / "other", QUICK, split="val")


def test_maps_are_found_under_any_usual_name(dhf1k: Path, maps: Path, tmp_path: Path) -> None:
    """Numbers without padding, from 0 as predict writes them, in a folder maps."""
    expected = evaluate(folders(maps, "half"), dhf1k, tmp_path / "expected", QUICK)
    for video in VAL:
        target = tmp_path / "renamed" / str(int(video)) / "maps"
        target.mkdir(parents=True)
        for file in (maps / "half" / video).iterdir():
            shutil.copy(file, target / f"{int(file.stem) - 1:06d}.png")
        (target / "Thumbs.db").write_bytes(b"")
    found = evaluate(folders(tmp_path, "renamed"), dhf1k, tmp_path / "found", QUICK)
    assert mean(found, "renamed", "nss") == mean(expected, "half", "nss")


def test_maps_that_are_not_finite_are_an_error(dhf1k: Path, tmp_path: Path) -> None:
    model = small_student()
    with torch.no_grad():
        next(iter(model.fusion.parameters())).fill_(math.nan)
    save_checkpoint(tmp_path / "nan.pt", model)
    with pytest.raises(SourceError, match="frame 0 of '0601' by nan is not finite"):
        evaluate([open_source(str(tmp_path / "nan.pt"))], dhf1k, tmp_path / "scores", QUICK)


def test_other_observers_are_a_ceiling(miniatures: Miniatures, tmp_path: Path) -> None:
    """With a table of who looked where, the others' points predict an observer's."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name, number in (("a", 0), ("b", 60)):
        (root / name / "images").mkdir(parents=True)
        rows = ["frame,x,y,observer"]
        for frame in range(6):
            Image.new("RGB", (96, 64), (number, frame, 0)).save(
                root / name / "images" / f"f{frame}.png"
            )
            centre = rng.uniform((20, 15), (76, 49))
            for observer in "pqrs":
                x, y = (centre + rng.normal(0, 1.5, 2)).round().astype(int)
                rows.append(f"{frame},{x},{y},{observer}")
        (root / name / "fixations.csv").write_text("\n".join(rows) + "\n")
        (tmp_path / "noise" / name).mkdir(parents=True)
        for frame in range(6):
            noise = Image.fromarray(rng.integers(0, 256, (64, 96), np.uint8))
            noise.save(tmp_path / "noise" / name / f"f{frame}.png")
    settings = EvaluateSettings(measures=("auc_judd", "nss", "cc"), workers=2)
    report = evaluate(folders(tmp_path, "noise"), root, tmp_path / "scores", settings)
    names = [scores.name for scores in report.scores]
    assert names == ["noise", "centre prior", "other observers"]
    assert report.prior.startswith("Gaussian")
    assert mean(report, "other observers", "auc_judd") > 0.95
    assert mean(report, "other observers", "nss") > 3
    assert math.isnan(mean(report, "other observers", "cc"))
    assert mean(report, "noise", "auc_judd") == pytest.approx(0.6, abs=0.15)


def test_frames_that_nobody_looked_at_have_no_score(
    miniatures: Miniatures, checkpoint: Path, tmp_path: Path
) -> None:
    """The first three frames of 002 have no fixation, and black maps."""
    settings = EvaluateSettings(measures=("sim", "kld", "nss"), baselines=False, workers=2)
    report = evaluate(
        [open_source(str(checkpoint))], miniatures("dhf1k"), tmp_path, settings, split="train"
    )
    scores = report.scores[0]
    assert sum(len(video.frames) for video in scores.videos) == 125
    assert [scores.average(measure).frames for measure in settings.measures] == [122] * 3
    assert "frames with a score" not in str(report)  # as all measures count the same


def test_nothing_to_score_on_is_an_error(
    miniatures: Miniatures, maps: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="has no recorded eyes"):
        evaluate(folders(maps, "half"), miniatures("plain"), tmp_path, QUICK)
    with pytest.raises(DatasetError, match="no split 'holdout'; it has"):
        evaluate(folders(maps, "half"), miniatures("dhf1k"), tmp_path, QUICK, split="holdout")
    with pytest.raises(DatasetError, match=r"cutInHalf.*2 such videos.*--skip-bad"):
        evaluate(folders(maps, "half"), miniatures("kinetics"), tmp_path, QUICK)


def test_the_command_says_what_it_found(
    miniatures: Miniatures, maps: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def tinyhd(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
        return result.exit_code, result.output

    data = ("--data", miniatures("dhf1k"), "--out", tmp_path / "out", "--measures", "nss,cc")
    code, output = tinyhd(maps / "truth", "--compare", f"ours={checkpoint}", *data)
    assert code == 0, output
    assert "DHF1K val" in output
    assert "2 videos, 90 frames; protocol dhf1k" in output
    for name in ("truth", "ours", "centre prior", "truth less"):
        assert name in output
    assert (tmp_path / "out" / "ours.csv").is_file()

    code, output = tinyhd(tmp_path / "nothing", *data)
    assert (code, output.count("Error:")) == (1, 1)
    assert "give a checkpoint, a folder of maps, or STORE/labels/NAME" in output
    code, output = tinyhd(maps / "truth", "--measures", "psnr", "--data", maps, "--out", tmp_path)
    assert code == 2
    assert "got 'psnr'" in output
    code, output = tinyhd(checkpoint, *data[:2], "--out", tmp_path / "t", "--protocol", "tinyhd")
    assert code == 1
    assert "--through-png" in output


def test_images_of_another_size_are_no_frames_to_score_on(
    miniatures: Miniatures, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(miniatures("ucf") / "testing", tmp_path / "ucf" / "testing")
    folder = tmp_path / "ucf" / "testing" / "Run-Side-001" / "images"
    odd = sorted(folder.iterdir())[3]
    Image.new("RGB", (40, 40)).save(odd)
    data, student = tmp_path / "ucf", open_source(str(checkpoint))
    with pytest.raises(DatasetError, match=rf"{odd.name} has another size.*--skip-bad"):
        evaluate([student], data, tmp_path / "scores", QUICK)
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    report = evaluate([student], data, tmp_path / "scores", skipping)
    frames = {video.video: len(video.frames) for video in report.scores[0].videos}
    assert frames == {"Kicking-Front-001": 18, "Run-Side-001": 23}
    assert odd.name in report.skipped[0][1].reason


def test_sources_are_compared_on_the_frames_that_both_have(
    dhf1k: Path, maps: Path, tmp_path: Path
) -> None:
    """A copy of some of the maps is neither better nor worse than all of them."""
    shutil.copytree(maps / "half", tmp_path / "some")
    for file in sorted((tmp_path / "some" / "0601").iterdir())[:30]:
        file.unlink()
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    sources = [FolderSource("some", tmp_path / "some"), FolderSource("all", maps / "half")]
    report = evaluate(sources, dhf1k, tmp_path / "scores", skipping)
    some, every = report.scores
    assert some.average("nss").micro != every.average("nss").micro
    assert report.difference(every, "nss").difference == 0


def test_labels_that_are_renamed_are_scored_anew(
    miniatures: Miniatures, maps: Path, tmp_path: Path
) -> None:
    root = tmp_path / "dhf1k"
    shutil.copytree(miniatures("dhf1k"), root)
    settings = EvaluateSettings(measures=("cc",), baselines=False, workers=2)
    before = evaluate(folders(maps, "truth"), root, tmp_path / "scores", settings)
    assert mean(before, "truth", "cc") == pytest.approx(1)
    folder = root / "annotation" / "0601" / "maps"
    for file in sorted(folder.iterdir()):
        file.rename(file.with_suffix(".old"))
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"{(number + 7) % 48 + 1:04d}.png")
    after = evaluate(folders(maps, "truth"), root, tmp_path / "scores", settings)
    assert mean(after, "truth", "cc") < 0.99


def test_a_video_never_draws_its_own_fixations(
    miniatures: Miniatures, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int | None]] = []

    def note(pool: Any, **options: Any) -> Any:  # noqa: ANN401 - as the function itself
        drawn.append((options["video"], options["without"]))
        return draw_others(pool, **options)

    monkeypatch.setattr("student.scoring.draw_others", note)
    settings = EvaluateSettings(
        measures=("auc_shuffled",), other="train", baselines=False, max_frames=12, workers=1
    )
    source = open_source(str(checkpoint))
    evaluate([source], miniatures("dhf1k"), tmp_path, settings, split="train")
    assert drawn
    assert all(without == video for video, without in drawn)


def test_a_video_that_ends_early_is_left_out_whole(
    miniatures: Miniatures, checkpoint: Path, tmp_path: Path
) -> None:
    """However many threads there are, and no longer than it is damaged."""
    root = tmp_path / "dhf1k"
    shutil.copytree(miniatures("dhf1k"), root)
    scan(root).save(tmp_path / "data.jsonl")
    video = root / "video" / "601.AVI"
    whole = video.read_bytes()
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    for workers in (1, 3):
        video.write_bytes(whole[: len(whole) // 2])
        settings = EvaluateSettings(**{**vars(skipping), "workers": workers})
        out, source = tmp_path / f"scores{workers}", open_source(str(checkpoint))
        cut = evaluate([source], tmp_path / "data.jsonl", out, settings)
        assert [len(item.frames) for item in cut.scores[0].videos] == [0, 42]
        video.write_bytes(whole)
        mended = evaluate([source], tmp_path / "data.jsonl", out, settings)
        assert [len(item.frames) for item in mended.scores[0].videos] == [48, 42]


def test_a_folder_called_labels_is_no_store(maps: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    shutil.copytree(maps / "half", tmp_path / "labels" / "half")
    assert isinstance(open_source(str(tmp_path / "labels" / "half")), FolderSource)


def test_a_map_too_many_does_not_shift_the_others(tmp_path: Path) -> None:
    """Labels from 0 and maps called as they are, and one map behind the end."""
    root, given = tmp_path / "data", tmp_path / "given"
    rng = np.random.default_rng(0)
    for name, count in (("a", 6), ("b", 5)):
        for folder in (root / name / "images", root / name / "maps", given / name):
            folder.mkdir(parents=True)
        for number in range(count):
            density = rng.integers(0, 256, (32, 48), np.uint8)
            if number < 5:
                Image.new("RGB", (48, 32)).save(root / name / "images" / f"{number:04d}.png")
                Image.fromarray(density).save(root / name / "maps" / f"{number + 1:04d}.png")
            Image.fromarray(density).save(given / name / f"{number + 1:04d}.png")
    settings = EvaluateSettings(measures=("cc",), baselines=False, workers=1)
    report = evaluate([FolderSource("given", given)], root, tmp_path / "scores", settings)
    average = report.scores[0].average("cc")
    assert average.frames == 10
    assert average.micro == pytest.approx(1)


def test_a_damaged_table_of_points_leaves_its_video_out(
    miniatures: Miniatures, maps: Path, tmp_path: Path
) -> None:
    root = tmp_path / "dhf1k"
    shutil.copytree(miniatures("dhf1k"), root)
    (root / "annotation" / "0601" / "fixations.csv").write_text("frame,x\n1,2\n")
    with pytest.raises(GroundTruthError, match="has no column 'y'"):
        evaluate(folders(maps, "half"), root, tmp_path / "scores", QUICK)
    skipping = EvaluateSettings(**{**vars(QUICK), "skip_bad": True})
    report = evaluate(folders(maps, "half"), root, tmp_path / "scores", skipping)
    assert [video.video for video in report.scores[0].videos] == ["0602"]
    assert report.left_out[0].video == "0601"


def test_the_order_of_measures_makes_no_other_evaluation(
    dhf1k: Path, maps: Path, tmp_path: Path
) -> None:
    for measures in (("nss", "cc"), ("cc", "nss")):
        settings = EvaluateSettings(**{**vars(QUICK), "measures": measures})
        evaluate(folders(maps, "half"), dhf1k, tmp_path, settings)
