"""Presets reproduce the published sizes: weights read per token, KV per token, flops."""

from __future__ import annotations

import pytest

from splitdecode.errors import CheckpointError
from splitdecode.models import geometry

# name: weights read GB (bf16), KV KiB per token (bf16), GFLOP per token in linears, in the head
FIGURES = {
    "0.5b": (0.988, 12, 0.72, 0.27),
    "1.5b": (3.087, 28, 2.62, 0.47),
    "7b": (14.14, 56, 13.05, 1.09),
    "14b": (27.98, 192, 26.4, 1.56),
    "32b": (63.97, 256, 62.4, 1.56),
    "72b": (142.9, 320, 140.4, 2.49),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str) -> None:
    read, kv, linear, head = FIGURES[name]
    config = geometry.preset(name)
    assert geometry.weight_bytes(config) / 1e9 == pytest.approx(read, rel=6e-4)
    assert geometry.kv_bytes(config) / 1024 == kv
    assert geometry.linear_flops(config) / 1e9 == pytest.approx(linear, rel=7e-3)
    assert geometry.head_flops(config) / 1e9 == pytest.approx(head, rel=2e-2)


def test_attention_at_16k_is_a_third_of_the_linears_of_32b() -> None:
    config = geometry.preset("32b")
    assert geometry.attention_flops(config, 16384) / geometry.linear_flops(config) == pytest.approx(0.34, abs=0.01)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("r1-distill-1.5b", 1_777_088_000),
        ("r1-distill-7b", 7_615_616_512),
        ("r1-distill-14b", 14_770_033_664),
        ("r1-distill-32b", 32_763_876_352),
        ("r1-distill-8b", 8_030_261_248),
        ("r1-distill-70b", 70_553_706_496),
    ],
)
def test_distilled_models_have_their_published_parameter_counts(name: str, count: int) -> None:
    assert geometry.parameters(geometry.preset(name)) == count


def test_every_name_is_a_preset_and_others_are_refused() -> None:
    assert all(geometry.preset(name).num_layers for name in geometry.preset_names())
    for name in ("8b", "r1-distill-0.5b", ""):
        with pytest.raises(CheckpointError, match="geometry: expected one of"):
            geometry.preset(name)
