"""Where a store lies: a folder on a disk, or below a URL of an object store (S3, GCS, Azure).

Keys have ``/`` between folders. An object is written whole or not at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stores.errors import NotATargetStoreError, StoreWriteError, TargetStoreError

if TYPE_CHECKING:
    from zarr.abc.store import Store

URL_SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
RETRIES: Final[Any] = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
"""How long a network or a server may be away."""
PARTIAL: Final = ".partial"
"""End of the names of files that are being written; zarr uses the same."""


class Place(ABC):
    """Objects by key.

    Attributes:
        url: What a user would type to open the store.
    """

    url: str

    @property
    def absolute_url(self) -> str:
        """The same for processes with another working directory."""
        return self.url

    @abstractmethod
    def zarr_store(self, *, read_only: bool) -> Store:
        """Return the same place for zarr."""

    @abstractmethod
    def is_there(self) -> bool:
        """Return whether there is anything but what :meth:`create` may have begun."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it cannot be read.
        """

    @abstractmethod
    def read_end(self, key: str, length: int) -> tuple[bytes, int]:
        """Return the last ``length`` bytes of an object, or all if there are less, and its size.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it cannot be read.
        """

    @abstractmethod
    def read_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Return parts of an object, each from an offset and of a length.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it cannot be read.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write an object; when this returns it survives a power cut.

        Raises:
            StoreWriteError: If it cannot be written: nothing is there then, or the old object.
        """

    @abstractmethod
    def create(self, objects: Mapping[str, bytes]) -> None:
        """Write the objects of an empty store, its root last.

        Raises:
            NotATargetStoreError: If something is there.
            StoreWriteError: If they cannot be written.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, in any order; they need not be there.

        Raises:
            StoreWriteError: If one cannot be deleted.
        """

    @abstractmethod
    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size of all objects below a folder."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders in a folder."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what killed writers left half written."""


class LocalPlace(Place):
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    @property
    def absolute_url(self) -> str:
        return str(self.path.resolve())

    def zarr_store(self, *, read_only: bool) -> Store:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def is_there(self) -> bool:
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def read_end(self, key: str, length: int) -> tuple[bytes, int]:
        with (self.path / key).open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            return os.pread(file.fileno(), length, max(0, size - length)), size

    def read_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        with (self.path / key).open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), length, offset) for offset, length in ranges]

    def write(self, key: str, data: bytes) -> None:
        path = self.path / key
        building = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        with writing(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with building.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                building.rename(path)
            except BaseException:  # also when interrupted: no half a file stays
                with suppress(OSError):
                    building.unlink()
                raise
            _flush_folder(path.parent)

    def create(self, objects: Mapping[str, bytes]) -> None:
        if self.is_there():
            raise NotATargetStoreError(f"{self.url} is there already")
        # Made beside its place and then renamed, so that a store is there whole or not at all.
        path = self.path.resolve()
        if path == Path.cwd():  # which would be exchanged below the feet of this process
            raise TargetStoreError(
                f"{self.url} is the working directory; give the store a folder of its own"
            )
        building = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        with writing(self.url):
            try:
                for key, data in objects.items():
                    LocalPlace(building).write(key, data)
                building.rename(path)
                _flush_folder(path.parent)
            except OSError:
                shutil.rmtree(building, ignore_errors=True)
                if not self.is_there():
                    raise  # else another process was faster

    def delete(self, keys: Sequence[str]) -> None:
        for path in (self.path / key for key in keys):
            with writing(str(path)):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # until a folder is not empty
                for folder in path.relative_to(self.path).parents[:-1]:
                    (self.path / folder).rmdir()

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for where, _, names in os.walk(self.path / prefix):
            folder = Path(where)
            for name in names:
                with suppress(FileNotFoundError):  # deleted meanwhile
                    key = (folder / name).relative_to(self.path).as_posix()
                    yield key, (folder / name).lstat().st_size

    def folders(self, prefix: str) -> list[str]:
        with suppress(FileNotFoundError):
            return [entry.name for entry in (self.path / prefix).iterdir() if entry.is_dir()]
        return []

    def remove_leftovers(self) -> None:
        path = self.path.absolute()
        name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")
        for building in path.parent.iterdir():
            if name.fullmatch(building.name):  # the store is there: nobody needs it
                shutil.rmtree(building, ignore_errors=True)
        for leftover in self.path.rglob(f"*{PARTIAL}"):
            leftover.unlink(missing_ok=True)


class ObjectPlace(Place):
    """What lies below a URL of an object store, read and written with obstore.

    Credentials, region and endpoint come from the environment, as for other programs
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ...).
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import AzureStore, from_url
        except ImportError as error:
            raise TargetStoreError(
                f"to open {url}, obstore is needed: pip install 'tinyhd[remote]'"
            ) from error
        self.url = url
        self._obstore = obstore
        self._process = os.getpid()
        with reading(url):
            self._store: Any = from_url(url, retry_config=RETRIES)
        # Azure has no ranges that are counted from the end.
        self._has_suffixes = not isinstance(self._store, AzureStore)

    @property
    def objects(self) -> Any:  # noqa: ANN401 - one of obstore's stores
        """The store of obstore, for conditional writes.

        Raises:
            TargetStoreError: In a forked process.
        """
        if os.getpid() != self._process:  # its threads did not come along
            raise TargetStoreError(
                f"{self.url} was opened before this process was forked; open it here, or start "
                "processes by spawning"
            )
        return self._store

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def zarr_store(self, *, read_only: bool) -> Store:
        from zarr.storage import ObjectStore

        return ObjectStore(self.objects, read_only=read_only)

    def is_there(self) -> bool:
        begun = (key for key, _ in self.walk())
        return any(key == "zarr.json" or not key.endswith("/zarr.json") for key in begun)

    def read(self, key: str) -> bytes:
        with reading(f"{self.url}/{key}"):
            return bytes(self._obstore.get(self.objects, key).bytes())

    def read_end(self, key: str, length: int) -> tuple[bytes, int]:
        with reading(f"{self.url}/{key}"):
            if not self._has_suffixes:
                size = int(self._obstore.head(self.objects, key)["size"])
                start = max(0, size - length)
                end = self._obstore.get_range(self.objects, key, start=start, end=size)
                return bytes(end), size
            result = self._obstore.get(self.objects, key, options={"range": {"suffix": length}})
            return bytes(result.bytes()), int(result.meta["size"])

    def read_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        starts = [offset for offset, _ in ranges]
        lengths = [length for _, length in ranges]
        with reading(f"{self.url}/{key}"):
            parts = self._obstore.get_ranges(self.objects, key, starts=starts, lengths=lengths)
            return [bytes(part) for part in parts]

    def write(self, key: str, data: bytes) -> None:
        with writing(f"{self.url}/{key}"):
            self._obstore.put(self.objects, key, data)

    def create(self, objects: Mapping[str, bytes]) -> None:
        from obstore.exceptions import AlreadyExistsError

        if self.is_there():
            raise NotATargetStoreError(f"{self.url} is there already")
        # Never over what is there: another process may have made the store and grown it since.
        with writing(self.url):
            for key, data in objects.items():
                with suppress(AlreadyExistsError):
                    self._obstore.put(self.objects, key, data, mode="create")

    def delete(self, keys: Sequence[str]) -> None:
        with writing(self.url), suppress(FileNotFoundError):
            self._obstore.delete(self.objects, list(keys))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with reading(f"{self.url}/{prefix}"):
            for batch in self._obstore.list(self.objects, prefix=prefix or None):
                for entry in batch:
                    yield str(entry["path"]), int(entry["size"])

    def folders(self, prefix: str) -> list[str]:
        with reading(f"{self.url}/{prefix}"):
            found = self._obstore.list_with_delimiter(self.objects, prefix=prefix)
        return [str(path).rpartition("/")[2] for path in found["common_prefixes"]]

    def remove_leftovers(self) -> None:
        """Nothing is left: an object that was not written to its end is not there."""


def open_place(where: str | Path) -> Place:
    """Return the place that a path or URL names.

    Raises:
        TargetStoreError: If it is a URL of another kind, or obstore is not installed.
    """
    scheme, separator, _ = str(where).partition("://")
    if isinstance(where, Path) or not separator:
        return LocalPlace(Path(where))
    if scheme not in URL_SCHEMES:
        raise TargetStoreError(
            f"{where}: a store is a folder or a URL that begins with s3://, gs:// or az://"
        )
    return ObjectPlace(str(where).rstrip("/"))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise obstore's errors as OSErrors that say where."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except BaseError as error:
        raise OSError(f"cannot read {where}: {_first_line(error)}") from error


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Raise what can go wrong in writing as a :class:`StoreWriteError` that says where."""
    try:
        yield
    except (TargetStoreError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreWriteError(
                f"no space is left to write {where}; make room and run the same command again"
            ) from error
        raise StoreWriteError(f"cannot write {where}: {error.strerror or error}") from error
    except Exception as error:  # obstore's are sorted out by name: it need not be installed
        if type(error).__module__.partition(".")[0] != "obstore":
            raise
        raise StoreWriteError(f"cannot write {where}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _flush_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, so that a receipt never outlives its shard's name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
