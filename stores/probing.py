"""Learn what videos hold: once, several at a time, in processes that may crash or hang.

What was learnt is kept in a cache of the user's, by path, size and time of modification, and with
the decoder that counted.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import selectors
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from stores.decode import (
    INDEX_VERSION,
    FrameIndex,
    IndexedVideo,
    Reader,
    decoder_version,
    index_video,
    read_header,
)
from stores.errors import VideoError
from stores.videos import FileStamp, VideoFile, VideoRecord, hash_file

log = logging.getLogger(__name__)

HANG_SECONDS: Final = 300.0
"""A decoder that gives no frame for so long is taken to hang."""
BEAT_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 2.0
"""Between two writes of what was learnt."""
POLL_SECONDS: Final = 0.2
PROGRAM: Final = "from stores.probing import serve; serve()"
"""What a process that decodes runs."""
FILES_AT_ONCE: Final = 256
"""Between two looks at the cache; what is learnt of them is kept together."""


@dataclass(frozen=True)
class Probe:
    """A video and where its frames lie."""

    record: VideoRecord
    stamp: FileStamp
    index: FrameIndex | None
    """Nothing if decoding can only begin at the beginning, or was not asked for."""


@dataclass(frozen=True)
class ProbeFailure:
    """A file that is no video, and why."""

    file: VideoFile
    reason: str


def probe_videos(
    files: Sequence[VideoFile],
    *,
    reader: Reader = "pyav",
    known: Callable[[bytes], VideoRecord | None] = lambda content_hash: None,
    processes: int | None = None,
    hang_seconds: float = HANG_SECONDS,
) -> Iterator[Probe | ProbeFailure]:
    """Learn content hash, true length and frame positions of videos.

    Args:
        files: The videos.
        reader: Who decodes.
        known: Tells what is known already of a content, which is then not decoded.
        processes: Decoders at a time; as many as there are CPUs if not given.
        hang_seconds: Time without a frame after which a decoder is killed.

    Yields:
        What was learnt of each file, in no particular order.
    """
    processes = processes or os.cpu_count() or 1
    with (
        ProbeCache(reader) as cache,
        ThreadPoolExecutor(processes) as hashers,
        _Decoders(processes, reader, hang_seconds) as decoders,
        _at_the_end(cache.stop),
    ):
        for begin in range(0, len(files), FILES_AT_ONCE):
            batch = files[begin : begin + FILES_AT_ONCE]
            unknown: dict[VideoFile, tuple[FileStamp, bytes]] = {}
            for file, found in zip(batch, hashers.map(cache.look_up, batch), strict=True):
                if isinstance(found, str):
                    yield ProbeFailure(file, found)
                    continue
                stamp, content_hash, probe = found
                if probe is None and (like := known(content_hash)) is not None:
                    cache.keep(file, stamp, content_hash, None)
                    probe = Probe(_named(like, file), stamp, None)
                if probe is not None:
                    yield probe
                else:
                    unknown[file] = (stamp, content_hash)
            for file, seen, fps in decoders.run(list(unknown)):
                if isinstance(seen, str):
                    yield ProbeFailure(file, seen)
                    continue
                stamp, content_hash = unknown[file]
                record = _record(file, content_hash, seen, fps)
                probe = Probe(record, stamp, seen.frame_index)
                cache.keep(file, stamp, content_hash, probe)
                yield probe


@contextmanager
def _at_the_end(what: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        what()


def cache_folder() -> Path:
    """Return where this program keeps what it can learn again.

    ``TINYHD_CACHE`` if it is set, else ``tinyhd`` in the user's folder for caches.
    """
    if own := os.environ.get("TINYHD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyhd"


class ProbeCache:
    """What was learnt of files, in a small database; where that cannot be, nothing is kept.

    Args:
        reader: Who decodes; another decoder, or another version of it, may count other frames.
    """

    def __init__(self, reader: Reader) -> None:
        version = {**decoder_version(reader), "index": INDEX_VERSION}
        self._decoder = json.dumps(version, sort_keys=True)
        self._pending: list[tuple[Any, ...]] = []
        self._kept_at = time.monotonic()
        self._is_stopped = threading.Event()
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        path = cache_folder() / "probes.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=10, check_same_thread=False)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS probes (path TEXT, decoder TEXT, num_bytes INTEGER, "
                "modified_ns INTEGER, content_hash BLOB, frames INTEGER, height INTEGER, "
                "width INTEGER, fps REAL, frame_index BLOB, PRIMARY KEY (path, decoder))"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self.write()
        if self._database is not None:
            self._database.close()

    def stop(self) -> None:
        """Let files that are being hashed be."""
        self._is_stopped.set()

    def look_up(self, file: VideoFile) -> tuple[FileStamp, bytes, Probe | None] | str:
        """Return what is known of a file, whose content is hashed if nothing is.

        Returns:
            Its stamp, content hash and, if it was decoded before, all of it; or what is wrong.
        """
        name = str(file.absolute)
        if _as_text(name) != name:
            return f"the name {name!a} is not text; rename the file"
        try:
            stamp = FileStamp.of(file.absolute)
            row = self._row(file, stamp)
            if row is None:
                return stamp, hash_file(file.absolute, self._check_stopped), None
            content_hash, frames, height, width, fps, packed = row
            if frames is None:
                return stamp, content_hash, None
            index = FrameIndex.unpack(packed, frames) if packed is not None else None
        except VideoError as error:
            return _as_text(str(error))
        except ValueError:  # a damaged database: learn it again
            return stamp, content_hash, None
        record = _record(file, content_hash, IndexedVideo(frames, height, width, index), fps)
        return stamp, content_hash, Probe(record, stamp, index)

    def keep(
        self, file: VideoFile, stamp: FileStamp, content_hash: bytes, probe: Probe | None
    ) -> None:
        """Keep what was learnt of a file, or its content hash alone."""
        seen: tuple[Any, ...] = (None,) * 5
        if probe is not None:
            packed = probe.index.pack() if probe.index is not None else None
            record = probe.record
            seen = (record.frames, record.height, record.width, record.fps, packed)
        values = (str(file.absolute), self._decoder, stamp.num_bytes, stamp.modified_ns)
        self._pending.append((*values, content_hash, *seen))
        if time.monotonic() - self._kept_at >= KEEP_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is to be kept; others can use the database at all other times."""
        with self._lock:
            pending, self._pending, self._kept_at = self._pending, [], time.monotonic()
            if self._database is None or not pending:
                return
            try:
                with self._database:
                    self._database.executemany(
                        f"INSERT OR REPLACE INTO probes VALUES ({', '.join('?' * 10)})", pending
                    )
            except (sqlite3.Error, UnicodeError) as error:
                self._give_up(error)

    def _check_stopped(self) -> None:
        if self._is_stopped.is_set():
            raise VideoError("stopped")

    def _row(self, file: VideoFile, stamp: FileStamp) -> Any:  # noqa: ANN401 - values of a row
        rows = self._execute(
            "SELECT content_hash, frames, height, width, fps, frame_index FROM probes "
            "WHERE path = ? AND decoder = ? AND num_bytes = ? AND modified_ns = ?",
            (str(file.absolute), self._decoder, stamp.num_bytes, stamp.modified_ns),
        )
        return rows[0] if rows else None

    def _execute(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            if self._database is None:
                return []
            try:
                return self._database.execute(statement, values).fetchall()
            except (sqlite3.Error, UnicodeError) as error:
                self._give_up(error)
                return []

    def _give_up(self, error: Exception) -> None:
        log.warning("nothing is kept of what is learnt of videos: %s: %s", cache_folder(), error)
        self._database = None


class _Decoders:
    """Processes that index videos, started when they are needed."""

    def __init__(self, number: int, reader: Reader, hang_seconds: float) -> None:
        self._number, self._reader, self._hang_seconds = number, reader, hang_seconds
        self._idle: list[_Decoder] = []
        self._busy: dict[_Decoder, VideoFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for decoder in (*self._idle, *self._busy):
            decoder.kill()

    def run(
        self, files: Sequence[VideoFile]
    ) -> Iterator[tuple[VideoFile, IndexedVideo | str, float]]:
        """Yield each file with what it holds, or what is wrong with it, and frames per second."""
        waiting = deque(files)
        with selectors.DefaultSelector() as selector:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._number:
                    decoder = self._idle.pop() if self._idle else _Decoder(self._reader)
                    file = waiting.popleft()
                    decoder.send(str(file.absolute))
                    self._busy[decoder] = file
                    selector.register(decoder.output, selectors.EVENT_READ, decoder)
                heard = [key.data for key, _ in selector.select(POLL_SECONDS)]
                for decoder in list(self._busy):
                    answer = decoder.hear() if decoder in heard else None
                    if answer is None and decoder.silence < self._hang_seconds:
                        continue
                    file = self._busy.pop(decoder)
                    selector.unregister(decoder.output)
                    if answer is None:
                        decoder.kill()
                        what = f"gave no frame for {self._hang_seconds:g} s and was stopped"
                        yield file, f"the decoder of {file.absolute} {what}", 0.0
                    elif isinstance(answer, int):
                        decoder.kill()
                        what = f"ended with status {answer}; is the file damaged?"
                        yield file, f"the decoder of {file.absolute} {what}", 0.0
                    else:
                        self._idle.append(decoder)
                        yield file, *_parse_answer(answer)


class _Decoder:
    """A process of :func:`serve`."""

    def __init__(self, reader: Reader) -> None:
        here = str(Path(__file__).resolve().parent.parent)
        before = os.environ.get("PYTHONPATH")
        self._reader = reader
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, before)))},
            start_new_session=True,  # an interrupt of the terminal is ours alone
            bufsize=0,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self._rest = b""
        self._heard_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since anything was heard."""
        return time.monotonic() - self._heard_at

    def send(self, path: str) -> None:
        """Give a video to index."""
        assert self._process.stdin is not None
        self._heard_at = time.monotonic()
        with suppress(BrokenPipeError):  # it is dead, which will be heard
            line = json.dumps({"path": path, "reader": self._reader})
            self._process.stdin.write(line.encode() + b"\n")

    def hear(self) -> dict[str, Any] | int | None:
        """Return an answer, the status of a process that ended, or nothing yet."""
        self._heard_at = time.monotonic()
        data = os.read(self.output.fileno(), 1 << 20)
        if not data:
            return self._process.wait()
        *lines, self._rest = (self._rest + data).split(b"\n")
        answers = [answer for line in lines if "beat" not in (answer := json.loads(line))]
        return answers[0] if answers else None

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def serve() -> None:
    """Index the videos that lines of the standard input name; answer in lines."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # whoever asked is gone; a decoder that hangs must not stay behind

    threading.Thread(target=listen, daemon=True).start()
    while True:
        question = json.loads(lines.get())
        sys.stdout.write(json.dumps(_answer(Path(question["path"]), question["reader"])) + "\n")
        sys.stdout.flush()


