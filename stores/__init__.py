"""Everything that lies on disk: videos, frames and targets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stores.decode import decode_video
    from stores.errors import TargetStoreError, TinyHDError, VideoError, VideoNotLabelledError
    from stores.finding import find_videos
    from stores.maps import DerivedMap, MapLayout, MapSpec, render_maps
    from stores.shards import FrameSet, LabelSet
    from stores.targets import TargetStore
    from stores.videos import VideoRecord

__all__ = [
    "DerivedMap",
    "FrameSet",
    "LabelSet",
    "MapLayout",
    "MapSpec",
    "TargetStore",
    "TargetStoreError",
    "TinyHDError",
    "VideoError",
    "VideoNotLabelledError",
    "VideoRecord",
    "decode_video",
    "find_videos",
    "render_maps",
]

# Loaded when they are used: processes that only decode start in a fraction of torch's time.
_HOMES: Final = {
    "stores.decode": ("decode_video",),
    "stores.errors": ("TargetStoreError", "TinyHDError", "VideoError", "VideoNotLabelledError"),
    "stores.maps": ("DerivedMap", "MapLayout", "MapSpec", "render_maps"),
    "stores.shards": ("FrameSet", "LabelSet"),
    "stores.targets": ("TargetStore",),
    "stores.finding": ("find_videos",),
    "stores.videos": ("VideoRecord",),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
