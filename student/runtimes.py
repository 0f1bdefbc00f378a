"""Run a student: with PyTorch, ONNX Runtime or OpenVINO."""

from __future__ import annotations

import logging
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from student.checkpoints import load_model
from student.config import TinyHDConfig
from student.export import ExportError, export_onnx, missing_package, read_onnx_config
from student.tinyhd import TinyHD

log = logging.getLogger(__name__)

RuntimeName = Literal["torch", "onnxruntime", "openvino"]
Clips = npt.NDArray[np.float32]


class Runtime(ABC):
    """A student that is ready to predict.

    Args:
        config: Its configuration.
        batch: Clips that it takes at once.
    """

    def __init__(self, config: TinyHDConfig, batch: int) -> None:
        self.config, self.batch = config, batch

    @abstractmethod
    def predict(self, clips: Clips) -> npt.NDArray[np.float32]:
        """Return the saliency maps of at most ``batch`` clips.

        Shape:
            - clips: ``(B, 3, 16, H, W)``, normalised, oldest frame first
            - returns: ``(B, output_frames, H, W)`` in 0..1, of the newest frames
        """


class TorchRuntime(Runtime):
    """PyTorch, with the network's form for inference."""

    def __init__(self, model: TinyHD, *, batch: int = 1, device: str = "cpu") -> None:
        super().__init__(model.config, batch)
        self._model = model.for_inference().to(device)
        self._device = device

    @torch.inference_mode()
    def predict(self, clips: Clips) -> npt.NDArray[np.float32]:
        saliency = self._model(torch.from_numpy(clips).to(self._device)).saliency
        maps: npt.NDArray[np.float32] = saliency.flatten(1, -3).cpu().numpy()
        return maps


class _OnnxFile(Runtime):
    """What runtimes of an exported file share: it takes whole batches only."""

    def predict(self, clips: Clips) -> npt.NDArray[np.float32]:
        number = len(clips)
        if number < self.batch:
            clips = np.concatenate([clips, *[clips[-1:]] * (self.batch - number)])
        saliency = self._run(np.ascontiguousarray(clips))[:number]
        return saliency if saliency.ndim == 4 else saliency[:, 0]

    @abstractmethod
    def _run(self, clips: Clips) -> npt.NDArray[np.float32]: ...


class OnnxRuntime(_OnnxFile):
    """ONNX Runtime on the CPU, from a file of :func:`student.export.export_onnx`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError(missing_package("onnxruntime", "onnx")) from error
        config = read_onnx_config(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        super().__init__(config, self._session.get_inputs()[0].shape[0])

    def _run(self, clips: Clips) -> npt.NDArray[np.float32]:
        saliency: npt.NDArray[np.float32] = self._session.run(None, {"clip": clips})[0]
        return saliency


class OpenVino(_OnnxFile):
    """OpenVINO on the CPU in full precision, from a file of :func:`student.export.export_onnx`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ExportError(missing_package("openvino", "openvino")) from error
        config = read_onnx_config(path)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # newer processors would take bfloat16
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = compiled.create_infer_request()
        super().__init__(config, compiled.inputs[0].get_shape()[0])

    def _run(self, clips: Clips) -> npt.NDArray[np.float32]:
        saliency: npt.NDArray[np.float32] = self._request.infer({0: clips})[0]
        return np.array(saliency)  # the request writes over its own output next time


def load_runtime(
    path: Path,
    *,
    runtime: RuntimeName = "torch",
    device: str = "cpu",
    batch: int = 1,
    threads: int | None = None,
) -> Runtime:
    """Load a student from a checkpoint, or from an ONNX file of ``tinyhd export``.

    Args:
        path: The file; one that ends in ``.onnx`` is for the runtimes other than PyTorch.
        runtime: What computes.
        device: Where PyTorch computes.
        batch: Clips at once; an exported file has its own number.
        threads: Threads of the CPU.  Default: all.

    Raises:
        CheckpointError: If the file is no checkpoint.
        ExportError: If it is no exported file, or a package is missing.
        ValueError: If runtime, file and device do not go together.
    """
    threads = threads or len(os.sched_getaffinity(0))
    is_onnx = path.suffix == ".onnx"
    if runtime == "torch":
        if is_onnx:
            raise ValueError(
                f"{path} is an ONNX file; take onnxruntime or openvino, or give the checkpoint"
            )
        if device == "cpu":
            torch.set_num_threads(threads)
        return TorchRuntime(load_model(path), batch=batch, device=device)
    if device != "cpu":
        raise ValueError(f"{runtime} computes on the CPU here, got the device {device!r}")
    build = OnnxRuntime if runtime == "onnxruntime" else OpenVino
    if is_onnx:
        return build(path, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        log.info("exporting %s for %s; tinyhd export does it once and for all", path, runtime)
        file = Path(folder) / "student.onnx"
        export_onnx(load_model(path), file, batch=batch)
        return build(file, threads=threads)
