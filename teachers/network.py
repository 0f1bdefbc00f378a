"""Teachers that are networks with published weights."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from stores.maps import render_maps
from stores.videos import hash_file
from student.checkpoints import FORMAT, read_whole
from student.reference import WeightsError
from teachers.base import Precision, Teacher, TeacherSpec
from teachers.shared import Features, WindowRun

WRAPPERS: Final = ("state_dict", "model", "model_state_dict", "student_model")
"""Entries in which a file may hold the weights."""
SHOWN_KEYS: Final = 3
SEED: Final = 0
"""Of random weights."""


class NetworkTeacher(Teacher):
    """A teacher that is a network. Subclasses say which, and what its maps are.

    Without weights the network has random ones, the same each time: good for measuring, and until
    :meth:`import_weights` gives it others.

    Args:
        device: Where it runs.
        precision: What it computes in.
        weights: File of published weights.

    Attributes:
        network: The network, in evaluation mode; it takes no gradients.

    Raises:
        CheckpointError: If the file cannot be read.
        WeightsError: If its weights are not those of the network.
    """

    title: ClassVar[str]
    """What the network is called in messages."""
    optional_keys: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    """Ends of names that a file need not have: they decide nothing."""

    def __init__(
        self,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        weights: Path | None = None,
    ) -> None:
        self.network: nn.Module = self._random_network()
        self._weights_sha256: str | None = None
        super().__init__(self.make_spec(), device=device, precision=precision)
        self._settle()
        if weights is not None:
            self.read_weights(weights)

    shares_windows: bool = False
    """Whether :meth:`logits` takes a :class:`teachers.shared.WindowRun` as well as windows."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Build the network; its state dict has the published names."""

    @abstractmethod
    def make_spec(self) -> TeacherSpec:
        """Declare the teacher, with the constants of the weights that the network has."""

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        """Label a span; consecutive windows share what they have in common, where they can."""
        windows = [self.window(frame, num_frames) for frame in span]
        runs = _runs(windows) if self.shares_windows else [[window] for window in windows]
        parts = []
        for is_alone, group in groupby(runs, key=lambda run: len(run) == 1):
            if is_alone:
                alone = torch.tensor([window for run in group for window in run])
                parts.append(self.logits(self.lay_out(frames[alone - first].transpose(1, 2))))
            else:
                parts += [self._label_run(frames, run, first=first) for run in group]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _label_run(
        self, frames: Tensor, windows: Sequence[Sequence[int]], *, first: int
    ) -> Mapping[str, Tensor]:
        is_reversed = windows[0][0] > windows[0][-1]
        seen = frames[min(windows[0]) - first : max(windows[-1]) - first + 1]
        if is_reversed:  # the last window is the first one of a video that runs backwards
            seen = seen.flip(0)
        planes = self.logits(WindowRun.of(self.lay_out(seen), len(windows[0])))
        if not is_reversed:
            return planes
        return {name: values.flip(0) for name, values in planes.items()}

    @abstractmethod
    def logits(self, windows: Features) -> Mapping[str, Tensor]:
        """Run the network on whole windows; see :meth:`teachers.base.Teacher.logits`."""

    def lay_out(self, tensor: Tensor) -> Tensor:
        """Bring frames, windows or weights into the memory layout in which the network is fast.

        Channels together: ``benchmarks/teachers.py`` says what that is worth on a CPU. Tensor cores
        want it, too, and they work below float32 only.
        """
        is_last = self.device.type == "cpu" or self.precision != "float32"
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
        if layout is None or not is_last:
            return tensor.contiguous()
        return tensor.contiguous(memory_format=layout)

    @torch.no_grad()
    def predict(self, windows: Tensor) -> dict[str, Tensor]:
        """Return all maps of whole windows, activated, at the size of the input.

        Args:
            windows: ``(B, 3, T, H, W)``, prepared, in the order of :meth:`Teacher.window`.

        Returns:
            Each ``(B, H, W)`` float32, by its published name.
        """
        layout = self.spec.layout
        with self._arithmetic():
            logits = self.logits(self.lay_out(windows))
        planes = {name: values.float() for name, values in logits.items()}
        height, width = windows.shape[-2:]
        return render_maps(planes, layout, layout.names, height=height, width=width)

    def initialise(self, network: nn.Module) -> None:
        """Draw weights that do not fade from layer to layer, so that maps depend on the frames."""
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights' file, or of the tensors; nothing if they are random."""
        return self._weights_sha256

    def read_weights(self, path: Path) -> None:
        """Take the weights of a file; nothing in it is run.

        Raises:
            CheckpointError: If it cannot be read.
            WeightsError: If its weights are not those of the network.
        """
        content = read_whole(path, kind=f"weights of {self.title}")
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds no weights by name")
        try:
            self.import_weights(content)
        except MisfitError as error:
            hint = _hint(content)
            raise WeightsError(f"{path} does not fit: {error.brief}{hint}") from error
        self._weights_sha256 = hash_file(path).hex()

    def import_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Take weights with the published names.

        Args:
            state_dict: Tensors by name, or a dictionary that holds them in one of ``WRAPPERS``; the
                names may begin with ``module.``.

        Raises:
            WeightsError: If a tensor is missing, not expected, or of another shape or type.
        """
        if not isinstance(state_dict, Mapping):
            raise WeightsError(
                f"weights of {self.title} are tensors by name, got a {type(state_dict).__name__}"
            )
        given = unwrap(state_dict)
        with torch.random.fork_rng(devices=[]):
            network = self.build_network()  # a new one: nothing changes if the weights do not fit
        wanted = network.state_dict()
        optional = {key: value for key, value in wanted.items() if key.endswith(self.optional_keys)}
        given = {**optional, **given}
        check_fit(given, wanted, title=self.title)
        network.load_state_dict(given)
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.spec = self.make_spec()
        self._weights_sha256 = _digest(given)
        self._settle()

    def _settle(self) -> None:
        """Bring the network to where it runs."""
        self.network.to(self.device)
        for parameter in self.network.parameters():
            parameter.data = self.lay_out(parameter.data)

    def _random_network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)  # of the CPU alone, unlike torch.manual_seed
            network = self.build_network()
            self.initialise(network)
        return network.eval().requires_grad_(requires_grad=False)


def _runs(windows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Group windows that begin one frame after the other and run the same way in time."""
    runs: list[list[Sequence[int]]] = []
    for window in map(list, windows):
        way = 1 if window[0] <= window[-1] else -1
        is_gapless = window == list(range(window[0], window[-1] + way, way))
        if runs and is_gapless and [frame + 1 for frame in runs[-1][-1]] == window:
            runs[-1].append(window)
        else:
            runs.append([window])
    return runs


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors by name in a dictionary, without what training puts around them."""
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    given = {str(key): value for key, value in content.items()}
    while given and all(key.startswith("module.") for key in given):
        given = {key.removeprefix("module."): value for key, value in given.items()}
    return given


class MisfitError(WeightsError):
    """Weights are not those of a network; every name at fault is said.

    Args:
        title: Of the network.
        faults: Names at fault, by what they are.

    Attributes:
        brief: The same with the first few names of each fault.
    """

    def __init__(self, title: str, faults: Mapping[str, Sequence[str]]) -> None:
        def told(shown: int | None) -> str:
            parts = [
                f"{len(keys)} {fault}: {', '.join(keys[:shown])}"
                + (", ..." if shown is not None and len(keys) > shown else "")
                for fault, keys in faults.items()
                if keys
            ]
            return f"these are not the weights of {title}: {'; '.join(parts)}"

        super().__init__(told(None))
        self.brief = told(SHOWN_KEYS)


def check_fit(given: Mapping[str, Any], wanted: Mapping[str, Tensor], *, title: str) -> None:
    """Refuse weights that are not those of a network.

    Raises:
        MisfitError: If a tensor is missing, not expected, or of another shape or type.
    """

    def is_like(value: object, tensor: Tensor) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value.is_floating_point() == tensor.is_floating_point()

    both = [key for key in wanted if key in given]
    alike = [key for key in both if is_like(given[key], wanted[key])]
    faults = {
        "missing": [key for key in wanted if key not in given],
        "not expected": [key for key in given if key not in wanted],
        "not of numbers of the right kind": [key for key in both if key not in alike],
        "misshaped": [
            f"{key} of {_shape(given[key])} instead of {_shape(wanted[key])}"
            for key in alike
            if given[key].shape != wanted[key].shape
        ],
    }
    if any(faults.values()):
        raise MisfitError(title, faults)


def _hint(content: Mapping[str, Any]) -> str:
    """Return what weights are that do not fit, if they are known."""
    from teachers.registry import TEACHERS  # which knows this module

    if content.get("format") == FORMAT:
        return "; it is a checkpoint of TinyHD Toolkit: use --teacher assistant"
    given = unwrap(content)
    if any(key.startswith("encoder.encoder.") for key in given):
        return (
            "; they look like a TinyHD's: make a checkpoint of them with tinyhd weights import, "
            "and use --teacher assistant"
        )
    for name, factory in TEACHERS.items():
        if isinstance(factory, type) and issubclass(factory, NetworkTeacher):
            wanted = factory().network.state_dict()
            optional = {key: wanted[key] for key in wanted if key.endswith(factory.optional_keys)}
            try:
                check_fit({**optional, **given}, wanted, title=name)
            except MisfitError:
                continue
            else:
                return f"; they fit the teacher {name!r}"
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
