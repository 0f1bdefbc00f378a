"""Recorded eyes are those of their frame; what does not fit is told, with the file's name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from stores.catalogue import scan
from stores.datasets import DatasetVideo, LabelFolders, find_dataset
from stores.decode import decode_spans, decode_video, index_video
from stores.errors import GroundTruthError
from stores.ground_truth import (
    GroundTruth,
    fixation_map,
    move_points,
    resize_fixations,
)
from stores.images import list_images
from stores.pairing import pair_labels
from tests.miniature import (
    BROKEN,
    DHF1K,
    NUMBERED,
    NUMBERED_FRAMES,
    NUMBERED_SIZE,
    Kind,
    make_numbered,
    read_number,
    relayout_dhf1k,
    write_mat,
    write_png,
)

if TYPE_CHECKING:
    Miniatures = Callable[[Kind], Path]

VIDEOS = tuple(NUMBERED)
WIDTH, HEIGHT = NUMBERED_SIZE


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_numbered(tmp_path_factory.mktemp("numbered"))


def video_of(root: Path, number: int) -> DatasetVideo:
    return next(v for v in find_dataset(root).videos if v.file.id == f"{number:04d}")


def truth_of(
    root: Path, number: int, frames: int, size: tuple[int, int] | None = None
) -> GroundTruth:
    video = video_of(root, number)
    folder = video.file.absolute
    names = list_images(folder) if folder.is_dir() else None
    return GroundTruth(video.file.root, video.labels, frames=frames, names=names, size=size)


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., GroundTruth]:
    """Write maps and fixations whose value is their number, and give the truth of a video."""

    def make(
        frames: int,
        maps: list[int],
        fixations: list[int] | None = None,
        names: list[str] | None = None,
        size: tuple[int, int] | None = (6, 8),
    ) -> GroundTruth:
        for number in maps:
            write_png(tmp_path / "maps" / f"{number:04d}.png", np.full((6, 8), number, np.uint8))
        for number in maps if fixations is None else fixations:
            points = np.zeros((6, 8), np.uint8)
            points[number // 8, number % 8] = 255
            write_png(tmp_path / "fixation" / f"{number:04d}.png", points)
        folders = LabelFolders("maps", "fixation")
        return GroundTruth(tmp_path, folders, frames=frames, names=names, size=size)

    return make


def place(fixations: np.ndarray | None) -> int:
    """Return the number that ``labels`` wrote as the place of the only fixation."""
    assert fixations is not None
    assert fixations.sum() == 1
    return int(np.flatnonzero(fixations)[0])


# Pairing


@pytest.mark.parametrize("video", VIDEOS)
def test_frame_map_and_fixations_carry_one_number(numbered: Path, video: str) -> None:
    first, count = NUMBERED[video], NUMBERED_FRAMES[video]
    truth = truth_of(numbered, int(video), count, (HEIGHT, WIDTH))
    assert truth.frames == list(range(count))
    frames = list(decode_video(video_of(numbered, int(video)).file.absolute))
    assert len(frames) == count
    for index, frame in enumerate(frames):
        density, fixations = truth.read(index)
        assert density is not None
        assert fixations is not None
        assert read_number(frame) == read_number(density) == read_number(fixations) == first + index
        assert density.dtype == np.uint8
        assert fixations.dtype == np.bool_
        assert truth.name_of(index) == f"{index + 1:04d}"


@pytest.mark.parametrize("video", VIDEOS)
def test_frames_in_the_middle_carry_their_number(numbered: Path, video: str) -> None:
    path = video_of(numbered, int(video)).file.absolute
    seen = index_video(path)
    truth = truth_of(numbered, int(video), seen.frames)
    spans = [range(2, 4), range(11, 14), range(20, 22)]
    given = list(decode_spans(path, spans, size=(HEIGHT, WIDTH), index=seen.frame_index))
    assert [number for number, _ in given] == [2, 3, 11, 12, 13, 20, 21]
    for number, frame in given:
        density = truth.read_density(number)
        assert density is not None
        assert read_number(frame) == read_number(density) == NUMBERED[video] + number


def test_damaged_images_move_nothing(numbered: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(numbered, tmp_path / "set"))
    folder = root / "video" / "0002"
    (folder / "0001.png").write_bytes(b"")
    cut = folder / "0010.png"
    cut.write_bytes(cut.read_bytes()[:100])
    seen = index_video(folder)
    assert seen.frame_index is not None
    names = [f"{number:04d}.png" for number in range(1, 24) if number not in (1, 10)]
    labels = video_of(root, 2).labels
    truth = GroundTruth(root, labels, frames=seen.frames, names=names)
    given = list(decode_spans(folder, [range(5, 21)], size=(HEIGHT, WIDTH), index=seen.frame_index))
    for number, frame in given:
        density, fixations = truth.read(number)
        assert density is not None
        assert fixations is not None
        wanted = 1000 + int(names[number][:4]) - 1
        assert read_number(frame) == read_number(density) == read_number(fixations) == wanted


@pytest.fixture(scope="module")
def offset_layout(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HD2S counts images from 0 with five digits, labels from 1 with four."""
    root = tmp_path_factory.mktemp("source")
    (root / "video").mkdir()
    shutil.copy(numbered / "video" / "001.AVI", root / "video")
    shutil.copytree(numbered / "annotation" / "0001", root / "annotation" / "0001")
    return relayout_dhf1k(root, tmp_path_factory.mktemp("hd2s") / "set", "hd2s")


