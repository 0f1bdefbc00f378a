"""Folders are recognised as the data sets that they are, with their ids, splits and labels."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stores.datasets import Dataset, DatasetVideo, LabelFolders, dhf1k_splits, find_dataset
from stores.errors import DatasetError, VideoError
from stores.finding import find_videos
from tests.miniature import KINETICS, Kind, Layout, relayout_dhf1k

if TYPE_CHECKING:
    Miniatures = Callable[[Kind], Path]

IMAGE = b"not looked into"


def touch(root: Path, *paths: str) -> Path:
    """Make files that nobody opens."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(IMAGE)
    return root


def by_id(dataset: Dataset) -> dict[str, DatasetVideo]:
    found = {video.file.id: video for video in dataset.videos}
    assert len(found) == len(dataset.videos)
    return found


def ids(videos: Iterable[DatasetVideo]) -> list[str]:
    return [video.file.id for video in videos]


def official(number: int) -> str:
    return "train" if number <= 600 else "val" if number <= 700 else "test"


# DHF1K


def test_dhf1k_as_downloaded(miniatures: Miniatures) -> None:
    dataset = find_dataset(miniatures("dhf1k"))
    assert dataset.kind == "dhf1k"
    assert dataset.problems == []
    assert ids(dataset.videos) == ["0001", "0002", "0003", "0601", "0602", "0701"]
    for id_, video in by_id(dataset).items():
        number = int(id_)
        assert video.file.path == f"video/{number:03d}.AVI"
        assert official(number) in video.splits
        base = f"annotation/{id_}"
        there = LabelFolders(f"{base}/maps", f"{base}/fixation", offset=1)
        assert video.labels == (LabelFolders() if number == 701 else there)
    assert ids(dataset.choose("val")) == ["0601", "0602"]
    assert ids(dataset.choose("test")) == ["0701"]
    assert dataset.choose(None) == dataset.videos


@pytest.fixture(scope="module")
def layouts(
    miniatures: Miniatures, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout], Path]:
    """Give one video of each split in the layout of another project."""
    few = tmp_path_factory.mktemp("few") / "DHF1K"
    (few / "video").mkdir(parents=True)
    for name in ("003", "601", "701"):
        shutil.copy(miniatures("dhf1k") / "video" / f"{name}.AVI", few / "video")
        if name != "701":
            labels = miniatures("dhf1k") / "annotation" / f"0{name}"
            shutil.copytree(labels, few / "annotation" / f"0{name}")
    roots: dict[Layout, Path] = {}

    def make(layout: Layout) -> Path:
        if layout not in roots:
            root = tmp_path_factory.mktemp("layouts") / layout
            roots[layout] = relayout_dhf1k(few, root, layout)
        return roots[layout]

    return make


@pytest.mark.parametrize(
    ("layout", "images", "labels"),
    [
        ("vinet", "{split}/{id}/images", "{split}/{id}"),
        ("unisal", "annotation/{id}/images", "annotation/{id}"),
        ("hd2s", "{split}/frames/{id}", "{split}/annotation/{id}"),
        ("hd2s-raw", "{split}/frames/{number:03d}", "{split}/annotation/{id}"),
        ("tased", "video/{id}", "annotation/{id}"),
    ],
)
def test_dhf1k_as_other_projects_lay_it_out(
    layouts: Callable[[Layout], Path], layout: Layout, images: str, labels: str
) -> None:
    dataset = find_dataset(layouts(layout))
    assert dataset.kind == "dhf1k"
    assert dataset.problems == []
    assert ids(dataset.videos) == ["0003", "0601", "0701"]
    for id_, video in by_id(dataset).items():
        words = {"split": official(int(id_)), "id": id_, "number": int(id_)}
        assert official(int(id_)) in video.splits
        assert video.file.path == images.format(**words)
        if id_ != "0701":
            base = labels.format(**words)
            assert video.labels == LabelFolders(f"{base}/maps", f"{base}/fixation")
        else:
            assert not video.labels


