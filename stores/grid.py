"""Where a video's shards lie on the frame axis, whatever they hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stores.table import VideoRow


@dataclass(frozen=True)
class ShardGrid:
    """The frame axis, cut into shards; every video begins with a shard of its own."""

    shard_frames: int
    head_frames: int = 0
    """Frames at a video's beginning that are made from less than a full window."""
    tail_frames: int = 0
    """The same at its end."""

    def shards(self, video: VideoRow) -> range:
        """Return the shards, counted along the whole frame axis, that hold a video's frames."""
        start = video.first // self.shard_frames
        return range(start, start + -(-video.frames // self.shard_frames))

    def frames_of(self, shard: int, video: VideoRow) -> range:
        """Return the frames of a video that lie in a shard."""
        start = shard * self.shard_frames - video.first
        return range(start, min(start + self.shard_frames, video.frames))

    def sample(self, video: VideoRow, *, blocks: int, seed: int) -> list[int]:
        """Return some of a video's shards, for a collection that is too large to label whole.

        The first blocks of a larger number are those of a smaller one, whatever else is in the
        store: each block's place in the order comes from seed, content and block alone. Blocks
        that are not full, or whose windows reach beyond the video, come last.
        """

        def order(shard: int) -> tuple[bool, bytes]:
            span = self.frames_of(shard, video)
            full = range(self.head_frames, video.frames - self.tail_frames)
            is_poor = span.start < full.start or span.stop > full.stop
            is_poor = is_poor or len(span) < self.shard_frames
            block = shard - self.shards(video).start
            key = video.content_hash + seed.to_bytes(8, "little") + block.to_bytes(8, "little")
            return is_poor, hashlib.sha256(key).digest()

        return sorted(sorted(self.shards(video), key=order)[:blocks])
