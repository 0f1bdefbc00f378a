"""What a scan learns of a data set is kept, and is what the data set holds."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli import cli
from stores import TargetStore, probing
from stores.catalogue import Catalogue, CatalogueVideo, open_catalogue, scan
from stores.decode import decode_images, decode_spans, index_video
from stores.errors import DatasetError, VideoError
from stores.finding import find_videos
from stores.ground_truth import GroundTruth, LabelCensus
from stores.progress import Progress
from stores.videos import hash_file
from tests.miniature import (
    BROKEN,
    DHF1K,
    KINETICS,
    NUMBERED,
    Kind,
    make_numbered,
    read_number,
    write_png,
)

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

    Miniatures = Callable[[Kind], Path]
    Run = Callable[..., Result]

SMALL = ("--executor", "inline", "--size", "64x64", "--shard-frames", "16")
SLOW_DECODER = """
import time
from stores import probing
index_video = probing.index_video
def slowly(path, **options):
    if path.stem == "long":
        time.sleep(1e6)
    return index_video(path, **options)
probing.index_video = slowly
probing.serve()
"""


@pytest.fixture(scope="module")
def scans(miniatures: Miniatures) -> Callable[[Kind], Catalogue]:
    """Give what is in a small data set, scanned once."""
    found: dict[Kind, Catalogue] = {}

    def give(kind: Kind) -> Catalogue:
        if kind not in found:
            found[kind] = scan(miniatures(kind))
        return found[kind]

    return give


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.fixture
def run() -> Run:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return call


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    lines = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, result.output
    for part in parts:
        assert part in lines[0]


def by_id(catalogue: Catalogue) -> dict[str, CatalogueVideo]:
    return {video.record.id: video for video in catalogue.videos}


# What a scan finds


def test_dhf1k_is_counted(scans: Callable[[Kind], Catalogue]) -> None:
    catalogue = scans("dhf1k")
    assert catalogue.kind == "dhf1k"
    assert catalogue.all_problems() == []
    assert catalogue.splits == ["train", "train540", "val", "test"]
    for id_, video in by_id(catalogue).items():
        span = DHF1K[int(id_)]
        frames = span.stop - span.start
        labelled = 0 if id_ == "0701" else frames
        assert (video.record.frames, video.record.height, video.record.width) == (frames, 90, 160)
        assert video.record.fps == 30
        assert (video.census.maps, video.census.fixations) == (labelled, labelled)
        assert video.census.labelled == labelled
        assert video.frame_names() is None
    lines = str(catalogue).splitlines()
    assert lines[0].endswith("6 videos, 249 frames")
    assert [line.split() for line in lines[1:]] == [
        ["split", "videos", "frames", "least", "most", "labelled", "maps", "fixations"],
        ["train", "3", "125", "25", "60", "125", "125", "125"],
        ["train540", "3", "125", "25", "60", "125", "125", "125"],
        ["val", "2", "90", "42", "48", "90", "90", "90"],
        ["test", "1", "34", "34", "34", "0", "0", "0"],
        ["all", "6", "249", "25", "60", "215", "215", "215"],
    ]


def test_shots_are_counted(scans: Callable[[Kind], Catalogue]) -> None:
    catalogue = scans("hollywood2")
    frames = {
        id_.removeprefix("actionclip"): v.record.frames for id_, v in by_id(catalogue).items()
    }
    assert frames == {
        **{"train00001_1": 20, "train00001_2": 9, "train00001_3": 1, "train00001_10": 34},
        **{"test00001_1": 18, "test00001_2": 6},
    }
    for video in catalogue.videos:
        assert video.census.labelled == video.record.frames
        names = video.frame_names()
        assert names is not None
        assert len(names) == video.record.frames
    assert catalogue.all_problems() == []


def test_files_that_are_no_videos_are_listed(scans: Callable[[Kind], Catalogue]) -> None:
    catalogue = scans("kinetics")
    damaged = {upload.path for upload in KINETICS if upload.damage}
    assert {bad.path for bad in catalogue.bad} == damaged
    assert {v.record.path for v in catalogue.videos} == {u.path for u in KINETICS} - damaged
    assert {bad.splits for bad in catalogue.bad} == {("train",), ("val",)}
    for bad in catalogue.bad:
        assert Path(bad.path).name in bad.reason
    assert len(catalogue.all_problems()) == 4
    short = by_id(catalogue)["train_256/riding a bike/_ten_frames_000004_000014"]
    assert short.record.frames == 10


def test_defects_are_told(scans: Callable[[Kind], Catalogue]) -> None:
    catalogue = scans("broken")
    text = "\n".join(catalogue.all_problems())
    for what in ("truncated PNG", "extra label", "map of another size"):
        assert BROKEN[what] in text
    assert "0001: 40 frames, 39 of them with labels" in text
    assert "Thumbs.db" not in text
    assert len(catalogue.all_problems()) == 5  # the extra label is one map and one fixation map
    assert sum(video.census.labelled for video in catalogue.videos) == 215 - 3


def test_folder_of_nothing_but_damage_is_scanned(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    catalogue = scan(tmp_path)
    assert catalogue.videos == []
    assert [bad.id for bad in catalogue.bad] == ["a"]
    assert "0 videos" in str(catalogue)
    catalogue.save(tmp_path / "c.jsonl")
    assert Catalogue.load(tmp_path / "c.jsonl") == catalogue


def test_one_split_alone_can_be_scanned(miniatures: Miniatures) -> None:
    catalogue = open_catalogue(miniatures("dhf1k"), split="val")
    assert list(by_id(catalogue)) == ["0601", "0602"]
    with pytest.raises(DatasetError, match="no split 'tset'"):
        open_catalogue(miniatures("dhf1k"), split="tset")


def test_ids_that_collide_are_refused(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.avi"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.mp4 .*would both be called 'a'") as caught:
        scan(tmp_path)
    assert "a.avi" in str(caught.value)


# Damaged images


@pytest.mark.parametrize("place", [1, 7, 23])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_image_is_dropped_and_later_frames_keep_their_labels(
    numbered: Path, tmp_path: Path, place: int, damage: str
) -> None:
    root = tmp_path / "set"
    shutil.copytree(numbered, root, ignore=shutil.ignore_patterns("001.AVI", "0001"))
    folder = root / "video" / "0002"
    shutil.copy(numbered / "video" / "0002" / "0001.png", folder)
    for name in ("maps", "fixation"):
        shutil.copy(
            numbered / "annotation" / "0002" / name / "0001.png",
            root / "annotation" / "0002" / name,
        )
    path = folder / f"{place:04d}.png"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no image"}[damage])
    catalogue = scan(root)
    assert catalogue.bad == []
    (video,) = catalogue.videos
    assert video.dropped == (path.name,)
    assert (video.record.frames, video.census.maps) == (22, 22)
    assert any("1 images cannot be decoded" in line for line in catalogue.all_problems())
    assert any(path.name in line for line in catalogue.all_problems())
    truth = video.ground_truth()
    given = list(decode_images(video.record.absolute))
    assert [name for name, _ in given] == video.frame_names()
    for index, (name, frame) in enumerate(given):
        density = truth.read_density(index)
        assert density is not None
        number = NUMBERED["002"] + int(name[:4]) - 1
        assert read_number(frame) == read_number(density) == number
        assert truth.name_of(index) == Path(name).stem


def test_long_sequence_with_damage_can_be_begun_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    for number in range(310):
        write_png(folder / f"{number}.png", np.full((4, 6, 3), number % 256, np.uint8))
    for number in (0, 139, 150, 279, 309):
        (folder / f"{number}.png").write_bytes(b"no image")
    (video,) = scan(tmp_path).videos
    assert video.dropped == ("0.png", "139.png", "150.png", "279.png", "309.png")
    names = video.frame_names()
    assert names is not None
    index = index_video(folder).frame_index
    assert index is not None
    spans = [range(100, 101), range(137, 150), range(275, 305)]
    for number, frame in decode_spans(folder, spans, size=(4, 6), index=index):
        assert frame[0, 0, 0] == int(names[number].removesuffix(".png")) % 256


def test_images_that_changed_since_are_noticed(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / "s" / f"{number}.png", np.full((16, 16, 3), number, np.uint8))
    (video,) = scan(tmp_path).videos
    (tmp_path / "s" / "2.png").unlink()
    with pytest.raises(VideoError, match=r"holds 2 images, not 3 .* scan it again"):
        video.frame_names()


@pytest.mark.timeout(60)
def test_pipe_among_images_is_told_and_not_waited_for(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / "s" / f"{number}.png", np.full((16, 16, 3), number, np.uint8))
        write_png(tmp_path / "t" / f"{number}.png", np.full((16, 16, 3), number, np.uint8))
    os.mkfifo(tmp_path / "s" / "3.png")
    catalogue = scan(tmp_path)
    assert "t" in by_id(catalogue)
    assert any("3.png" in line for line in catalogue.all_problems())


def test_damaged_labels_cost_no_video(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "a.mp4", frames=5)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "fixations.csv").write_text("frame,x,y\n0,here,there\n")
    (tmp_path / "b" / "maps").mkdir(parents=True)
    (tmp_path / "b" / "maps" / "0001.mat").symlink_to(tmp_path / "gone.mat")
    (tmp_path / "b" / "maps" / "0002.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "b" / "fixation").mkdir()
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    catalogue = scan(tmp_path)
    assert {id_: video.record.frames for id_, video in by_id(catalogue).items()} == {"a": 5, "b": 5}
    text = "\n".join(catalogue.all_problems())
    assert "a: " in text
    assert "fixations.csv, line 2" in text
    assert "b/maps/0001.mat: No such file" in text
    assert "b/maps/0002.png: No such file" in text


# A file of it


@pytest.mark.parametrize("kind", ["dhf1k", "hollywood2", "kinetics", "broken"])
def test_what_is_saved_is_what_is_read(
    scans: Callable[[Kind], Catalogue], tmp_path: Path, kind: Kind
) -> None:
    catalogue = scans(kind)
    catalogue.save(tmp_path / "c.jsonl")
    loaded = Catalogue.load(tmp_path / "c.jsonl")
    assert loaded == catalogue
    assert str(loaded) == str(catalogue)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    assert open_catalogue(tmp_path / "c.jsonl") == catalogue


def test_catalogue_names_the_videos_that_its_folder_does(
    scans: Callable[[Kind], Catalogue], miniatures: Miniatures, tmp_path: Path
) -> None:
    for kind in ("dhf1k", "hollywood2"):
        scans(kind).save(tmp_path / "c.jsonl")
        assert find_videos([tmp_path / "c.jsonl"]) == find_videos([miniatures(kind)])
        train = find_videos([tmp_path / "c.jsonl"], split="train")
        assert train == find_videos([miniatures(kind)], split="train")
        assert 0 < len(train) < len(find_videos([tmp_path / "c.jsonl"]))


def test_names_in_any_writing_are_kept(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "v" / 'Zoë\u2028 "日本"\n.mp4', frames=3)
    (tmp_path / "v" / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"")
    catalogue = scan(tmp_path / "v")
    catalogue.save(tmp_path / "c.jsonl")
    loaded = Catalogue.load(tmp_path / "c.jsonl")
    assert loaded == catalogue
    assert len(loaded.videos) == len(loaded.bad) == 1
    assert loaded.videos[0].record.absolute.is_file()
    for line in str(loaded).splitlines():
        line.encode()


@pytest.fixture
def saved(scans: Callable[[Kind], Catalogue], tmp_path: Path) -> Path:
    scans("broken").save(tmp_path / "c.jsonl")
    return tmp_path / "c.jsonl"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\x00\xff\xfe" * 50,
        b"[]\n",
        b"7\n",
        b"{}\n",
        b'{"video": "mine"}\n{"video": "yours"}\n',
        b'{"format": "tinyhd-catalogue", "version": 1, "kind": "salicon"}\n',
        b"[" * 5000,
    ],
)
def test_foreign_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        Catalogue.load(path)
    assert "c.jsonl, line 1: this is no catalogue" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_catalogue_is_refused(saved: Path) -> None:
    lines = saved.read_bytes().splitlines(keepends=True)
    saved.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DatasetError, match="is cut off: it has 5 of 6 videos"):
        Catalogue.load(saved)
    saved.write_bytes(b"".join(lines)[:-40])
    with pytest.raises(DatasetError, match="line 7: this is no catalogue, or a damaged one"):
        Catalogue.load(saved)


def test_catalogue_of_another_version_is_refused(saved: Path) -> None:
    saved.write_text(saved.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(DatasetError, match="of version 2, this program reads version 1"):
        Catalogue.load(saved)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up.mp4", "a/../../up.mp4", "..", 7, None])
@pytest.mark.parametrize("key", ["path", "id", "maps"])
def test_path_that_leads_out_of_the_data_set_is_refused(
    saved: Path, key: str, path: str | int | None
) -> None:
    """An id names a folder that is written to."""
    lines = saved.read_text().splitlines()
    item = json.loads(lines[1])
    (item["labels"] if key == "maps" else item)[key] = path
    saved.write_text("\n".join([lines[0], json.dumps(item), *lines[2:]]) + "\n")
    with pytest.raises(DatasetError, match=r"c\.jsonl, line 2"):
        Catalogue.load(saved)


def test_any_damage_is_one_error_or_none(saved: Path) -> None:
    rng = random.Random(0)
    odd = [None, -1, 1.5, "", "x", [], {}, [1], {"a": 1}, True, float("inf"), float("nan"), 2**70]
    whole = [json.loads(line) for line in saved.read_text().splitlines()]

    def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner: list[tuple[Any, object]] = []
        if isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, list):
            inner = list(enumerate(value))
        found = [path] if path else []
        for key, item in inner:
            found += places(item, (*path, key))
        return found

    for _ in range(600):
        lines = json.loads(json.dumps(whole))
        target, (*way, last) = lines, rng.choice(places(lines))
        for key in way:
            target = target[key]
        if isinstance(target, dict) and rng.random() < 0.3:
            del target[last]
        else:
            target[last] = rng.choice(odd)
        saved.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with suppress(DatasetError):
            catalogue = Catalogue.load(saved)
            str(catalogue)
            catalogue.all_problems()


def test_folder_that_cannot_be_written_to_is_told(
    scans: Callable[[Kind], Catalogue], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"cannot write .*c\.jsonl: No such file"):
        scans("dhf1k").save(tmp_path / "gone" / "c.jsonl")
    with pytest.raises(DatasetError, match=r"cannot read .*c\.jsonl: No such file"):
        Catalogue.load(tmp_path / "c.jsonl")


# Scanned again


def test_second_scan_decodes_nothing(
    miniatures: Miniatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYHD_CACHE", str(tmp_path / "cache"))
    first = scan(miniatures("hollywood2"))
    looked_at: list[str] = []

    def look(path: Path, *arguments: object) -> bytes:
        looked_at.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(probing, "hash_file", look)
    monkeypatch.setattr(probing, "PROGRAM", "raise SystemExit('not to be run')")
    assert scan(miniatures("hollywood2")) == first
    assert looked_at == []


def test_interrupt_does_not_wait_for_all_labels(
    miniatures: Miniatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(miniatures("dhf1k"))
    looked_at: list[GroundTruth] = []

    def look(truth: GroundTruth) -> LabelCensus:
        looked_at.append(truth)
        time.sleep(0.2)
        return LabelCensus()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(GroundTruth, "census", look)
    monkeypatch.setattr(Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scan(miniatures("dhf1k"))
    assert len(looked_at) < 4  # of 5


@pytest.mark.timeout(120)
def test_scan_that_was_stopped_goes_on(
    video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three videos two are learnt when it is interrupted at the third."""
    monkeypatch.setenv("TINYHD_CACHE", str(tmp_path / "cache"))
    root = Path(shutil.copytree(video_folder, tmp_path / "videos"))
    program = (
        "from stores import probing; import cli; "
        f"probing.PROGRAM = {SLOW_DECODER!r}; probing.KEEP_SECONDS = 0.0; "
        f"cli.cli(['data', 'scan', {str(root)!r}, '--out', {str(tmp_path / 'c.jsonl')!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    kept = 0
    while kept < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
        with suppress(sqlite3.Error):
            database = sqlite3.connect(tmp_path / "cache" / "probes.sqlite")
            kept = database.execute("SELECT COUNT(*) FROM probes").fetchone()[0]
            database.close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted; run the same command again to continue" in errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "c.jsonl").exists()
    looked_at: list[str] = []

    def look(path: Path, *arguments: object) -> bytes:
        looked_at.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(probing, "hash_file", look)
    catalogue = scan(root)
    assert looked_at == ["long.avi"]
    assert {id_: video.record.frames for id_, video in by_id(catalogue).items()} == {
        "long": 70,
        "short": 24,
        "sub/middle": 40,
    }


# Commands


def test_scan_command_says_what_it_found(run: Run, miniatures: Miniatures, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    result = run("data", "scan", miniatures("broken"), "--out", out)
    assert result.exit_code == 0, result.output
    assert "DHF1K in" in result.output
    assert "5 problems" in result.output
    assert BROKEN["truncated PNG"] in result.output
    assert f"catalogue: {out}" in result.output
    assert len(Catalogue.load(out).videos) == 6
    assert run("data", "scan", miniatures("broken"), "--out", out, "--strict").exit_code == 3
    assert run("data", "scan", miniatures("dhf1k"), "--out", out, "--strict").exit_code == 0


def test_catalogue_lies_where_it_is_made(
    run: Run, miniatures: Miniatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("data", "scan", miniatures("ucf")).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ucf.jsonl"]


def test_file_of_someone_else_is_not_written_over(
    run: Run, miniatures: Miniatures, tmp_path: Path
) -> None:
    out = tmp_path / "mine.jsonl"
    for content in ('{"prompt": "hello"}\n', "", "notes\n"):
        out.write_text(content)
        assert_one_line(run("data", "scan", miniatures("ucf"), "--out", out), 1, "mine.jsonl")
        assert out.read_text() == content
    assert_one_line(
        run("data", "scan", miniatures("ucf"), "--out", tmp_path / "a.txt"), 2, ".jsonl"
    )
    assert_one_line(run("data", "scan", tmp_path / "gone"), 2, "does not exist")


@pytest.mark.parametrize("damage", ["cut", "other version"])
def test_catalogue_that_cannot_be_read_can_be_made_anew(
    run: Run, miniatures: Miniatures, saved: Path, damage: str
) -> None:
    """By the command that the error names."""
    text = saved.read_text()
    cut, other = text[: len(text) // 2], text.replace('"version": 1', '"version": 0', 1)
    saved.write_text(cut if damage == "cut" else other)
    assert_one_line(run("distill", saved, "--teacher", "pqft", "--store", "t"), 1, "data scan")
    result = run("data", "scan", miniatures("ucf"), "--out", saved)
    assert result.exit_code == 0, result.output
    assert Catalogue.load(saved).kind == "ucf"


def test_place_that_cannot_be_written_to_is_told_before_the_scan(
    run: Run, miniatures: Miniatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was scanned")

    monkeypatch.setattr("stores.catalogue.scan", fail)
    out = tmp_path / "gone" / "c.jsonl"
    assert_one_line(run("data", "scan", miniatures("ucf"), "--out", out), 2, "gone")


@pytest.mark.parametrize(
    ("kind", "split", "lengths"),
    [
        ("hollywood2", "train", [20, 9, 1, 34]),
        ("hollywood2", "test", [18, 6]),
        ("ucf", "test", [18, 24]),
    ],
)
def test_sequences_are_labelled_however_short(
    run: Run,
    scans: Callable[[Kind], Catalogue],
    tmp_path: Path,
    kind: Kind,
    split: str,
    lengths: list[int],
) -> None:
    scans(kind).save(tmp_path / "c.jsonl")
    store = tmp_path / "t.zarr"
    arguments = ("distill", tmp_path / "c.jsonl", "--split", split, "--teacher", "pqft")
    result = run(*arguments, "--store", store, *SMALL)
    assert result.exit_code == 0, result.output
    assert f"{len(lengths)} videos complete" in result.output
    assert f"{sum(lengths)} frames labelled" in result.output
    assert "nothing to do" in run(*arguments, "--store", store, *SMALL).output
    target = TargetStore.open(store)
    labels = target.label_set()
    for video, length in zip(scans(kind).choose(split), lengths, strict=True):
        record = target.video(video.record.id)
        assert (record.frames, record.path) == (length, video.record.path)
        planes = labels.read(video.record.id, 0, length)
        assert all(len(values) == length for values in planes.values())
        assert all(np.isfinite(values).all() for values in planes.values())


def test_sequence_with_a_damaged_image_is_labelled(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "frames" / "s"
    for number in range(20):
        write_png(folder / f"{number}.png", np.full((32, 32, 3), 10 * number, np.uint8))
    (folder / "0.png").write_bytes(b"")
    assert run("data", "scan", tmp_path / "frames", "--out", tmp_path / "c.jsonl").exit_code == 0
    store = tmp_path / "t.zarr"
    command = ("distill", tmp_path / "c.jsonl", "--teacher", "pqft", "--store", store, *SMALL)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "19 frames labelled" in result.output


def test_unknown_split_of_a_catalogue_is_one_line(run: Run, saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "t.zarr"
    result = run("distill", saved, "--split", "valid", "--teacher", "pqft", "--store", store)
    assert_one_line(result, 1, "no split 'valid'", "train, train540, val")
    assert not store.exists()