@pytest.mark.parametrize("without", ["", "fixation", "fixation/maps"])
def test_labels_with_an_offset_are_those_of_their_frame(
    offset_layout: Path, tmp_path: Path, without: str
) -> None:
    """Be fixations images, MATLAB files, or both."""
    root = Path(shutil.copytree(offset_layout, tmp_path / "set"))
    folder = root / "train" / "annotation" / "0001" / without
    if without:
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
    truth = truth_of(root, 1, 40)
    for index, frame in enumerate(decode_video(video_of(root, 1).file.absolute)):
        density, fixations = truth.read(index)
        assert density is not None
        assert fixations is not None
        assert read_number(frame) == read_number(density) == read_number(fixations) == index


def test_damaged_images_do_not_part_the_others_from_their_labels(offset_layout: Path) -> None:
    video = video_of(offset_layout, 1)
    names = list_images(video.file.absolute)
    dropped = [names.pop(30), names.pop(0)]
    truth = GroundTruth(offset_layout, video.labels, frames=38, names=names, dropped=dropped)
    for index, name in enumerate(names):
        density, fixations = truth.read(index)
        assert density is not None
        assert fixations is not None
        assert read_number(density) == read_number(fixations) == int(name.removesuffix(".png"))
    assert "2 of 40 maps belong to none of the 38 frames" in truth.census().problems[0]


@pytest.mark.parametrize("image_digits", [4, 5])
def test_no_label_is_given_to_another_frame_where_some_of_both_are_missing(
    image_digits: int,
) -> None:
    """As many labels as images does not mean that they belong together."""
    images = [f"{number:0{image_digits}d}.png" for number in range(40) if number != 5]
    stems = [f"{number:04d}" for number in range(1, 41) if number != 10]
    offsets = {
        int(stem) - int(images[frame].removesuffix(".png"))
        for stem, frame in zip(stems, pair_labels(stems, 39, images), strict=True)
        if frame is not None
    }
    assert len(offsets) <= 1


def test_numbers_of_one_offset_are_paired_in_order_whatever_their_digits() -> None:
    for first, digits in ((0, 5), (1, 5), (7, 3)):
        images = [f"{first + number:0{digits}d}.png" for number in range(30)]
        stems = [f"{number:04d}" for number in range(1, 31)]
        assert pair_labels(stems, 30, images) == list(range(30))


