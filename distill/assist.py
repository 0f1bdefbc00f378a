"""A student of one stage of a training labels a store, for the stages that learn from it."""

from __future__ import annotations

import logging
from pathlib import Path

from distill.run import label_files
from distill.settings import DistillSettings
from stores.targets import TargetStore
from stores.videos import VideoFile

log = logging.getLogger(__name__)


def label_with_student(
    store: str | Path,
    checkpoint: Path,
    *,
    is_mirrored: bool,
    videos_root: Path | None = None,
    device: str = "cpu",
    address: str | None = None,
    inline: bool = False,
) -> str:
    """Have a student label all videos of a store; what the store has is not done again.

    Args:
        store: Path or URL of the store.
        checkpoint: The student's.
        is_mirrored: Whether it labels mirrored frames, too.
        videos_root: Where the videos lie now, if not where they were labelled.
        device: Where students run.
        address: Ray cluster, if not one of its own on this machine.
        inline: Whether to label in this process, and not on Ray.

    Returns:
        The name of the label set, of frames as they are.

    Raises:
        VideoError: If there is no video that can be decoded.
        TargetStoreError: If the store cannot be opened or written.
        KeyboardInterrupt: After an interruption, when what was being done is finished and kept.
    """
    rows = TargetStore.open(store).videos
    files = [VideoFile(row.id, videos_root or Path(row.root), row.path) for row in rows]
    settings = DistillSettings(
        teacher="assistant",
        weights=checkpoint,
        variant="both" if is_mirrored else "identity",
        gpus_per_actor=float(device.startswith("cuda")),
        address=address,
        executor="inline" if inline else "ray",
    )
    report = label_files(lambda: files, store, settings)
    log.info("%s", report)
    return report.label_sets[0]