@pytest.mark.parametrize("layout", ["vinet", "hd2s", "hd2s-raw"])
def test_folder_of_one_split_is_the_data_set_too(
    layouts: Callable[[Layout], Path], layout: Layout
) -> None:
    dataset = find_dataset(layouts(layout) / "val")
    (video,) = dataset.videos
    assert (dataset.kind, video.file.id, video.splits) == ("dhf1k", "0601", ("val",))
    assert video.labels.maps
    assert video.labels.fixations


def test_folders_of_labels_are_matched_by_number(tmp_path: Path) -> None:
    touch(tmp_path, "video/7.avi", "video/1000.AVI", "annotation/00007/maps/0001.png")
    videos = by_id(find_dataset(tmp_path))
    assert videos["0007"].labels.maps == "annotation/00007/maps"
    assert videos["1000"].splits == ("test",)


def test_archive_that_was_not_unpacked_whole_is_told(tmp_path: Path) -> None:
    touch(tmp_path, *(f"video/{number:03d}.AVI" for number in (1, 2, 3, 601, 701)))
    touch(tmp_path, "annotation/0001/maps/0001.png", "annotation/0050/maps/0001.png")
    first, second = find_dataset(tmp_path).problems
    assert "3 videos without recorded eyes" in first
    assert "(0002, 0003, 0601)" in first
    assert "1 videos with labels have no video (0050)" in second


def test_two_videos_of_one_number_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "video/001.AVI", "video/0001.avi", "annotation/0001/maps/0001.png")
    dataset = find_dataset(tmp_path)
    assert ids(dataset.videos) == ["0001"]
    assert any("0001.avi" in line and "001.AVI" in line for line in dataset.problems)


@pytest.mark.parametrize(
    "paths",
    [
        ("videos/001.avi", "videos/holiday.avi"),
        ("videos/001.mp4", "videos/002.mp4"),
        ("video/1.avi", "video/2.avi"),
        ("001.avi", "002.avi"),
        ("2023/001.avi", "2024/001.avi"),
        ("frames/0001/0001.png", "frames/0002/0001.png"),
    ],
)
def test_own_videos_are_not_taken_for_dhf1k(tmp_path: Path, paths: tuple[str, ...]) -> None:
    dataset = find_dataset(touch(tmp_path, *paths))
    assert dataset.kind == "plain"
    assert all(not video.splits for video in dataset.videos)


@pytest.mark.parametrize(
    ("paths", "strangers"),
    [
        (("videos/0001.avi", "more/x.mp4", "y.mp4"), ["more/x.mp4", "y.mp4"]),
        (("train/c/abcdefghijk_000001_000002.mp4", "train/c/sub/z.mkv"), ["train/c/sub/z.mkv"]),
        (("testing/Lifting-001/images/1.png", "testing/making-of.mp4"), ["testing/making-of.mp4"]),
    ],
)
def test_videos_that_are_passed_over_are_told(
    tmp_path: Path, paths: tuple[str, ...], strangers: list[str]
) -> None:
    dataset = find_dataset(touch(tmp_path, *paths))
    assert len(dataset.videos) == 1
    (problem,) = dataset.problems
    assert problem.startswith(f"{len(strangers)} videos are not of ")
    assert all(name in problem for name in strangers)
    assert "--kind plain" in problem
    assert len(find_dataset(tmp_path, "plain").videos) == len(paths)


# Splits


def test_own_split_of_the_training_videos_can_be_made_anew() -> None:
    val60 = {int(n) + 1 for n in np.random.default_rng(0).permutation(600)[:60]}
    splits = {number: dhf1k_splits(number) for number in range(1, 1001)}
    found = {n for n, names in splits.items() if "val60" in names}
    assert found == val60
    assert {n for n, names in splits.items() if "train540" in names} == {*range(1, 601)} - val60
    assert len(val60) == 60
    assert all((official(number) in names) for number, names in splits.items())
    assert all(len(names) == (2 if number <= 600 else 1) for number, names in splits.items())
    assert dhf1k_splits(0) == dhf1k_splits(1001) == ()


