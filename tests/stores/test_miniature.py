"""The small data sets are what they are said to be, and the same every time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import av
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from tests.miniature import (
    BROKEN,
    NUMBERED,
    NUMBERED_FRAMES,
    Kind,
    Layout,
    make_fixture,
    make_numbered,
    read_number,
    read_video,
    relayout_dhf1k,
)

if TYPE_CHECKING:
    Miniatures = Callable[[Kind], Path]

LENGTHS = {"0001": 40, "0002": 60, "0003": 25, "0601": 48, "0602": 42}
SHOTS = {"1": (3, 22), "2": (26, 34), "3": (38, 38), "10": (42, 75)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(root: Path) -> dict[str, bytes]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def check_labels(folder: Path, stems: list[str], size: tuple[int, int]) -> float:
    """Check all labels of a video, and return how many fixations a frame has."""
    assert names(folder / "maps") == [f"{stem}.png" for stem in stems]
    assert names(folder / "fixation") == [*(f"{stem}.png" for stem in stems), "maps"]
    assert names(folder / "fixation" / "maps") == [f"{stem}.mat" for stem in stems]
    total = 0
    for stem in stems:
        saliency = read_png(folder / "maps" / f"{stem}.png")
        fixations = read_png(folder / "fixation" / f"{stem}.png")
        matrix = loadmat(folder / "fixation" / "maps" / f"{stem}.mat")["I"]
        assert saliency.dtype == fixations.dtype == matrix.dtype == np.uint8
        assert saliency.shape == fixations.shape == matrix.shape == size[::-1]
        assert set(np.unique(fixations)) <= {0, 255}
        np.testing.assert_array_equal(fixations, 255 * matrix)
        assert saliency.max() == (255 if matrix.any() else 0)
        assert (saliency[matrix > 0] >= 255 // 5).all()
        total += int(matrix.sum())
    return total / len(stems)


def test_dhf1k_has_its_videos_and_labels(miniatures: Miniatures) -> None:
    root = miniatures("dhf1k")
    assert names(root) == ["annotation", "video"]
    assert names(root / "video") == [f"{n}.AVI" for n in ("001", "002", "003", "601", "602", "701")]
    assert names(root / "annotation") == list(LENGTHS)
    means = []
    for name, length in LENGTHS.items():
        stems = [f"{number:04d}" for number in range(1, length + 1)]
        means.append(check_labels(root / "annotation" / name, stems, (160, 90)))
    assert 4 <= np.mean(means) <= 4.5
    assert min(means) > 3.8


def test_first_frames_of_a_video_are_not_looked_at(miniatures: Miniatures) -> None:
    folder = miniatures("dhf1k") / "annotation" / "0002" / "maps"
    seen = [bool(read_png(folder / f"{number:04d}.png").any()) for number in range(1, 61)]
    assert seen == [False] * 3 + [True] * 57


def test_dhf1k_timestamps_count_frames(miniatures: Miniatures) -> None:
    for path in sorted((miniatures("dhf1k") / "video").iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.time_base, stream.average_rate) == (Fraction(1, 30), Fraction(30))
            assert (stream.codec_context.name, stream.pix_fmt) == ("mpeg4", "yuv420p")
            assert len(container.streams.audio) == (path.stem not in ("003", "701"))
            frames = list(container.decode(video=0))
        assert [frame.pts for frame in frames] == list(range(LENGTHS.get(f"0{path.stem}", 34)))
        assert {(frame.width, frame.height) for frame in frames} == {(160, 90)}
        assert [i for i, frame in enumerate(frames) if frame.key_frame][:3] == [0, 12, 24]


def test_gaze_follows_the_picture_more_than_the_centre(miniatures: Miniatures) -> None:
    y, x = np.ogrid[:90, :160]
    prior = np.exp(-(((y - 44.5) / 22) ** 2) / 2 - ((x - 79.5) / 40) ** 2 / 2)
    for name in LENGTHS:
        paths = sorted((miniatures("dhf1k") / "annotation" / name / "maps").iterdir())[3:]
        maps = np.stack([read_png(path) for path in paths]).astype(float)
        same = np.mean([np.corrcoef(prior.ravel(), saliency.ravel())[0, 1] for saliency in maps])
        assert 0.1 < same < 0.45


@pytest.mark.parametrize(
    ("video", "stem", "size", "length"),
    [
        ("training/Run-Side-005", "Run-Side_005", (120, 68), 33),
        ("training/Lifting-003", "Lifting_003", (90, 72), 21),
        ("testing/Run-Side-001", "Run-Side_001", (120, 68), 24),
        ("testing/Kicking-Front-001", "Kicking-Front_001", (80, 60), 18),
    ],
)
def test_ucf_names_come_from_the_folder(
    miniatures: Miniatures, video: str, stem: str, size: tuple[int, int], length: int
) -> None:
    folder = miniatures("ucf") / video
    assert names(folder) == ["fixation", "images", "maps"]
    stems = [f"{stem}_{number:03d}" for number in range(1, length + 1)]
    assert names(folder / "images") == [f"{stem}.png" for stem in stems]
    assert read_png(folder / "images" / f"{stems[0]}.png").shape == (*size[::-1], 3)
    assert check_labels(folder, stems, size) > 3.5


def test_hollywood2_numbers_run_through_the_clip(miniatures: Miniatures) -> None:
    root = miniatures("hollywood2")
    clip = "actioncliptrain00001"
    assert names(root) == ["testing", "training"]
    assert names(root / "training") == [f"{clip}_{shot}" for shot in ("1", "10", "2", "3")]
    for shot, (first, last) in SHOTS.items():
        folder = root / "training" / f"{clip}_{shot}"
        stems = [f"{clip}_{number:05d}" for number in range(first, last + 1)]
        assert names(folder / "images") == [f"{stem}.png" for stem in stems]
        check_labels(folder, stems, (112, 48))
    for before, after in zip(SHOTS.values(), list(SHOTS.values())[1:], strict=False):
        assert after[0] - before[1] - 1 == 3
    clip = "actioncliptest00001"
    assert names(root / "testing") == [f"{clip}_1", f"{clip}_2"]
    stems = [f"{clip}_{number:05d}" for number in range(3, 21)]
    check_labels(root / "testing" / f"{clip}_1", stems, (96, 54))


def test_kinetics_has_whole_short_empty_and_cut_files(miniatures: Miniatures) -> None:
    root = miniatures("kinetics")
    assert names(root) == ["train_256", "val_256"]
    for split in ("train_256", "val_256"):
        assert names(root / split) == ["petting animal (not cat)", "riding a bike"]
        lengths = []
        for path in sorted((root / split).rglob("*.mp4")):
            if path.stat().st_size == 0 or "cutInHalf" in path.name:
                with pytest.raises(av.FFmpegError):
                    av.open(str(path))
                lengths.append(0 if path.stat().st_size == 0 else -1)
            else:
                lengths.append(len(read_video(path)))
        assert {0, -1, 10} < set(lengths)
        assert any(path.name.startswith("-") for path in (root / split).rglob("*.mp4"))
        assert any(path.name.startswith("_") for path in (root / split).rglob("*.mp4"))
    with av.open(str(root / "train_256/riding a bike/bikE0000001_000001_000011.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.time_base, stream.average_rate) == (Fraction(1, 12800), Fraction(25))


def test_plain_has_videos_and_pictures(miniatures: Miniatures) -> None:
    root = miniatures("plain")
    assert len(read_video(root / "videos" / "a.mp4")) == 30
    assert len(read_video(root / "videos" / "sub" / "b.AVI")) == 24
    assert names(root / "frames" / "seq1") == [f"img_{n}.png" for n in ("10", "11", "12", "9")]


def test_broken_differs_from_dhf1k_in_what_is_said(miniatures: Miniatures) -> None:
    root, whole = miniatures("broken"), files(miniatures("dhf1k"))
    differing = {path for path, _ in set(whole.items()) ^ set(files(root).items())}
    missing = BROKEN["last label missing"]
    extra = BROKEN["extra label"]
    for place in (missing, extra):
        folder, stem = place.split("/maps/")[0], Path(place).stem
        differing -= {f"{folder}/fixation/{stem}.png", f"{folder}/fixation/maps/{stem}.mat"}
    assert differing == set(BROKEN.values())
    assert not (root / missing).exists()
    assert extra not in whole
    with pytest.raises(OSError, match="truncated"):
        read_png(root / BROKEN["truncated PNG"])
    coloured = read_png(root / BROKEN["RGB map"])
    assert coloured.shape == (90, 160, 3)
    assert (coloured == coloured[..., :1]).all()
    assert read_png(root / BROKEN["map of another size"]).shape == (45, 80)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_kinds_are_small(miniatures: Miniatures, kind: Kind) -> None:
    assert sum(map(len, files(miniatures(kind)).values())) < 3_000_000


@pytest.mark.parametrize("kind", ["dhf1k", "hollywood2", "kinetics"])
def test_made_twice_is_the_same(miniatures: Miniatures, tmp_path: Path, kind: Kind) -> None:
    assert files(make_fixture(tmp_path, kind)) == files(miniatures(kind))


def test_seed_moves_the_eyes_only(miniatures: Miniatures, tmp_path: Path) -> None:
    before, after = files(miniatures("ucf")), files(make_fixture(tmp_path, "ucf", seed=1))
    assert before.keys() == after.keys()
    for path, data in before.items():
        assert "images" not in path or data == after[path]
    maps = [path for path in before if path.endswith(".png") and "images" not in path]
    assert sum(before[path] != after[path] for path in maps) > 0.9 * len(maps)


@pytest.fixture(scope="module")
def few_videos(miniatures: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of each split of DHF1K."""
    source, root = miniatures("dhf1k"), tmp_path_factory.mktemp("few")
    (root / "video").mkdir()
    for name in ("003", "601", "701"):
        shutil.copy(source / "video" / f"{name}.AVI", root / "video")
        if name != "701":
            shutil.copytree(source / "annotation" / f"0{name}", root / "annotation" / f"0{name}")
    return root