def _answer(path: Path, reader: Reader) -> dict[str, Any]:
    beat_at = time.monotonic()

    def beat(frames: int) -> None:
        nonlocal beat_at
        if time.monotonic() - beat_at > BEAT_SECONDS:
            beat_at = time.monotonic()
            sys.stdout.write(json.dumps({"beat": frames}) + "\n")
            sys.stdout.flush()

    try:
        seen = index_video(path, reader=reader, on_frame=beat)
        fps = _fps(path)
    except VideoError as error:
        return {"error": _as_text(str(error))}
    except Exception as error:  # a damaged file makes a decoder fail in any way
        return {"error": _as_text(f"{path} cannot be decoded: {type(error).__name__}: {error}")}
    packed = (
        base64.b64encode(seen.frame_index.pack()).decode() if seen.frame_index is not None else None
    )
    return {"seen": [seen.frames, seen.height, seen.width], "index": packed, "fps": fps}


def _parse_answer(answer: dict[str, Any]) -> tuple[IndexedVideo | str, float]:
    if "error" in answer:
        return str(answer["error"]), 0.0
    frames, height, width = answer["seen"]
    packed = answer["index"]
    index = FrameIndex.unpack(base64.b64decode(packed), frames) if packed is not None else None
    return IndexedVideo(frames, height, width, index), answer["fps"]


def _fps(path: Path) -> float:
    return float(read_header(path).fps)


def _record(file: VideoFile, content_hash: bytes, seen: IndexedVideo, fps: float) -> VideoRecord:
    return VideoRecord(
        id=file.id,
        root=str(file.root),
        path=file.path,
        content_hash=content_hash,
        frames=seen.frames,
        height=seen.height,
        width=seen.width,
        fps=fps,
    )


def _named(like: VideoRecord, file: VideoFile) -> VideoRecord:
    """Return what is known of a content, as that of a file."""
    record = VideoRecord(**{name: getattr(like, name) for name in VideoRecord.__dataclass_fields__})
    return replace(record, id=file.id, root=str(file.root), path=file.path)


def _as_text(name: str) -> str:
    """Replace what a file name holds that is no text in any encoding."""
    return name.encode("utf-8", "replace").decode()