def test_stated_recipe_is_the_one_that_is_shipped() -> None:
    path = Path(__file__).parents[2] / "stores" / "splits" / "dhf1k.json"
    val60 = json.loads(path.read_text())["val60"]
    assert "numpy.random.default_rng(0).permutation(600), plus 1" in val60["made by"]
    assert val60["numbers"] == sorted(np.random.default_rng(0).permutation(600)[:60] + 1)


def test_unknown_split_says_which_there_are(miniatures: Miniatures, tmp_path: Path) -> None:
    dataset = find_dataset(miniatures("dhf1k"))
    with pytest.raises(DatasetError) as caught:
        dataset.choose("vali")
    assert "has no split 'vali'; it has test, train, train540, val" in str(caught.value)
    touch(tmp_path, "a.mp4")
    with pytest.raises(DatasetError, match="no split 'val'; it has no splits"):
        find_dataset(tmp_path).choose("val")
    with pytest.raises(DatasetError, match=r"a\.mp4 is a single file, which has no split 'val'"):
        find_videos([tmp_path / "a.mp4"], split="val")


# Hollywood-2 and UCF-Sports


def test_hollywood2(miniatures: Miniatures) -> None:
    dataset = find_dataset(miniatures("hollywood2"))
    assert (dataset.kind, dataset.problems) == ("hollywood2", [])
    train = [f"actioncliptrain00001_{shot}" for shot in (1, 2, 3, 10)]
    test = [f"actioncliptest00001_{shot}" for shot in (1, 2)]
    assert ids(dataset.choose("train")) == train
    assert ids(dataset.choose("test")) == test
    for id_, video in by_id(dataset).items():
        place = "training" if "train" in id_ else "testing"
        assert video.file.path == f"{place}/{id_}/images"
        assert video.labels == LabelFolders(f"{place}/{id_}/maps", f"{place}/{id_}/fixation")


def test_ucf(miniatures: Miniatures) -> None:
    dataset = find_dataset(miniatures("ucf"))
    assert (dataset.kind, dataset.problems) == ("ucf", [])
    assert ids(dataset.choose("train")) == ["Lifting-003", "Run-Side-005"]
    assert ids(dataset.choose("test")) == ["Kicking-Front-001", "Run-Side-001"]
    assert by_id(dataset)["Lifting-003"].file.path == "training/Lifting-003/images"


@pytest.mark.parametrize(
    ("kind", "place", "split", "count"),
    [
        ("hollywood2", "training", "train", 4),
        ("hollywood2", "testing", "test", 2),
        ("ucf", "training", "train", 2),
        ("ucf", "testing", "test", 2),
    ],
)
def test_one_split_of_sequences_knows_which_it_is(
    miniatures: Miniatures, kind: Kind, place: str, split: str, count: int
) -> None:
    dataset = find_dataset(miniatures(kind) / place)
    assert dataset.kind == kind
    assert len(dataset.choose(split)) == len(dataset.videos) == count


@pytest.mark.parametrize("place", ["TRAINING", "Train", "train"])
def test_splits_are_known_in_any_spelling(tmp_path: Path, place: str) -> None:
    touch(tmp_path, f"{place}/actioncliptrain00002_1/images/a.PNG", f"{place}/Thumbs.db")
    dataset = find_dataset(tmp_path)
    assert (dataset.kind, dataset.videos[0].splits) == ("hollywood2", ("train",))


def test_shots_that_lost_their_split_know_it_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "actioncliptest00002_1/images/a.png", "actioncliptrain00002_1/images/a.png")
    dataset = find_dataset(tmp_path)
    assert [video.splits for video in dataset.videos] == [("test",), ("train",)]


def test_one_name_in_two_splits_is_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/Run-Side-001/images/a.png" for split in ("training", "testing")))
    touch(tmp_path, "testing/Run-Side-002/images/a.png")
    assert ids(find_dataset(tmp_path).videos) == [
        *("Run-Side-002", "test/Run-Side-001", "train/Run-Side-001")
    ]
    assert len(find_videos([tmp_path])) == 3


