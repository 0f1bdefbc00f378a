"""Everything that lies on disk: videos, frames and targets."""

from stores.errors import TargetStoreError, TinyHDError, VideoError, VideoNotLabelledError
from stores.maps import DerivedMap, MapLayout, MapSpec, render_maps
from stores.shards import FrameSet, LabelSet
from stores.targets import TargetStore
from stores.videos import VideoRecord, decode_video, find_videos

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
