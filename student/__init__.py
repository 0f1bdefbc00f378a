"""TinyHD, the student, and its training from stored soft targets."""

from student.checkpoints import CheckpointError, load_model, save_checkpoint
from student.config import VARIANTS, TinyHDConfig, build_config
from student.losses import LossWeights
from student.runs import RunError
from student.tinyhd import StudentOutput, TinyHD, normalise_frames
from student.train import TrainConfig, TrainingError, train

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "LossWeights",
    "RunError",
    "StudentOutput",
    "TinyHD",
    "TinyHDConfig",
    "TrainConfig",
    "TrainingError",
    "build_config",
    "load_model",
    "normalise_frames",
    "save_checkpoint",
    "train",
]