def test_labels_without_images_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "training/Lifting-001/images/a.png", "training/Lifting-002/maps/a.png")
    dataset = find_dataset(tmp_path)
    assert ids(dataset.videos) == ["Lifting-001"]
    assert dataset.problems == ["training/Lifting-002 has labels, but no images"]


def test_own_images_are_not_taken_for_ucf(tmp_path: Path) -> None:
    touch(tmp_path, "train/my-walk-001/images/1.png", "train/my-walk-002/images/1.png", "b.mp4")
    dataset = find_dataset(tmp_path)
    assert dataset.kind == "plain"
    assert ids(dataset.videos) == ["b", "train/my-walk-001", "train/my-walk-002"]


@pytest.mark.parametrize("id_", ["../up", "/up", "a/../../up", ".", ".."])
def test_id_of_a_list_leads_nowhere(tmp_path: Path, id_: str) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_text(f"path,id\na.mp4,{id_}\n")
    with pytest.raises(VideoError, match=r"list\.csv, line 2: the id .* would lead out"):
        find_videos([], [tmp_path / "list.csv"])


# Kinetics


def test_kinetics(miniatures: Miniatures) -> None:
    dataset = find_dataset(miniatures("kinetics"))
    assert dataset.kind == "kinetics"
    found = by_id(dataset)
    assert set(found) == {upload.path.removesuffix(".mp4") for upload in KINETICS}
    for id_, video in found.items():
        assert video.splits == ("train" if id_.startswith("train_256") else "val",)
        assert video.file.absolute.is_file()
    assert found["val_256/riding a bike/-valBikes01_000002_000012"].labels == LabelFolders()


def test_kinetics_in_one_folder_with_odd_names(tmp_path: Path) -> None:
    names = [
        "-a b'c\"d(e)f_000001_000011",
        "_bcdefghijk_000001_000011",
        "abc_def-hij_000001_000011",
    ]
    touch(tmp_path, *(f"train/{name}.mp4" for name in names))
    touch(tmp_path, 'val/person\'s "class"; (a & b)/short name.MP4', "annotations/train.csv")
    names = [name for name in names if len(name) == 25]
    dataset = find_dataset(tmp_path)
    assert dataset.kind == "kinetics"
    assert {f"train/{name}" for name in names} < set(by_id(dataset))
    assert ids(dataset.choose("val")) == ['val/person\'s "class"; (a & b)/short name']
    assert all(video.file.absolute.is_file() for video in dataset.videos)


def test_own_folders_of_splits_are_not_taken_for_kinetics(tmp_path: Path) -> None:
    touch(tmp_path, "train/dogs/one.mp4", "val/dogs/two.mp4", "other/three.mp4")
    dataset = find_dataset(tmp_path)
    assert dataset.kind == "plain"
    assert [video.splits for video in dataset.videos] == [(), ("train",), ("val",)]


# Plain folders


def test_plain_folder(miniatures: Miniatures) -> None:
    dataset = find_dataset(miniatures("plain"))
    assert dataset.kind == "plain"
    assert {video.file.id: video.file.path for video in dataset.videos} == {
        "frames/seq1": "frames/seq1",
        "videos/a": "videos/a.mp4",
        "videos/sub/b": "videos/sub/b.AVI",
    }


def test_labels_lie_beside_plain_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a/maps/0001.png", "a/fixations/0001.png", "a/fixations.csv")
    touch(tmp_path, "val/s/images/1.png", "val/s/maps/1.png", "t/1.jpg", "t/fixation/1.png")
    found = by_id(find_dataset(tmp_path))
    assert found["a"].labels == LabelFolders("a/maps", "a/fixations", "a/fixations.csv")
    assert found["val/s"].file.path == "val/s/images"
    assert found["val/s"].labels == LabelFolders("val/s/maps")
    assert found["val/s"].splits == ("val",)
    assert found["t"].labels == LabelFolders(fixations="t/fixation")
    assert set(found) == {"a", "val/s", "t"}


