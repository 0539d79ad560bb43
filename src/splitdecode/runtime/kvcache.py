"""F4: one model's paged keys and values: the tensor that holds them and the pool that lends its pages out."""

from __future__ import annotations

from splitdecode._C import PagePool
from splitdecode.errors import CapacityError
from splitdecode.models import ModelConfig, Transformer


class KVCache:
    """One model's paged keys and values.

    kv: [L, num_pages, page_size, 2, Hkv, D] in the model's dtype; layout: triton_kernels/README.md.
    """

    def __init__(
        self, model: Transformer, num_pages: int, page_size: int, prefix_caching: bool, *, null_page: bool = False
    ) -> None:
        """null_page: one page more, which the pool does not lend: where rows that do nothing write."""
        if num_pages < 1:
            need = page_size * kv_token_bytes(model.config, model.dtype.itemsize)
            raise CapacityError(f"the KV-cache memory does not hold one page of {page_size} tokens ({need} bytes)")
        self.pool = PagePool(num_pages, page_size, prefix_caching)
        self.kv = model.new_cache(num_pages + null_page, page_size)

    @property
    def tokens(self) -> int:
        """Positions the cache can hold."""
        return self.pool.num_pages * self.pool.page_size


def kv_token_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of keys and values of one position."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize
