"""torch's block masks -> ours: the same elements, the same full and partial blocks."""

from __future__ import annotations

import gc
import weakref
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


class Odd:
    """What a mod cannot be known again by."""

    def __init__(self, distance: int) -> None:
        self.distance = distance


def documents(ids: Tensor) -> TorchBlockMask:
    mod = lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv)
    return create_block_mask(mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)


def test_a_mask_is_converted_once() -> None:
    given = documents(torch.arange(64) // 20)
    assert from_torch(given) is from_torch(given)
    assert from_torch(documents(torch.arange(64) // 20)) is not from_torch(given)


@pytest.mark.parametrize("what", ["captured", "list", "list in place", "lengths", "mod"])
def test_what_changes_is_converted_anew(what: str) -> None:
    ids = torch.arange(64) // 20
    given = documents(ids)
    before = from_torch(given)
    if what == "captured":
        ids.copy_(torch.arange(64) // 21)
    elif what == "list":
        given.kv_num_blocks = given.kv_num_blocks.clone()
    elif what == "list in place":
        given.kv_num_blocks.sub_(1)
    elif what == "lengths":
        given.seq_lengths = (63, 64)
    else:
        given.mask_mod = causal()
    after = from_torch(given)
    assert after is not before and from_torch(given) is after
    unlike = after.block_map().shape != before.block_map().shape
    unlike = unlike or not torch.equal(after.to_dense(), before.to_dense())
    assert unlike or what in ("list", "lengths")


def test_numbers_that_a_mod_holds_may_change() -> None:
    reach = 3
    mod = lambda b, h, q, kv: (q - kv).abs() < reach
    given = create_block_mask(mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    before = from_torch(given)
    reach = 2
    assert (from_torch(given).to_dense() != before.to_dense()).any()


@pytest.mark.parametrize("what", ["object", "inference"])
def test_what_may_change_without_a_sign_is_converted_at_every_call(what: str) -> None:
    odd = Odd(3)
    mod = lambda b, h, q, kv: (q - kv).abs() < odd.distance
    given = create_block_mask(mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    change = lambda: setattr(odd, "distance", 2)
    if what == "inference":
        with torch.inference_mode():
            ids = torch.arange(64) // 20
        given = documents(ids)
        change = lambda: ids.data.add_(torch.arange(64) // 32)
    before = from_torch(given).to_dense()
    change()
    assert (from_torch(given).to_dense() != before).any()


def test_a_conversion_goes_with_its_mask() -> None:
    given = documents(torch.arange(64) // 20)
    converted = weakref.ref(from_torch(given))
    del given
    gc.collect()
    assert converted() is None
