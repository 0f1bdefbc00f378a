from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stores.maps import DerivedMap, MapLayout, MapSpec, render_maps


def spec(name: str, height: int, width: int, **kinds: str) -> MapSpec:
    return MapSpec(name=name, height=height, width=width, **kinds)  # type: ignore[arg-type]


# The form of HD2S: half-resolution logits, doubled before the sigmoid, fused by a weighted sum.
FUSED = MapLayout(
    height=16,
    width=24,
    maps=tuple(
        spec(name, 8, 12, activation="sigmoid", order="resize_first") for name in ("a", "b")
    ),
    derived=(
        DerivedMap(name="out", terms=(("b", 0.7), ("a", -1.5)), bias=0.3, activation="sigmoid"),
    ),
    saliency="out",
    hierarchical=("a", "b"),
)


def test_derived_map_is_composed_at_the_input_size() -> None:
    planes = torch.randn(2, 2, 8, 12)
    maps = render_maps({"maps_8x12": planes}, FUSED, ["out", "a"], height=16, width=24)
    big = F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False).sigmoid()
    expected = torch.sigmoid(0.7 * big[:, 1] - 1.5 * big[:, 0] + 0.3)
    torch.testing.assert_close(maps["out"], expected)
    torch.testing.assert_close(maps["a"], big[:, 0])


def test_activation_comes_before_or_after_the_resize_as_declared() -> None:
    plane = torch.randn(1, 1, 4, 4) * 3
    for order, expected in (
        ("resize_first", F.interpolate(plane, (8, 8), mode="bilinear").exp()),
        ("activate_first", F.interpolate(plane.exp(), (8, 8), mode="bilinear", antialias=True)),
    ):
        layout = MapLayout(
            height=8,
            width=8,
            maps=(spec("m", 4, 4, activation="exp", order=order),),
            saliency="m",
        )
        maps = render_maps({"maps_4x4": plane}, layout, ["m"], height=8, width=8)
        torch.testing.assert_close(maps["m"], expected[:, 0])


def test_maps_of_one_resolution_share_an_array_in_order() -> None:
    planes = torch.arange(2.0).reshape(1, 2, 1, 1).expand(1, 2, 8, 12)
    maps = render_maps({"maps_8x12": planes}, FUSED, ["b", "a"], height=16, width=24)
    assert maps["a"].unique().item() == pytest.approx(torch.tensor(0.0).sigmoid().item())
    assert maps["b"].unique().item() == pytest.approx(torch.tensor(1.0).sigmoid().item())


def test_layout_survives_its_plain_form() -> None:
    import json

    assert MapLayout.from_dict(json.loads(json.dumps(FUSED.to_dict()))) == FUSED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saliency": "nowhere"}, "nowhere"),
        ({"hierarchical": ("a", "z")}, "z"),
        ({"maps": FUSED.maps * 2}, "must differ"),
        ({"maps": FUSED.maps[:1]}, "derived from"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(FUSED, **change)  # type: ignore[arg-type]
