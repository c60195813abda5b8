"""torch's block masks -> ours: the same elements, the same full and partial blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from mask_zoo import MASKS, MaskCase
from masks.csr import assert_canonical
from ringflex.masks.from_torch import from_torch
from ringflex.masks.mods import causal

B, H = 2, 2


def states(block_mask: TorchBlockMask) -> np.ndarray[Any, Any]:
    """0, 1 or 2 for every block: torch's lists, read one entry after the other."""
    lists = [(block_mask.kv_num_blocks, block_mask.kv_indices, 1)]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        lists.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices, 2))
    columns = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    found = np.zeros((*block_mask.kv_num_blocks.shape, columns), dtype=np.uint8)
    for counts, indices, state in lists:
        for at in np.ndindex(*counts.shape):
            for slot in range(int(counts[at])):
                found[(*at, int(indices[at][slot]))] = state
    return found


@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_size"),
    [(128, 128, 32), (200, 129, (32, 16)), (5, 300, 128)],
)
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_conversion_keeps_elements_and_lists(
    case: MaskCase, q_len: int, kv_len: int, block_size: int | tuple[int, int]
) -> None:
    mask_mod = case.make(max(q_len, kv_len), B, H)
    b, h = B if case.needs_b else None, H if case.needs_h else None
    given = create_block_mask(mask_mod, b, h, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    converted = from_torch(given)
    assert (converted.q_len, converted.kv_len) == (q_len, kv_len)
    assert converted.block_size == given.BLOCK_SIZE
    truth = create_mask(mask_mod, b or 1, h or 1, q_len, kv_len, device="cpu")
    assert torch.equal(converted.to_dense(), truth)
    assert (converted.block_map() == states(given)).all()
    for runs in (converted.full, converted.partial):
        assert_canonical(runs, converted.kv_blocks)


def test_more_batch_elements_and_heads_than_the_mask_needs() -> None:
    converted = from_torch(create_block_mask(causal(), 2, 3, 100, 100, device="cpu"))
    assert (converted.B, converted.H) == (2, 3)
    truth = create_mask(causal(), 2, 3, 100, 100, device="cpu")
    assert torch.equal(converted.to_dense(), truth)


def test_shortened_to_fewer_tokens() -> None:
    whole = create_block_mask(causal(), None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
    converted = from_torch(whole._adjust(128, 192))
    truth = create_mask(causal(), 1, 1, 128, 192, device="cpu")
    assert torch.equal(converted.to_dense(), truth)


def lists(columns: int, *rows: list[int]) -> tuple[Tensor, Tensor]:
    """torch's counts and padded indices of one batch element and head."""
    padded = [row + [0] * (columns - len(row)) for row in rows]
    counts = torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32)
    return counts, torch.tensor([[padded]], dtype=torch.int32)


def test_lists_that_the_mask_does_not_know_of() -> None:
    """A block not listed is not seen, a full one is not masked, whatever the function says."""
    given = TorchBlockMask.from_kv_blocks(
        *lists(3, [2], [0, 1], [0, 1]),
        *lists(3, [], [2], []),
        BLOCK_SIZE=16,
        mask_mod=causal(),
        seq_lengths=(48, 48),
    )
    converted = from_torch(given)
    assert converted.block_map()[0, 0].tolist() == [[0, 0, 1], [1, 1, 2], [1, 1, 0]]
    dense = converted.to_dense()[0, 0].unflatten(1, (3, 16)).unflatten(0, (3, 16)).transpose(1, 2)
    assert not dense[0].any()  # listed, but all of it is in the future
    assert dense[1, 2].all()  # full, though in the future
    assert not dense[2, 2].any()  # not listed, though in the past
    assert dense[2, 0].all() and torch.equal(dense[1, 1], torch.ones(16, 16).tril().bool())


def test_full_blocks_that_reach_into_padding_become_partial() -> None:
    given = TorchBlockMask.from_kv_blocks(
        *lists(3, [], [], []),
        *lists(3, [0, 1, 2], [2, 1], [0]),
        BLOCK_SIZE=16,
        seq_lengths=(40, 47),
    )
    converted = from_torch(given)
    assert converted.block_map()[0, 0].tolist() == [[2, 2, 1], [0, 2, 1], [1, 0, 0]]
    assert converted.to_dense().sum() == 16 * 47 + 16 * 31 + 8 * 16


def test_only_partial_lists_and_no_mask() -> None:
    converted = from_torch(TorchBlockMask.from_kv_blocks(*lists(2, [1], [0, 1]), BLOCK_SIZE=16))
    assert converted.block_map()[0, 0].tolist() == [[0, 1], [1, 1]]
    assert converted.to_dense().sum() == 3 * 256


def test_lists_that_do_not_fit_the_lengths_are_refused() -> None:
    sliced = create_block_mask(causal(), None, None, 300, 300, device="cpu", BLOCK_SIZE=64)
    sliced = sliced[:, :, 1:3]
    sliced.mask_mod = causal()
    message = "block_mask lists 2 rows of blocks, its lengths 300 x 300 in blocks of 64 x 64 need 5"
    with pytest.raises(ValueError, match=message):
        from_torch(sliced)


def test_lists_of_blocks_beyond_the_lengths_are_refused() -> None:
    given = TorchBlockMask.from_kv_blocks(
        *lists(2, [1], [0, 1]), BLOCK_SIZE=16, seq_lengths=(32, 16)
    )
    with pytest.raises(ValueError, match="block_mask lists"):
        from_torch(given)
