"""What can go wrong; every message is one line that says what, where, and what to do."""

from __future__ import annotations


class TinyHDError(Exception):
    """Base of all errors that tell a user what to do; a command line shows them as one line."""


class TargetStoreError(TinyHDError):
    """Base of all errors from ``stores``."""


class VideoError(TargetStoreError):
    """A video cannot be found, opened or decoded, or is not the one that was expected."""


class ImageError(VideoError):
    """An image cannot be read, or is not what it should be."""


class GroundTruthError(ImageError):
    """Recorded eyes of a frame cannot be read, or do not fit each other or the frame."""


class DatasetError(VideoError):
    """A data set is not laid out as it should be, or lacks what is asked of it."""


class NotATargetStoreError(TargetStoreError):
    """A path holds something else than a target store, or nothing."""


class FormatVersionError(TargetStoreError):
    """A store was written by a version of the format that this program does not read."""


class DamagedStoreError(TargetStoreError):
    """An object of a store is gone, or is not what was written.

    Attributes:
        key: Of the object.
        what: What is wrong with it.
    """

    def __init__(self, url: str, key: str, what: str) -> None:
        super().__init__(f"{key} in {url} {what}; find out more with: tinyhd store verify {url}")
        self.url, self.key, self.what = url, key, what

    def __reduce__(self) -> tuple[type[DamagedStoreError], tuple[str, str, str]]:
        return type(self), (self.url, self.key, self.what)  # it travels between processes


class StoreBusyError(TargetStoreError):
    """Another process is writing the store."""


class StoreWriteError(TargetStoreError, OSError):
    """Something could not be written: no space, no permission, no network."""


class LabelSetNotFoundError(TargetStoreError, LookupError):
    """A store has no label set, or no frame set, of the asked name."""


class VideoNotFoundError(TargetStoreError, LookupError):
    """A store has no row for a video."""


class VideoNotLabelledError(TargetStoreError, LookupError):
    """The store holds no complete soft targets for a span of a video."""


class VideoChangedError(TargetStoreError):
    """A video has other content than the one of the same id in the store."""


class TargetValueError(TargetStoreError, ValueError):
    """A teacher's map holds values that the store's grid cannot hold."""