def test_images_of_the_root_are_called_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "walk/images/1.png", "walk/maps/1.png")
    (video,) = find_dataset(tmp_path / "walk").videos
    assert (video.file.id, video.file.path, video.labels.maps) == ("walk", "images", "maps")
    touch(tmp_path, "run/1.png", "run/maps/1.png")
    (video,) = find_dataset(tmp_path / "run").videos
    assert (video.file.id, video.labels.maps) == ("run", "maps")
    assert video.file.absolute == (tmp_path / "run").resolve()


def test_covers_beside_videos_are_no_video(tmp_path: Path) -> None:
    touch(tmp_path, "film/film.mkv", "film/cover.jpg")
    assert ids(find_dataset(tmp_path).videos) == ["film/film"]


def test_videos_that_would_be_called_the_same_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a.webm")
    with pytest.raises(VideoError, match="would both be called 'a'"):
        find_videos([tmp_path])


def test_name_of_dots_alone_leads_nowhere(tmp_path: Path) -> None:
    """A video called ``..`` would have its maps written beside the folder that they belong in."""
    touch(tmp_path, "sub/...mp4", "...avi", "..mkv", "a.mp4")
    for id_ in ids(find_dataset(tmp_path).videos):
        assert not {".", ".."} & set(id_.split("/"))
        assert os.path.normpath(id_) == id_


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "clips/a.mp4")
    (tmp_path / "clips" / "up").symlink_to(tmp_path)
    assert ids(find_dataset(tmp_path).videos) == ["clips/a"]


def test_links_that_lead_nowhere_hinder_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert ids(find_dataset(tmp_path).videos) == ["a"]


# Around all of them


@pytest.mark.parametrize("kind", ["dhf1k", "hollywood2", "ucf", "kinetics"])
def test_folder_around_a_data_set_and_junk_do_not_matter(
    miniatures: Miniatures, tmp_path: Path, kind: Kind
) -> None:
    outer = tmp_path / "outer" / "inner"
    outer.mkdir(parents=True)
    shutil.copytree(miniatures(kind), outer / "set", copy_function=os.link)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        touch(folder, "Thumbs.db", ".DS_Store", "._001.AVI", "._0001.png")
        touch(folder, "__MACOSX/video/001.AVI", "__MACOSX/0001.png")
    found, plain = find_dataset(tmp_path), find_dataset(miniatures(kind))
    assert found.kind == plain.kind == kind
    assert found.root == outer.resolve() / "set"
    assert found.problems == plain.problems == []
    assert [(v.file.id, v.file.path, v.splits, v.labels) for v in found.videos] == [
        (v.file.id, v.file.path, v.splits, v.labels) for v in plain.videos
    ]


def test_kind_can_be_told(miniatures: Miniatures, tmp_path: Path) -> None:
    root = miniatures("dhf1k")
    assert find_dataset(root, "plain").kind == "plain"
    assert ids(find_dataset(root, "plain").videos)[0] == "video/001"
    with pytest.raises(DatasetError, match="not laid out as UCF-Sports"):
        find_dataset(root, "ucf")
    with pytest.raises(DatasetError, match="no kind 'salicon' of data sets; there are dhf1k"):
        find_dataset(root, "salicon")  # type: ignore[arg-type]


def test_folder_without_videos_and_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "Thumbs.db", "maps/0001.png")
    with pytest.raises(DatasetError, match=r"no videos in .*\.mp4.*\.png"):
        find_dataset(tmp_path)
    for path in (tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(DatasetError, match="is no folder"):
            find_dataset(path)


def test_each_folder_is_looked_into_once(
    miniatures: Miniatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a share over the network every look costs; kinds that do not fit look at the same."""
    looked: list[str] = []
    scandir = os.scandir

    def look(path: Path) -> Iterator[os.DirEntry[str]]:
        looked.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    find_dataset(miniatures("kinetics"))
    assert sorted(looked) == sorted(set(looked))
    assert len(looked) == 7