def test_labels_of_images_are_paired_by_name() -> None:
    names = ["clip_00042.png", "clip_00043.jpg", "clip_00045.png"]
    assert pair_labels(["clip_00043", "clip_00044"], 3, names) == [1, None]
    assert pair_labels(["clip_00043", "clip_00044", "clip_00045"], 3, names) == [1, None, 2]
    assert pair_labels(["m_1", "m_2", "m_3"], 3, names) == [0, 1, 2]


def test_labels_of_videos_are_paired_by_number() -> None:
    assert pair_labels(["0001", "0003", "0004", "x"], 3, None) == [0, 2, None, None]
    assert pair_labels(["00000", "00002"], 3, None) == [0, 2]
    assert pair_labels(["1", "²", "-1", "٣"], 3, None) == [0, None, None, None]


def test_shots_are_paired_by_name(miniatures: Miniatures) -> None:
    """Their numbers run through the whole movie."""
    dataset = find_dataset(miniatures("hollywood2"))
    for video in dataset.videos:
        names = list_images(video.file.absolute)
        truth = GroundTruth(dataset.root, video.labels, frames=len(names), names=names)
        assert truth.frames == list(range(len(names)))
        folder = dataset.root / video.labels.maps
        for index, name in enumerate(names):
            assert truth.name_of(index) == Path(name).stem
            with Image.open(folder / name) as image:
                np.testing.assert_array_equal(truth.read_density(index), np.asarray(image))


# What is missing, or more than there should be


def test_more_frames_than_labels(labels: Callable[..., GroundTruth]) -> None:
    truth = labels(5, [1, 2, 4])
    assert truth.frames == [0, 1, 3]
    assert truth.read(2) == (None, None)
    assert truth.name_of(2) == "0003"
    census = truth.census()
    assert (census.maps, census.fixations, census.labelled) == (3, 3, 3)
    assert census.problems == ("5 frames, 3 of them with labels",)


def test_more_labels_than_frames(labels: Callable[..., GroundTruth]) -> None:
    truth = labels(2, [1, 2, 3, 4])
    assert truth.frames == [0, 1]
    census = truth.census()
    assert (census.maps, census.labelled) == (2, 2)
    maps, fixations = census.problems
    assert "2 of 4 maps belong to none of the 2 frames: maps/0003.png, maps/0004.png" in maps
    assert "2 of 4 fixation maps belong to none" in fixations


def test_maps_without_fixations_and_the_reverse(labels: Callable[..., GroundTruth]) -> None:
    truth = labels(4, [1, 2], [2, 3])
    read = [truth.read(frame) for frame in range(4)]
    assert [int(density[0, 0]) if density is not None else 0 for density, _ in read] == [1, 2, 0, 0]
    assert [fixations is not None for _, fixations in read] == [False, True, True, False]
    assert place(read[2].fixations) == 3
    census = truth.census()
    assert (census.maps, census.fixations, census.labelled) == (2, 2, 3)
    assert truth.name_of(2) == "0003"


def test_video_without_labels(tmp_path: Path) -> None:
    truth = GroundTruth(tmp_path, LabelFolders(), frames=3)
    assert truth.frames == []
    assert truth.read(0) == (None, None)
    assert truth.census().problems == ()
    assert not truth.has_observers


def test_every_defect_of_the_broken_data_set_is_told(miniatures: Miniatures) -> None:
    root = miniatures("broken")
    sizes = {number: span.stop - span.start for number, span in DHF1K.items()}
    truths = {n: truth_of(root, n, sizes[n], (90, 160)) for n in (1, 2, 3, 601, 602)}
    censuses = {number: truth.census() for number, truth in truths.items()}
    problems = {number: " ".join(census.problems) for number, census in censuses.items()}
    assert problems[1] == "40 frames, 39 of them with labels"
    assert truths[1].read(39) == (None, None)
    assert problems[2] == f"{root / BROKEN['truncated PNG']} is cut off"
    with pytest.raises(GroundTruthError, match=r"0002/maps/0030\.png.*damaged"):
        truths[2].read(29)
    assert truths[2].read(28).density is not None
    assert problems[3] == ""
    density, fixations = truths[3].read(4)
    with Image.open(miniatures("dhf1k") / BROKEN["RGB map"]) as image:
        np.testing.assert_array_equal(density, np.asarray(image))
    assert fixations is not None
    assert BROKEN["extra label"] in problems[601]
    assert "1 of 49 maps belong to none of the 48 frames" in problems[601]
    for what in (BROKEN["map of another size"], "0602/fixation/0007.png", "45x80", "90x160"):
        assert what in problems[602]
    with pytest.raises(GroundTruthError, match=r"0007\.png is 45x80, and frame 6 .* 90x160"):
        truths[602].read(6)
    assert [censuses[n].maps for n in truths] == [39, 59, 25, 48, 41]
    assert [censuses[n].labelled for n in truths] == [39, 59, 25, 48, 41]


