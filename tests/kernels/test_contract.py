"""Contracts bind symbols across arguments and name the offender."""

from __future__ import annotations

import pytest
import torch

from splitdecode.kernels.contract import Contract


def test_symbols_bind_across_arguments() -> None:
    contract = Contract("op", D=4)
    k = torch.zeros(3, 2, 4)
    assert contract.expect("k", k, "T Hkv D", torch.float32, device=k.device, contiguous=True) is k
    contract.expect("cu", torch.zeros(4), "T+1")
    with pytest.raises(ValueError, match=r"op: slots: expected \[T\] with T = 3 \(from k\), found \[5\]"):
        contract.expect("slots", torch.zeros(5), "T")


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ("T", None, r"op: x: expected \[T\], found \[2, 3\]"),
        ("2 4", None, r"with 4 = 4 \(from the contract\)"),
        ("T D", (torch.float64, torch.float16), "expected torch.float64 or torch.float16, found torch.float32"),
    ],
)
def test_the_offender_is_named(shape: str, dtype: torch.dtype | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Contract("op").expect("x", torch.zeros(2, 3), shape, dtype)


def test_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="expected a contiguous tensor, found strides"):
        Contract("op").expect("x", torch.zeros(2, 3).t(), "_ _", contiguous=True)
    with pytest.raises(ValueError, match="expected a tensor on meta"):
        Contract("op").expect("x", torch.zeros(2), "_", device=torch.device("meta"))
