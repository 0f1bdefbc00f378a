"""Leases and reading on Google Cloud Storage and Azure, whose conditions and ranges differ."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stores.errors import StoreBusyError
from stores.lease import ObjectLease
from stores.places import ObjectPlace, open_place
from tests.stores.cloud import cloud


@pytest.fixture(params=["gs", "az"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectPlace]:
    with cloud() as url:
        account = tmp_path / "account.json"
        keys = {"client_email": "", "private_key": "", "private_key_id": ""}
        account.write_text(json.dumps({"gcs_base_url": url, "disable_oauth": True, **keys}))
        for name, value in {
            "GOOGLE_SERVICE_ACCOUNT": str(account),
            "GOOGLE_SKIP_SIGNATURE": "true",
            "GOOGLE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(bytes(64)).decode(),
            "AZURE_STORAGE_ENDPOINT": f"{url}/account",
            "AZURE_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, value)
        place = open_place(f"{request.param}://bucket/targets.zarr")
        assert isinstance(place, ObjectPlace)
        yield place


def test_parts_of_an_object_are_read(place: ObjectPlace) -> None:
    data = bytes(range(200))
    place.write("labels/a/c.0", data)
    assert place.read("labels/a/c.0") == data
    assert place.read_end("labels/a/c.0", 20) == (data[-20:], 200)
    assert place.read_end("labels/a/c.0", 500) == (data, 200)
    assert place.read_ranges("labels/a/c.0", [(0, 5), (50, 7)]) == [data[:5], data[50:57]]
    with pytest.raises(FileNotFoundError):
        place.read_end("labels/a/c.1", 20)


def test_lease_is_renewed_given_back_and_taken_over(place: ObjectPlace) -> None:
    with ObjectLease(place, beat_seconds=0.05, stale_seconds=2) as held:
        time.sleep(0.5)
        held.check()
        with pytest.raises(StoreBusyError), ObjectLease(place, stale_seconds=2):
            pass
        held.check()
    with (
        ObjectLease(place, beat_seconds=1000, stale_seconds=1000) as asleep,
        ObjectLease(place, beat_seconds=0.05, stale_seconds=0.4) as second,
    ):
        second.check()
        with pytest.raises(StoreBusyError, match="taken over"):
            asleep.check()
