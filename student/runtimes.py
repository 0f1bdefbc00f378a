"""Run a student: with PyTorch, ONNX Runtime or OpenVINO."""

from __future__ import annotations

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from student.checkpoints import load_model
from student.config import TinyHDConfig
from student.export import (
    ExportError,
    export_onnx,
    import_onnxruntime,
    missing_package,
    read_onnx_config,
)
from student.streaming import StreamingStudent
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

    def begin_video(self) -> None:  # noqa: B027 - most have nothing to do
        """Be told that the next clips are of another video."""

    def pass_by(self, clips: Clips, *, newest: Sequence[int]) -> None:  # noqa: B027 - as above
        """Be shown clips whose maps are not wanted, so that the next ones' are the same bits."""

    @abstractmethod
    def predict(
        self, clips: Clips, *, newest: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the saliency maps of at most ``batch`` clips.

        Args:
            clips: The clips.
            newest: For each, the index of its newest frame in the video. With it, work that
                overlapping clips have in common may be done once.

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
        shares = batch == 1 and not model.config.is_multi
        self._streaming = StreamingStudent(self._model) if shares else None

    def begin_video(self) -> None:
        if self._streaming is not None:
            self._streaming.forget()

    def pass_by(self, clips: Clips, *, newest: Sequence[int]) -> None:
        if self._streaming is not None:
            self._streaming.pass_by(torch.from_numpy(clips).to(self._device), newest[0])

    @torch.inference_mode()
    def predict(
        self, clips: Clips, *, newest: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        tensor = torch.from_numpy(clips).to(self._device)
        if self._streaming is not None and newest is not None:
            saliency = self._streaming.see(tensor, newest[0]).saliency
        else:
            saliency = self._model(tensor).saliency
        maps: npt.NDArray[np.float32] = saliency.flatten(1, -3).cpu().numpy()
        return maps


class _OnnxFile(Runtime):
    """What runtimes of an exported file share: it takes whole batches only."""

    def predict(
        self,
        clips: Clips,
        *,
        newest: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
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
        onnxruntime = import_onnxruntime()
        config = read_onnx_config(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise ExportError(f"ONNX Runtime cannot read {path}: {_first_line(error)}") from error
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
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read {path}: {_first_line(error)}") from error
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
    batch: int | None = None,
    threads: int | None = None,
) -> Runtime:
    """Load a student from a checkpoint, or from an ONNX file of ``tinyhd export``.

    Args:
        path: The file; one that ends in ``.onnx`` is for the runtimes other than PyTorch.
        runtime: What computes.
        device: Where PyTorch computes.
        batch: Clips at once.  Default: 1; an exported file has its own number.
        threads: Threads of the CPU; PyTorch has one number for the whole process.  Default: all.

    Raises:
        CheckpointError: If the file is no checkpoint.
        ExportError: If it is no exported file, or a package is missing.
        ValueError: If runtime, file and device do not go together.
    """
    threads = threads or torch.get_num_threads()
    is_onnx = path.suffix == ".onnx"
    if runtime == "torch":
        if is_onnx:
            raise ValueError(
                f"{path} is an ONNX file; take onnxruntime or openvino, or give the checkpoint"
            )
        _check_device(device)
        if device == "cpu":
            torch.set_num_threads(threads)
        return TorchRuntime(load_model(path), batch=batch or 1, device=device)
    if device != "cpu":
        raise ValueError(f"{runtime} computes on the CPU here, got the device {device!r}")
    build = OnnxRuntime if runtime == "onnxruntime" else OpenVino
    if is_onnx:
        student = build(path, threads=threads)
        if batch not in (None, student.batch):
            raise ValueError(
                f"{path} takes {student.batch} clips at once, not {batch}; export it with --batch "
                f"{batch}"
            )
        return student
    with tempfile.TemporaryDirectory() as folder:
        log.info("exporting %s for %s; tinyhd export does it once and for all", path, runtime)
        file = Path(folder) / "student.onnx"
        export_onnx(load_model(path), file, batch=batch or 1)
        return build(file, threads=threads)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device fails in its own way
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ValueError(
            f"PyTorch cannot compute on {device!r} here; there are: {', '.join(['cpu', *gpus])}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
