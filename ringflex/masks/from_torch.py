"""torch's BlockMask -> ours."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.mods import full
from ringflex.masks.runs import Array, Runs
from ringflex.masks.trace_cache import identity_of, traced_mask


class _Kept(NamedTuple):
    """A conversion, and what it depends on.

    Attributes:
        identity: of the mod, and sizes.
        tensors, versions: the block lists, what the mod holds, and how often they had changed.
    """

    identity: Any
    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    mask: BlockMask


_kept: weakref.WeakKeyDictionary[TorchBlockMask, _Kept] = weakref.WeakKeyDictionary()


def from_torch(block_mask: TorchBlockMask) -> BlockMask:
    """Converts a `torch.nn.attention.flex_attention.BlockMask`, which waits for its device.

    The conversion is kept for as long as the mask lives, none of its tensors is changed in place,
    and its mod and what that holds stay the same; where this cannot be told, it is made anew.

    Raises:
        ValueError: the block lists do not have the rows that the lengths need, or list blocks that
            the lengths do not have.
    """
    mod = block_mask.mask_mod
    known = identity_of(full() if mod is None else mod)
    if known is None:
        return _converted(block_mask)
    lists = (
        block_mask.kv_num_blocks, block_mask.kv_indices,
        block_mask.full_kv_num_blocks, block_mask.full_kv_indices,
    )  # fmt: skip
    tensors = [x for x in (*lists, *known[1]) if x is not None]
    if any(x.is_inference() for x in tensors):  # which do not count their changes
        return _converted(block_mask)
    identity = known[0], block_mask.seq_lengths, block_mask.BLOCK_SIZE
    versions = tuple(x._version for x in tensors)
    kept = _kept.get(block_mask)
    if kept is not None and (kept.identity, kept.versions) == (identity, versions):
        if all(ref() is x for ref, x in zip(kept.tensors, tensors, strict=True)):
            return kept.mask
    mask = _converted(block_mask)
    _kept[block_mask] = _Kept(identity, tuple(weakref.ref(x) for x in tensors), versions, mask)
    return mask


def _converted(block_mask: TorchBlockMask) -> BlockMask:
    """Lists of block indices become runs, the `mask_mod` is traced. torch leaves what a block list
    says about padding beyond the true lengths open; blocks that reach there become partial."""
    q_limit, kv_limit = block_mask.seq_lengths
    bq, bk = block_mask.BLOCK_SIZE
    q_blocks, kv_blocks = -(-q_limit // bq), -(-kv_limit // bk)
    mod = block_mask.mask_mod
    mask = traced_mask(full() if mod is None else mod).frozen()
    B, H = block_mask.kv_num_blocks.shape[:2]
    rows = B * H * q_blocks
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, kv_blocks)
    if block_mask.full_kv_num_blocks is None:
        whole = np.zeros_like(partial)
    else:
        assert block_mask.full_kv_indices is not None
        whole = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, kv_blocks)
    if partial.shape[0] != rows:
        raise ValueError(
            f"block_mask lists {partial.shape[0]} rows of blocks, its lengths {q_limit} x "
            f"{kv_limit} in blocks of {bq} x {bk} need {rows}"
        )
    inside_q = np.tile(np.arange(1, q_blocks + 1) * bq <= q_limit, B * H)[:, None]
    inside_kv = (np.arange(1, kv_blocks + 1) * bk <= kv_limit)[None, :]
    ragged = whole & ~(inside_q & inside_kv)
    return BlockMask(
        mask=mask,
        B=B,
        H=H,
        block_size=(bq, bk),
        q_len=q_limit,
        kv_len=kv_limit,
        q_starts=np.arange(q_blocks, dtype=np.int64) * bq,
        kv_starts=np.arange(kv_blocks, dtype=np.int64)[None, :] * bk,
        q_limit=q_limit,
        kv_limit=kv_limit,
        full=_runs(whole & ~ragged),
        partial=_runs(partial | ragged),
    )


def _listed(counts: Tensor, indices: Tensor, kv_blocks: int) -> Array:
    """bool `[B * H * q blocks, kv blocks]` from torch's counts and padded index lists."""
    count = counts.detach().cpu().numpy().reshape(-1, 1)
    index = indices.detach().cpu().numpy().reshape(count.size, -1)
    listed = np.zeros((count.size, kv_blocks), dtype=bool)
    row, slot = np.nonzero(np.arange(index.shape[1]) < count)
    beyond = index[row, slot] >= kv_blocks
    if beyond.any():
        raise ValueError(
            f"block_mask lists K/V block {index[row, slot][beyond][0]}, but its lengths have only "
            f"{kv_blocks}"
        )
    listed[row, index[row, slot]] = True
    return listed


def _runs(listed: Array) -> Runs:
    edges = np.diff(listed.astype(np.int8), prepend=0, append=0)
    row, start = np.nonzero(edges > 0)
    _, end = np.nonzero(edges < 0)
    return Runs.from_pieces(row, start, end, listed.shape[0])