@pytest.mark.parametrize(
    ("layout", "image", "label", "unlabelled"),
    [
        ("vinet", "val/0601/images/0048.png", "val/0601/maps/0048.png", "test/0701/images"),
        (
            "unisal",
            "annotation/0601/images/0048.png",
            "annotation/0601/fixation/0048.png",
            "annotation/0701/images",
        ),
        (
            "hd2s",
            "val/frames/0601/00047.png",
            "val/annotation/0601/maps/0048.png",
            "test/frames/0701",
        ),
        (
            "hd2s-raw",
            "val/frames/601/00047.png",
            "val/annotation/0601/maps/0048.png",
            "test/frames/701",
        ),
        ("tased", "video/0601/0048.png", "annotation/0601/maps/0048.png", "video/0701"),
    ],
)
def test_other_layouts_hold_the_same(
    few_videos: Path,
    tmp_path: Path,
    layout: Layout,
    image: str,
    label: str,
    unlabelled: str,
) -> None:
    source = few_videos
    root = relayout_dhf1k(source, tmp_path / "root", layout)
    frames = read_video(source / "video" / "601.AVI")
    np.testing.assert_array_equal(read_png(root / image), frames[47])
    kind = Path(label).parent.name
    expected = source / "annotation" / "0601" / kind / "0048.png"
    assert (root / label).read_bytes() == expected.read_bytes()
    assert len(names((root / image).parent)) == len(names((root / label).parent / ".." / "maps"))
    assert len(names(root / unlabelled)) == 34
    if layout == "tased":
        assert (root / "DHF1K_num_frame_train.csv").read_text() == "25\n"