def test_sizes_that_differ_from_the_video_name_the_file(labels: Callable[..., GroundTruth]) -> None:
    truth = labels(2, [1, 2], size=(12, 16))
    with pytest.raises(GroundTruthError, match=r"maps/0001\.png is 6x8, and frame 0 .* 12x16"):
        truth.read(0)
    assert truth.census().labelled == 0
    assert len(truth.census().problems) == 2
    named = labels(2, [1, 2], names=["0001.png", "0002.png"], size=(12, 16))
    with pytest.raises(GroundTruthError, match=r"0002\.png is 6x8, and 0002\.png of its video"):
        named.read(1)


# Kinds of files


def test_matlab_files_stand_in_for_images(numbered: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(numbered, tmp_path / "set"))
    for number in (3, 4):
        (root / "annotation" / "0001" / "fixation" / f"{number:04d}.png").unlink()
    truth = truth_of(root, 1, 40)
    for index in range(40):
        fixations = truth.read_fixations(index)
        assert fixations is not None
        assert fixations.dtype == np.bool_
        assert read_number(fixations) == index
    assert truth.census().fixations == 40


def test_matlab_files_beside_maps_are_fixations(tmp_path: Path) -> None:
    """As the data set's own description has it."""
    points = np.zeros((6, 8), np.bool_)
    points[2, 3] = True
    write_mat(tmp_path / "maps" / "0001.mat", points)
    (tmp_path / "fixation").mkdir()
    truth = GroundTruth(tmp_path, LabelFolders("maps", "fixation"), frames=1)
    np.testing.assert_array_equal(truth.read(0).fixations, points)


@pytest.mark.parametrize("content", ["damaged", "empty", "other variable", "three axes", "text"])
def test_matlab_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fixation" / "0001.mat"
    write_mat(path, np.ones((6, 8), np.bool_))
    if content == "damaged":
        path.write_bytes(path.read_bytes()[:150])
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "other variable":
        savemat(path, {"J": np.ones((6, 8))})
    elif content == "three axes":
        savemat(path, {"I": np.ones((6, 8, 3))})
    else:
        savemat(path, {"I": "where eyes landed"})
    truth = GroundTruth(tmp_path, LabelFolders(fixations="fixation"), frames=1)
    with pytest.raises(GroundTruthError) as caught:
        truth.read(0)
    assert str(path) in str(caught.value)
    if content == "empty":
        assert truth.census().problems == (f"{path} is empty",)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["maps/0001.png", "fixation/0001.mat", "fixations.csv"])
def test_pipes_are_told_and_not_waited_for(tmp_path: Path, name: str) -> None:
    for folder in ("maps", "fixation"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / name)
    points = name if name.endswith(".csv") else ""
    truth = GroundTruth(tmp_path, LabelFolders("maps", "fixation", points), frames=1)
    with pytest.raises(GroundTruthError, match="is no regular file"):
        truth.read(0)
    if not points:
        assert len(truth.census().problems) == 1
        assert truth.census().labelled == 0


