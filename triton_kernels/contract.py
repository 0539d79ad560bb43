"""F1: executable contracts. `Contract.expect(tensor, "T Hkv D", dtype)` binds symbols across the arguments of one call.

    with_sizes = Contract("rope", D=64)          # symbols known beforehand
    with_sizes.expect("k", k, "T Hkv D", x.dtype)
    with_sizes.expect("slots", slots, "T", torch.int64)   # T was bound by k: a mismatch names slots, not k

Meant for tests and slow paths; the per-token path does not call it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Contract:
    """The shape symbols of one call: each is bound by the first argument that shows it."""

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {name: (size, "the call") for name, size in sizes.items()}

    def expect(
        self,
        name: str,
        tensor: Tensor,
        shape: str,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        *,
        device: torch.device | None = None,
        contiguous: bool = False,
    ) -> Tensor:
        """Checks one argument and returns it.

        shape: dimensions in order, each a symbol ("T"), a number ("2"), a sum ("R+1") or "_" for any size.
        Raises ValueError naming the op, the argument, and what was expected and found.
        """
        found = tuple(tensor.shape)
        dims = shape.split()
        if len(dims) != len(found):
            raise ValueError(f"{self.op}: {name}: expected [{shape}], found {list(found)}")
        for dim, size in zip(dims, found, strict=True):
            self._bind(name, dim, size, shape, found)
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if dtypes is not None and tensor.dtype not in dtypes:
            wanted = " or ".join(str(one) for one in dtypes)
            raise ValueError(f"{self.op}: {name}: expected {wanted}, found {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{self.op}: {name}: expected a tensor on {device}, found one on {tensor.device}")
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{self.op}: {name}: expected a contiguous tensor, found strides {tensor.stride()}")
        return tensor

    def _bind(self, name: str, dim: str, size: int, shape: str, found: tuple[int, ...]) -> None:
        symbol, _, plus = dim.partition("+")
        add = int(plus) if plus else 0
        if symbol == "_":
            return
        if symbol.isdigit():
            self.sizes.setdefault(symbol, (int(symbol), "the contract"))
        if symbol not in self.sizes:
            self.sizes[symbol] = (size - add, name)
            return
        bound, by = self.sizes[symbol]
        if bound + add != size:
            raise ValueError(
                f"{self.op}: {name}: expected [{shape}] with {symbol} = {bound} (from {by}), found {list(found)}"
            )
