"""What only the eager kernel promises; its results are compared in tests/test_attention.py."""

import torch
from torch import Tensor

import ringflex as rf

S = 200


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, S, 16, dtype=dtype, requires_grad=True) for _ in range(3))


def block_mask(mask: rf.MaskMod) -> rf.BlockMask:
    return rf.create_block_mask(mask, None, None, S, S, BLOCK_SIZE=32)


def test_a_block_mask_serves_calls_of_other_shapes() -> None:
    """What a kernel keeps on the block mask belongs to one batch size and head count."""
    mask = block_mask(rf.causal() & rf.sliding_window(70))
    for batch, heads in ((1, 2), (3, 4), (1, 2), (2, 1)):
        q, k, v = (torch.randn(batch, heads, S, 8, dtype=torch.float64) for _ in range(3))
        fresh = block_mask(rf.causal() & rf.sliding_window(70))
        kept = rf.flex_attention(q, k, v, block_mask=mask)
        assert torch.equal(kept, rf.flex_attention(q, k, v, block_mask=fresh))
