"""What can go wrong; every message is one line that says what, where, and what to do."""

from __future__ import annotations


class TinyHDError(Exception):
    """Base of all errors that tell a user what to do; a command line shows them as one line."""


class TargetStoreError(TinyHDError):
    """Base of all errors from ``stores``."""


class VideoError(TargetStoreError):
    """A video cannot be found, opened or decoded, or is not the one that was expected."""


class NotATargetStoreError(TargetStoreError):
    """A path holds something else than a target store, or nothing."""


class FormatVersionError(TargetStoreError):
    """A store was written by a version of the format that this program does not read."""


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