def test_numbers_are_read_from_frames_maps_and_fixations(tmp_path: Path) -> None:
    root = make_numbered(tmp_path)
    pictures = [read_png(path) for path in sorted((root / "video" / "0002").iterdir())]
    frames = {"001": read_video(root / "video" / "001.AVI"), "002": np.stack(pictures)}
    for video, first in NUMBERED.items():
        numbers = list(range(first, first + NUMBERED_FRAMES[video]))
        folder = root / "annotation" / f"0{video}"
        labels = sorted((folder / "maps").iterdir())
        assert [path.name for path in labels] == [f"{i + 1:04d}.png" for i in range(len(numbers))]
        assert [read_number(frame) for frame in frames[video]] == numbers
        assert [read_number(read_png(path)) for path in labels] == numbers
        points = [read_png(folder / "fixation" / path.name) > 0 for path in labels]
        assert [read_number(picture) for picture in points] == numbers
    small = np.asarray(Image.fromarray(frames["002"][5]).resize((64, 48)), np.float32) / 255
    large = np.asarray(Image.fromarray(frames["002"][6]).resize((256, 192)))
    assert (read_number(small), read_number(large)) == (1005, 1006)


def test_pictures_without_a_number_are_refused(miniatures: Miniatures) -> None:
    for picture in (np.zeros((96, 128)), read_video(miniatures("dhf1k") / "video" / "001.AVI")[0]):
        with pytest.raises(ValueError, match="carries no number"):
            read_number(picture)
