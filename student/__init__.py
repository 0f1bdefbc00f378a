"""TinyHD, the student, and its training from stored soft targets."""

from student.checkpoints import CheckpointError, load_model, save_checkpoint
from student.config import VARIANTS, TinyHDConfig, build_config
from student.cost import cost_of
from student.recipe import TrainConfig
from student.reference import (
    WeightsError,
    export_weights,
    import_weights,
    inflate_encoder,
    read_weights,
    save_published_weights,
)
from student.runs import RunError
from student.tinyhd import StudentOutput, TinyHD, normalise_frames
from student.train import TrainingError, train

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "RunError",
    "StudentOutput",
    "TinyHD",
    "TinyHDConfig",
    "TrainConfig",
    "TrainingError",
    "WeightsError",
    "build_config",
    "cost_of",
    "export_weights",
    "import_weights",
    "inflate_encoder",
    "load_model",
    "normalise_frames",
    "read_weights",
    "save_checkpoint",
    "save_published_weights",
    "train",
]
