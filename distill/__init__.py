"""Label generation: videos through a teacher into a target store, on Ray."""

from distill.events import Failure
from distill.plan import Budget
from distill.run import DistillReport, label_videos
from distill.settings import DistillSettings

__all__ = ["Budget", "DistillReport", "DistillSettings", "Failure", "label_videos"]
