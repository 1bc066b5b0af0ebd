"""Keys and values of every layer, in blocks: where a step writes them and attention reads them.

Layout follows PagedAttention (Kwon et al. 2023, https://arxiv.org/abs/2309.06180): a block holds `block_size` tokens of one
sequence. Which blocks are whose is `kv_cache.py`'s knowledge.
"""

from __future__ import annotations

import torch

from loramux_adapters.kernels import zeros_on_demand
from loramux_adapters.native.library import Native, takes


class KVStore:
    """Per layer `[num_blocks + 1, block_size, 2, kv_heads, head_dim]`.

    The last block, `nobodys`, is for rows that only fill a step up to a size.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        native: Native | None = None,
    ) -> None:
        """`native` writes, if it is given; it must be for this dtype and device."""
        self._native = native
        self.block_size = block_size
        self.nobodys = num_blocks
        shape = (num_blocks + 1, block_size, 2, kv_heads, head_dim)
        self.layers = [zeros_on_demand(shape, dtype, device) for _ in range(layers)]

    def write(
        self, layer: int, slots: torch.Tensor, begun: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store `[T, kv_heads, head_dim]` keys and values at flat positions `slots [T]`.

        The blocks `begun` are cleared before: decoding reads them whole, and what their last owner left may be NaN,
        which no mask takes out of a sum.
        """
        if len(begun):
            self.layers[layer].index_fill_(0, begun, 0.0)
        store = self.layers[layer]
        whole = key.shape == value.shape == (len(slots), *store.shape[3:])  # what is not, torch refuses below
        if self._native is not None and whole and takes(key, value, store):
            self._native.write(store, slots, key, value)
            return
        flat = self.layers[layer].view(-1, 2, *self.layers[layer].shape[3:])
        flat[slots] = torch.stack((key, value), dim=1)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `[..., n]` blocks as `[..., kv_heads, n * block_size, head_dim]` views of one copy."""
        store = self.layers[layer]
        picked = store.index_select(0, blocks.reshape(-1))
        picked = picked.view(*blocks.shape[:-1], -1, 2, *store.shape[3:])
        key, value = picked.unbind(-3)
        return key.transpose(-3, -2), value.transpose(-3, -2)
