"""Videos are probed in processes of their own, several at a time, and only once."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stores import probing
from stores.decode import decode_video
from stores.finding import find_videos
from stores.probing import Probe, ProbeFailure, probe_videos
from stores.videos import VideoFile, hash_file

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

HANGING = """
import time
from stores import probing
probing.index_video = lambda path, **options: time.sleep(1e6)
probing.serve()
"""
CRASHING = """
import os, signal
from stores import probing
index_video = probing.index_video
def crash(path, **options):
    if path.name == "bad.avi":
        os.kill(os.getpid(), signal.SIGSEGV)
    return index_video(path, **options)
probing.index_video = crash
probing.serve()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYHD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, video_folder: Path) -> Path:
    return Path(shutil.copytree(video_folder, tmp_path / "videos"))


def probe(folder: Path, **options: object) -> dict[str, Probe | str]:
    found: dict[str, Probe | str] = {}
    for item in probe_videos(find_videos([folder]), **options):  # type: ignore[arg-type]
        if isinstance(item, ProbeFailure):
            found[item.file.id] = item.reason
        else:
            found[item.record.id] = item
    return found


def test_frames_are_counted_by_decoding(folder: Path) -> None:
    found = probe(folder)
    for video in find_videos([folder]):
        item = found[video.id]
        assert isinstance(item, Probe)
        assert item.record.frames == len(list(decode_video(video.absolute)))
        assert item.index is not None
        assert len(item.index.timestamps) == item.record.frames


def test_what_was_probed_is_not_looked_at_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make_video: MakeVideo
) -> None:
    first = probe(folder)
    make_video(folder / "short.avi", frames=31, seed=9)
    looked_at: list[str] = []

    def look(path: Path, *arguments: object) -> bytes:
        looked_at.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(probing, "hash_file", look)
    second = probe(folder)
    assert looked_at == ["short.avi"]
    short, long, again = second["short"], first["long"], second["long"]
    assert isinstance(short, Probe)
    assert isinstance(long, Probe)
    assert isinstance(again, Probe)
    assert short.record.frames == 31
    assert again.record == long.record
    assert again.index is not None
    assert long.index is not None
    assert (again.index.checksums == long.index.checksums).all()


def test_decoder_that_hangs_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PROGRAM", HANGING)
    found = probe(folder, hang_seconds=1.0, processes=3)
    assert len(found) == 3
    assert all("gave no frame for 1 s and was stopped" in str(what) for what in found.values())


def test_decoder_that_crashes_takes_nothing_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make_video: MakeVideo
) -> None:
    make_video(folder / "bad.avi", frames=12, seed=8)
    monkeypatch.setattr(probing, "PROGRAM", CRASHING)
    found = probe(folder, processes=1)
    assert f"ended with status {-signal.SIGSEGV}" in str(found.pop("bad"))
    assert len(found) == 3
    assert all(isinstance(item, Probe) for item in found.values())


def test_decoders_end_with_whoever_asked(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stores import finding, probing; "
        f"probing.PROGRAM = {HANGING!r}; "
        f"list(probing.probe_videos(finding.find_videos([Path({str(folder)!r})])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 30
    while not (children := _children(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(pid: int) -> list[str]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


def test_pipe_is_no_video(folder: Path) -> None:
    os.mkfifo(folder / "pipe.avi")
    assert "no regular file" in str(probe(folder)["pipe"])


@pytest.mark.parametrize("damage", ["a file where the folder should be", "a damaged database"])
def test_cache_that_cannot_be_used_costs_only_time(
    folder: Path, own_cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "a damaged database":
        own_cache.mkdir()
        (own_cache / "probes.sqlite").write_bytes(b"damaged" * 1000)
    else:
        own_cache.write_bytes(b"")
    for _ in range(2):
        assert all(isinstance(item, Probe) for item in probe(folder).values())
    assert "nothing is kept of what is learnt of videos" in caplog.text


def test_damaged_entry_of_the_cache_is_learnt_again(folder: Path, own_cache: Path) -> None:
    first = probe(folder)
    with sqlite3.connect(own_cache / "probes.sqlite") as database:
        database.execute("UPDATE probes SET frame_index = ?", (b"damaged",))
    database.close()
    second = probe(folder)
    assert {name: item.record for name, item in second.items() if isinstance(item, Probe)} == {
        name: item.record for name, item in first.items() if isinstance(item, Probe)
    }


def test_known_content_is_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    first = probe(folder)
    long = first["long"]
    assert isinstance(long, Probe)
    shutil.rmtree(own_cache)
    monkeypatch.setattr(probing, "PROGRAM", "raise SystemExit('not to be run')")
    shutil.copy(folder / "long.avi", folder.parent / "copy.avi")
    file = VideoFile("copy", folder.parent, "copy.avi")
    (item,) = probe_videos([file], known=lambda content_hash: long.record)
    assert isinstance(item, Probe)
    assert (item.record.id, item.record.path, item.record.frames) == ("copy", "copy.avi", 70)