def test_sixteen_bits_of_a_map_are_kept(tmp_path: Path) -> None:
    density = (np.arange(48).reshape(6, 8) * 1300).astype(np.uint16)
    write_png(tmp_path / "maps" / "0001.png", density)  # type: ignore[arg-type]
    truth = GroundTruth(tmp_path, LabelFolders("maps"), frames=1, size=(6, 8))
    read = truth.read_density(0)
    assert read is not None
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, density)
    assert truth.census().problems == ()


def test_map_of_three_channels_is_its_first(tmp_path: Path) -> None:
    density = np.arange(48, dtype=np.uint8).reshape(6, 8)
    write_png(tmp_path / "maps" / "0001.png", np.dstack([density, 255 - density, density * 0]))
    truth = GroundTruth(tmp_path, LabelFolders("maps"), frames=1)
    np.testing.assert_array_equal(truth.read_density(0), density)


# Tables of points


def table(folder: Path, text: str, *, frames: int = 4, encoding: str = "utf-8") -> GroundTruth:
    (folder / "fixations.csv").write_text(text, encoding=encoding)
    labels = LabelFolders(points="fixations.csv")
    return GroundTruth(folder, labels, frames=frames, size=(6, 8))


def test_table_gives_points_and_who_looked(tmp_path: Path) -> None:
    text = "observer,frame,x,y\nann,0,3,2\nbob,0,7.9,5.9\nann,2,0,0\nbob,9,1,1\nann,2,8,0\n"
    truth = table(tmp_path, text)
    assert truth.frames == [0, 2]
    assert truth.has_observers
    points = truth.read_points(0)
    assert points is not None
    assert (points.rows.tolist(), points.columns.tolist()) == ([2, 5], [3, 7])
    assert points.observers == ("ann", "bob")
    fixations = truth.read(0).fixations
    assert fixations is not None
    assert np.argwhere(fixations).tolist() == [[2, 3], [5, 7]]
    outside = truth.read(2).fixations
    assert outside is not None
    assert np.argwhere(outside).tolist() == [[0, 0]]
    assert truth.read_points(1) is None
    assert truth.read(1) == (None, None)
    assert truth.census().fixations == 2


def test_points_left_of_the_picture_are_not_in_it(tmp_path: Path) -> None:
    """-0.4 is no part of pixel 0, which goes from 0 to 1."""
    fixations = table(tmp_path, "frame,x,y\n0,-0.4,2\n0,2,-0.4\n").read(0).fixations
    assert fixations is not None
    assert not fixations.any()


def test_table_without_observers_and_of_a_spreadsheet(tmp_path: Path) -> None:
    truth = table(tmp_path, "frame,x,y\r\n1,2,3\r\n", encoding="utf-8-sig")
    assert not truth.has_observers
    points = truth.read_points(1)
    assert points is not None
    assert points.observers == ("",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("frame,x\n0,1\n", "no column 'y'"),
        ("", "no column"),
        ("frame,x,y\n0,1,1\n0,a,1\n", "line 3"),
        ("frame,x,y\n0,nan,1\n", "line 2"),
        ("frame,x,y\n0,inf,1\n", "line 2"),
        ("frame,x,y\n0,1e300,1\n", "line 2"),
        ("frame,x,y\n0,1\n", "line 2"),
        ("frame,x,y\n1.5,1,1\n", "line 2"),
    ],
)
def test_table_that_is_none_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(GroundTruthError, match=told) as caught:
        _ = table(tmp_path, text).frames
    assert "fixations.csv" in str(caught.value)


def test_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "fixations.csv").write_bytes(b"frame,x,y\n0,\xff\xfe,1\n")
    truth = GroundTruth(tmp_path, LabelFolders(points="fixations.csv"), frames=1)
    with pytest.raises(GroundTruthError, match=r"fixations\.csv"):
        truth.read(0)


# Other sizes


