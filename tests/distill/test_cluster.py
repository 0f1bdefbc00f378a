"""A Ray cluster of several raylets, on this machine, as labs have it on several."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distill import DistillSettings, label_videos
from stores.targets import TargetStore
from stores.verify import verify_store
from tests.distill.test_faults import FAKE, contents

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

PROJECT = Path(__file__).resolve().parents[2]
LENGTHS = (300, 210, 150, 60, 44)
SETTINGS = DistillSettings(teacher=FAKE, shard_frames=16, executor="inline", variant="both")
NUM_UNITS = sum(-(-length // 16) for length in LENGTHS)

pytestmark = pytest.mark.ray


class RayCluster:
    """A head and nodes of one CPU each."""

    def __init__(self, nodes: int, **head_options: Any) -> None:  # noqa: ANN401
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, **head_options}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._cluster.add_node(num_cpus=1) for _ in range(nodes)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def lose(self, node: Any) -> None:  # noqa: ANN401 - of Ray
        """Kill a node's raylet, as if its machine were gone, and get another one."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._cluster.add_node(num_cpus=1))

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes whose workers do not work in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.delenv("PYTHONPATH", raising=False)
        cluster = RayCluster(3)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number, frames in enumerate(LENGTHS):
        make_video(folder / f"{number}.avi", frames=frames, seed=number)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "targets.zarr"
    report = label_videos([videos], path, SETTINGS)
    assert report.shards == 2 * NUM_UNITS >= 80
    return path


def command(address: str, videos: Path, store: str, script: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, str(PROJECT / "cli.py"), "distill", str(videos), "--store", store),
        *("--teacher", FAKE, "--weights", str(script), "--variant", "both"),
        *("--shard-frames", "16", "--address", address, "--retry-failed", *options),
    ]


def slow(path: Path, seconds: float) -> Path:
    path.write_text(f'[{{"do": "sleep", "seconds": {seconds}}}]')
    return path


def run(arguments: list[str], folder: Path) -> str:
    result = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_cluster_writes_the_bytes_of_one_process(
    cluster: RayCluster, videos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The workers get the code, the teacher's too, from the driver."""
    store = tmp_path / "targets.zarr"
    script = slow(tmp_path / "script", 0.01)
    said = run(command(cluster.address, videos, str(store), script), tmp_path)
    assert f"5 videos complete, {2 * NUM_UNITS} shards written" in said
    assert contents(store) == contents(undisturbed)


def test_cluster_that_is_not_there_is_said_so_in_one_line(videos: Path, tmp_path: Path) -> None:
    script = slow(tmp_path / "script", 0.01)
    began = time.monotonic()
    result = subprocess.run(
        command("127.0.0.1:1", videos, str(tmp_path / "t.zarr"), script),
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "probing" not in line]
    assert line.startswith("Error: cannot reach a Ray cluster at 127.0.0.1:1")
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_cluster_fills_a_store_on_s3(
    cluster: RayCluster, bucket: str, videos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = f"{bucket}/cluster/targets.zarr"
    script = slow(tmp_path / "script", 0.01)
    said = run(command(cluster.address, videos, url, script), tmp_path)
    assert "5 videos complete" in said
    assert verify_store(url).problems == []
    there = TargetStore.open(url).place
    for name, data in contents(undisturbed).items():
        assert there.read(name) == data, name


@pytest.mark.slow
def test_node_that_is_lost_costs_nothing_but_time(
    cluster: RayCluster, videos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "targets.zarr"
    script = slow(tmp_path / "script", 0.05)
    arguments = command(cluster.address, videos, str(store), script, "--actors", "3")
    process = start(arguments, tmp_path)
    wait_for(lambda: len(list(store.glob("labels/*/maps_4x6/c.*"))) > 10, process)
    cluster.lose(cluster.nodes[0])
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "failed: the " in errors  # a worker was lost with its node
    assert "5 videos complete" in output
    assert contents(store) == contents(undisturbed)


@pytest.mark.slow
def test_ray_out_of_memory_killer_is_survived(
    videos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A worker that eats the machine's memory is killed by Ray; another one does its work."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    kib = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    threshold = 1 - (kib["MemAvailable"] - 2 * 2**20) / kib["MemTotal"]  # 2 GiB more than now
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        cluster = RayCluster(1)
    try:
        script = tmp_path / "script"
        script.write_text('[{"do": "take memory", "video": 60, "at": 20, "times": 1}]')
        store = tmp_path / "targets.zarr"
        process = start(command(cluster.address, videos, str(store), script), tmp_path)
        _, errors = process.communicate(timeout=200)
    finally:
        cluster.close()
    assert process.returncode == 0, errors
    assert "Ray stopped the worker, as its machine was running out of memory" in errors
    assert contents(store) == contents(undisturbed)


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(1, 3), *(pytest.param(seed, 24, marks=pytest.mark.slow) for seed in (2, 3))],
)
def test_chaos(
    cluster: RayCluster, videos: Path, undisturbed: Path, tmp_path: Path, seed: int, kills: int
) -> None:
    """Workers, drivers and nodes are killed at random moments: the store is the undisturbed one."""
    rng = random.Random(seed)
    script = slow(tmp_path / "script", 0.1)
    victims = ["driver", "node", "worker"]  # each at least once
    victims += rng.choices(["driver", "node", "worker"], [3, 2, 5], k=kills - 3)
    rng.shuffle(victims)
    killed: Counter[str] = Counter()
    rounds = 0
    while victims:
        rounds += 1
        store = tmp_path / f"{rounds}.zarr"
        arguments = command(cluster.address, videos, str(store), script, "--actors", "3")
        process = start(arguments, tmp_path)
        while True:
            if process.poll() is not None:
                _, errors = process.communicate()
                assert process.returncode in (0, -signal.SIGKILL), errors
                if process.returncode == 0:
                    break
                process = start(arguments, tmp_path)
            if victims and working():
                time.sleep(rng.uniform(0, 2))
                killed[kill(victims.pop(), cluster, process, rng)] += 1
            time.sleep(0.1)
        assert contents(store) == contents(undisturbed)
        assert verify_store(str(store)).problems == []
    assert sum(killed.values()) == kills
    sys.stderr.write(f"seed {seed}: {dict(killed)} in {rounds} rounds of {2 * NUM_UNITS} shards\n")


def kill(
    victim: str, cluster: RayCluster, process: subprocess.Popen[str], rng: random.Random
) -> str:
    if victim == "node":
        cluster.lose(rng.choice(cluster.nodes))
    elif victim == "worker" and (there := working()):
        os.kill(rng.choice(there), signal.SIGKILL)
    else:
        victim = "driver"
        process.kill()
    return victim


def working() -> list[int]:
    """Return the processes of workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::LabelWorker"):
                found.append(int(path.parent.name))
        except OSError:  # it is gone
            continue
    return sorted(found)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)}, start_new_session=True,
    )  # fmt: skip


def wait_for(is_true: Any, process: subprocess.Popen[str]) -> None:  # noqa: ANN401
    deadline = time.monotonic() + 60
    while not is_true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
