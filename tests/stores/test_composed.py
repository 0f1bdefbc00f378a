"""HD2S's form: four logit planes stored, the fused map composed when it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, logsumexp

from stores import schema
from stores.codec import GRID_STEP, silence_codec_remark
from stores.maps import DerivedMap, MapLayout, MapSpec, error_bounds
from stores.targets import TargetStore
from tests.stores.test_targets import record

NAMES = ("sal5", "sal4", "sal3", "sal2")
WEIGHTS, BIAS = (2.5, -0.75, 1.25, 0.5), -1.0


def hd2s_form(weights: tuple[float, ...] = WEIGHTS) -> MapLayout:
    return MapLayout(
        height=8,
        width=12,
        maps=tuple(
            MapSpec(name=name, height=4, width=6, activation="sigmoid", order="resize_first")
            for name in NAMES
        ),
        derived=(
            DerivedMap(
                name="out",
                terms=tuple(zip(NAMES, weights, strict=True)),
                bias=BIAS,
                activation="sigmoid",
            ),
        ),
        saliency="out",
        hierarchical=NAMES[::-1],
    )


def doubled(planes: np.ndarray) -> np.ndarray:
    """Bilinear, factor 2, half-pixel centres, along the last two axes: by its formula."""
    for axis in (-2, -1):
        length = planes.shape[axis]
        before = np.take(planes, np.maximum(np.arange(length) - 1, 0), axis)
        after = np.take(planes, np.minimum(np.arange(length) + 1, length - 1), axis)
        halves = (0.25 * before + 0.75 * planes, 0.75 * planes + 0.25 * after)
        pair = np.stack(halves, axis % planes.ndim + 1)
        shape = list(planes.shape)
        shape[axis] *= 2
        planes = pair.reshape(shape)
    return planes


def fused_logit(planes: np.ndarray, weights: tuple[float, ...] = WEIGHTS) -> np.ndarray:
    maps = expit(doubled(planes.astype(np.float64)))
    return np.tensordot(maps, np.asarray(weights), (1, 0)) + BIAS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    store = TargetStore.create(tmp_path_factory.mktemp("composed") / "targets.zarr")
    store.add_videos([record("v", 16)])
    return store


def through_the_store(store: TargetStore, layout: MapLayout, planes: np.ndarray) -> np.ndarray:
    silence_codec_remark()  # pytest has forgotten that of the store
    request = schema.LabelRequest(
        teacher="hd2s", provenance={"window": 1}, layout=layout, shard_frames=16
    )
    labels = store.ensure_set(request, {})
    video = store.video("v")
    whole = np.repeat(planes, 16, axis=0).astype(np.float32)
    shard = labels.shards(video)[0]
    labels.commit([labels.write_shard(shard, {"maps_4x6": whole}, video)])
    return labels.read_maps("v", 3, 4)["out"]


def test_fused_map_is_composed_when_it_is_read(store: TargetStore) -> None:
    grid = np.random.default_rng(0).integers(-90, 90, (1, 4, 4, 6)) * GRID_STEP
    out = through_the_store(store, hd2s_form(), grid)
    np.testing.assert_allclose(out, expit(fused_logit(grid)), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    planes=hnp.arrays(np.float64, (1, 4, 4, 6), elements=st.floats(-12, 12, width=32))
    | hnp.arrays(  # half way between two of the grid, where sigmoids are steep
        np.float64,
        (1, 4, 4, 6),
        elements=st.integers(-40, 40).map(lambda k: (k + 0.5) * GRID_STEP),
    )
)
def test_composed_map_stays_within_its_bound(store: TargetStore, planes: np.ndarray) -> None:
    layout = hd2s_form()
    bounds = error_bounds(layout, GRID_STEP)["derived"]["out"]
    assert bounds["logit"] == pytest.approx(GRID_STEP * 5.0 / 8)
    kept = through_the_store(store, layout, planes).astype(np.float64)
    exact = fused_logit(planes)
    assert np.abs(np.log(kept / (1 - kept)) - exact).max() <= bounds["logit"] + 1e-4
    log_exact = np.log(expit(exact))
    log_kept = np.log(kept)
    log_exact, log_kept = log_exact - logsumexp(log_exact), log_kept - logsumexp(log_kept)
    assert (np.exp(log_exact) * (log_exact - log_kept)).sum() <= bounds["kl_nats"] + 1e-7


def test_sums_without_a_bound_say_so() -> None:
    maps = tuple(
        MapSpec(name=name, height=4, width=4, activation="exp", order="activate_first")
        for name in ("a", "b")
    )

    def bounds(first: float, kind: str) -> dict[str, float | None]:
        rule = DerivedMap(name="out", terms=(("a", first), ("b", 0.5)), activation=kind)  # type: ignore[arg-type]
        layout = MapLayout(height=8, width=8, maps=maps, derived=(rule,), saliency="out")
        found: dict[str, float | None] = error_bounds(layout, GRID_STEP)["derived"]["out"]
        return found

    assert bounds(0.5, "identity") == {"logit": None, "kl_nats": GRID_STEP**2 / 8}
    assert bounds(-0.5, "identity") == {"logit": None, "kl_nats": None}
    assert bounds(0.5, "sigmoid") == {"logit": None, "kl_nats": None}
