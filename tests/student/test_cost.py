from __future__ import annotations

import pytest
import torch

from student.config import VARIANTS, TinyHDConfig, build_config
from student.cost import computed_macs, cost_of
from student.tinyhd import TinyHD
from tests.student.networks import PUBLISHED

MACS = {
    **{"m_rc1": 7_220_714_496, "m_rc2": 6_162_490_368, "m_rc4": 3_556_525_056},
    **{"m_rc8": 4_399_461_504, "s_rc1": 5_129_318_400, "s_rc2": 3_345_928_704},
    **{"s_rc4": 2_068_578_816, "s_rc8": 2_495_702_016, "m_d1only": 16_066_219_008},
    **{"s_d1only": 3_258_921_984, "s_d2only": 2_705_344_512, "s_d3only": 2_255_803_392},
    **{"m_d2only": 3_685_791_744, "m_d3only": 3_090_975_744, "m_rc1_d1last": 7_220_714_496},
    **{"m_rc1_fff": 19_918_055_424, "m_rc4_fff": 16_117_220_352, "m_rc1_n8": 6_324_375_552},
    "m_rc1_force": 5_072_111_616,
}
"""As published."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_accumulates_are_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    config = TinyHDConfig.from_dict({**published, "decoders": list(published["decoders"])})
    cost = cost_of(config)
    assert cost.macs == MACS[name]
    assert sum(cost.macs_by_part.values()) == cost.macs
    assert cost.macs_per_map == MACS[name] / published["output_frames"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_changes_hardly_touch_the_arithmetic(variant: str) -> None:
    """Less by padding that is not computed, more by the product that doubles frames."""
    config = build_config(variant, height=64, width=64)
    model = TinyHD(config).for_inference()
    computed = computed_macs(model, torch.zeros(1, 3, 16, 64, 64))
    assert 0.99 < computed / cost_of(config).macs < 1.02
