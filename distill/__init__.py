"""Label generation: videos through a teacher into a target store, on Ray."""

from distill.plan import Budget, Failure
from distill.run import DistillReport, DistillSettings, label_videos

__all__ = ["Budget", "DistillReport", "DistillSettings", "Failure", "label_videos"]