@pytest.mark.parametrize("size", [(3, 4), (12, 16), (7, 5), (1, 1), (6, 8)])
def test_fixations_move_with_their_pixel_centres(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    fixations = rng.random((6, 8)) < 0.3
    wanted = np.zeros(size, np.bool_)
    for y, x in np.argwhere(fixations):
        wanted[int((y + 0.5) * size[0] // 6), int((x + 0.5) * size[1] // 8)] = True
    np.testing.assert_array_equal(resize_fixations(fixations, *size), wanted)


def test_no_fixation_is_lost_or_made_when_a_map_grows() -> None:
    fixations = np.random.default_rng(1).random((9, 13)) < 0.4
    for size in ((18, 26), (11, 17), (100, 13)):
        assert resize_fixations(fixations, *size).sum() == fixations.sum()


def test_published_points_stay_inside() -> None:
    """The last pixel of 640x360 goes to the last of 256x192."""
    rows, columns = np.array([0, 359]), np.array([0, 639])
    moved = move_points(rows, columns, (360, 640), (192, 256))
    assert [values.tolist() for values in moved] == [[0, 191], [0, 255]]


def test_points_outside_are_left_out() -> None:
    rows, columns = np.array([-1, 0, 6, 5, 2]), np.array([0, -1, 0, 7, 8])
    assert np.argwhere(fixation_map(rows, columns, 6, 8)).tolist() == [[5, 7]]


def test_fixations_of_jpegs_and_sparse_matrices_are_as_many_as_there_were(tmp_path: Path) -> None:
    from scipy.sparse import csc_matrix

    points = np.zeros((60, 80), np.uint8)
    points[[10, 30, 50], [70, 40, 5]] = 255
    (tmp_path / "fixation").mkdir()
    Image.fromarray(points).save(tmp_path / "fixation" / "0001.jpg", quality=95)
    savemat(tmp_path / "fixation" / "0002.mat", {"I": csc_matrix(points // 255)})
    truth = GroundTruth(tmp_path, LabelFolders(fixations="fixation"), frames=2, size=(60, 80))
    for frame in range(2):
        fixations = truth.read_fixations(frame)
        assert fixations is not None
        np.testing.assert_array_equal(np.argwhere(fixations), np.argwhere(points))


def test_one_offset_counts_for_maps_and_fixations(labels: Callable[..., GroundTruth]) -> None:
    """Nobody looked at frame 0, which has no fixation map; its map tells how to count."""
    truth = labels(4, maps=[0, 1, 2, 3], fixations=[1, 2, 3])
    assert truth.frames == [0, 1, 2, 3]
    for frame in (1, 2, 3):
        density, fixations = truth.read(frame)
        assert density is not None
        assert density.max() == frame
        assert fixations is not None
        assert fixations.flatten().argmax() == frame


def test_padding_of_numbers_means_nothing() -> None:
    images = [f"{number:06d}.png" for number in range(1, 6)]
    assert pair_labels(["0001", "0002", "0004"], 5, images) == [0, 1, 3]


def test_other_videos_tell_how_labels_are_numbered(tmp_path: Path) -> None:
    """Images from 0, labels from 1; one video lacks its last label, which leaves it in doubt."""
    for video, count in (("0601", 5), ("0602", 6), ("0603", 6)):
        for number in range(6):
            pixel = np.full((6, 8), number, np.uint8)
            write_png(tmp_path / "video" / video / f"{number:04d}.png", pixel)
            if number < count:
                label = tmp_path / "annotation" / video / "maps" / f"{number + 1:04d}.png"
                write_png(label, pixel)
    catalogue = scan(tmp_path)
    assert any("numbered higher than images" in problem for problem in catalogue.problems)
    assert [video.census.maps for video in catalogue.videos] == [5, 6, 6]
    for found in catalogue.videos:
        truth = found.ground_truth()
        for frame in truth.frames:
            density = truth.read_density(frame)
            assert density is not None
            assert density.max() == frame


def test_a_mat_that_claims_too_much_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "fixation" / "0001.mat"
    path.parent.mkdir()
    savemat(path, {"I": np.zeros((9000, 9000), np.uint8)}, do_compression=True)
    truth = GroundTruth(tmp_path, LabelFolders(fixations="fixation"), frames=1)
    with pytest.raises(GroundTruthError, match="9000x9000 pixels"):
        truth.read_fixations(0)
