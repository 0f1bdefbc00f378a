from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from stores.memory import KEEP_FREED

COUNT_FAULTS = """
import resource, sys, threading
import torch
from stores.memory import keep_freed_memory

def count():
    for _ in range(20):
        torch.ones(2**24)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
if sys.argv[1] == "in a thread":
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
else:
    count()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="changes glibc's malloc only")
def test_freed_memory_is_used_again() -> None:
    """In processes of their own: it cannot be undone."""

    def faults(how: str, **environment: str) -> int:
        output = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, how],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        ).stdout
        return int(output)

    by_default = faults("as it is")
    assert faults("keep") < by_default / 10
    assert faults("in a thread", **KEEP_FREED) < by_default / 10


@pytest.mark.usefixtures("local_ray")
def test_label_workers_have_it_in_their_environment() -> None:
    import ray

    found = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert {name: found.get(name) for name in KEEP_FREED} == dict(KEEP_FREED)
    assert not KEEP_FREED.keys() & os.environ.keys()
