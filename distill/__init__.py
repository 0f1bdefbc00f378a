"""Label generation: videos through a teacher into a target store, on Ray."""

from distill.plan import Failure
from distill.run import DistillReport, DistillSettings, label_videos

__all__ = ["DistillReport", "DistillSettings", "Failure", "label_videos"]
