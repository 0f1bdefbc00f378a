"""One driver at a time: a lock on a local disk, a lease with heartbeats on an object store.

Both leave a token in ``runs/driver``. Workers and the driver itself compare it before they write,
so that those of a driver that was replaced stop.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

from filelock import FileLock, Timeout

from stores.errors import StoreBusyError, StoreWriteError
from stores.places import LocalPlace, ObjectPlace, Place, reading, writing

log = logging.getLogger(__name__)

DRIVER_KEY: Final = "runs/driver"
BEAT_SECONDS: Final = 5.0
STALE_SECONDS: Final = 30.0
"""A lease whose object has not changed for so long may be taken over."""


Version = dict[str, str]


class Lease(ABC):
    """The right to write a store; use in a ``with``.

    Attributes:
        token: For workers, see :func:`check_token`.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.token = uuid.uuid4().hex

    def check(self) -> None:
        """Make sure that nobody has taken over.

        Raises:
            StoreBusyError: If another process has.
        """
        check_token(self._place, self.token)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()

    @abstractmethod
    def take(self) -> None:
        """Take the lease.

        Raises:
            StoreBusyError: If another process has it.
            OSError: If the place cannot be read or written.
        """

    @abstractmethod
    def give_back(self) -> None:
        """Let others have it."""

    def _entry(self, **values: str | float) -> bytes:
        entry = {"token": self.token, "host": platform.node(), "pid": os.getpid(), **values}
        return json.dumps(entry).encode()


class FileLease(Lease):
    """A lock of the operating system, which ends with its process."""

    def __init__(self, place: LocalPlace) -> None:
        super().__init__(place)
        self._lock = FileLock(place.path / "runs" / "lease")

    def take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise _busy(self._place, _driver(self._place)) from error
        self._place.write(DRIVER_KEY, self._entry())

    def give_back(self) -> None:
        self._lock.release()


class ObjectLease(Lease):
    """An object that is made if it is not there, renewed, and taken over when it is not.

    Whether a lease still beats is seen from the object's changes and the clock of the one who
    waits; the clocks of two machines are never compared.

    Args:
        place: Where the store lies.
        beat_seconds: Time between two renewals.
        stale_seconds: Time without a renewal after which the lease is another's to take.
        clock: Seconds.
    """

    def __init__(
        self,
        place: ObjectPlace,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(place)
        self._objects, self._url = place.objects, place.url
        self._beat, self._stale, self._clock = beat_seconds, stale_seconds, clock
        self._version: Version | None = None
        self._is_lost = threading.Event()
        self._is_released = threading.Event()
        self._renewed_at = 0.0
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        version, entry = self._look()
        if version is not None and entry.get("token") is not None:
            version = self._wait_until_stale(version, entry)
        if not self._put(version):
            raise _busy(self._place, self._look()[1])
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def give_back(self) -> None:
        self._is_released.set()
        if self._thread is not None:
            self._thread.join()
        if not self._is_lost.is_set():
            self.token = ""
            try:
                self._put(self._version)
            except OSError as error:
                log.warning("the lease could not be given back, and ends by itself: %s", error)

    def check(self) -> None:
        if self._is_lost.is_set() or self._clock() - self._renewed_at > self._stale / 2:
            raise StoreBusyError(
                f"the lease of {self._url} could not be renewed, another process may have taken "
                "over; run the same command again to continue"
            )
        super().check()

    def _look(self) -> tuple[Version | None, dict[str, Any]]:
        import obstore

        try:
            with reading(self._url):
                result = obstore.get(self._objects, DRIVER_KEY)
                return _version(result.meta), _parse(bytes(result.bytes()))
        except FileNotFoundError:
            return None, {}

    def _put(self, version: Version | None) -> bool:
        """Write the lease if it is as it was seen; return whether it was."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        # The number makes every renewal another object, with another version.
        data = self._entry(renewal=uuid.uuid4().hex) if self.token else b'{"token": null}'
        mode: Any = "create" if version is None else version
        began = self._clock()  # others may see this renewal long before the answer is here
        try:
            with writing(self._url):
                put = obstore.put(self._objects, DRIVER_KEY, data, mode=mode)
                self._version = _version(put)
        except StoreWriteError as error:
            if not isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                raise
            # A request that is sent again, as its answer was lost, finds what it wrote itself.
            self._version, found = self._look()
            if found != _parse(data):
                return False
        except FileNotFoundError:
            return False
        self._renewed_at = began
        return True

    def _wait_until_stale(self, version: Version, entry: dict[str, Any]) -> Version | None:
        """Return the version at which the lease may be taken."""
        log.info(
            "%s has a driver (process %s on %s); looking for %g s whether it still lives",
            *(self._url, entry.get("pid"), entry.get("host"), self._stale),
        )
        began = self._clock()
        while self._clock() - began < self._stale:
            time.sleep(min(1.0, self._stale / 10))
            now, entry = self._look()
            if now != version:
                if entry.get("token") is None:
                    return now
                raise _busy(self._place, entry)
        return version

    def _keep(self) -> None:
        while not self._is_released.wait(self._beat):
            try:
                if not self._put(self._version):
                    self._is_lost.set()
                    return
            except OSError as error:  # the network may be back at the next beat
                log.warning("the lease of %s could not be renewed: %s", self._url, error)


def take_lease(place: Place) -> Lease:
    """Return the lease of a place, not yet taken."""
    if isinstance(place, LocalPlace):
        return FileLease(place)
    if isinstance(place, ObjectPlace):
        return ObjectLease(place)
    raise TypeError(f"no lease for {type(place).__name__}")


def check_token(place: Place, token: str) -> None:
    """Make sure that the driver of ``token`` still has the store.

    Raises:
        StoreBusyError: If another driver has taken over.
        OSError: If the place cannot be read.
    """
    if _driver(place).get("token") != token:
        raise StoreBusyError(f"another process has taken over {place.url}")


def _driver(place: Place) -> dict[str, Any]:
    try:
        return _parse(place.read(DRIVER_KEY))
    except FileNotFoundError:
        return {}


def _version(meta: Mapping[str, Any]) -> Version:
    """Return by what an object is told from its successors: some stores use one, some the other."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _parse(data: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(data)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _busy(place: Place, entry: dict[str, Any]) -> StoreBusyError:
    who = f"process {entry.get('pid')} on {entry.get('host')}" if entry else "another process"
    return StoreBusyError(f"{place.url} is being written by {who}; wait for it or stop it")
