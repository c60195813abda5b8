"""What a traced mask keeps of the tensors that it captures, and how they count in its digest."""

import pytest
import torch

import ringflex as rf
from ringflex.masks.trace import trace_mask


@pytest.mark.parametrize(
    ("largest", "kept"), [(100, torch.int16), (1 << 20, torch.int32), (1 << 40, torch.int64)]
)
def test_looked_up_integers_are_kept_in_few_bits_and_mean_the_same(largest, kept) -> None:
    ids = torch.arange(200) * (largest // 200)
    ids[-1] = largest

    def mask(b, h, q_idx, kv_idx):  # would overflow in 16 or 32 bits
        return ids[q_idx] * 100_000 - ids[kv_idx] * 99_999 > largest * 1000

    traced = trace_mask(mask)
    frozen = traced.frozen()
    assert [c.dtype for c in frozen.captures] == [kept]
    b = h = torch.zeros(1, 1, dtype=torch.int64)
    q_idx, kv_idx = torch.arange(200)[:, None], torch.arange(200)[None]
    expected = traced.evaluate(b, h, q_idx, kv_idx)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(frozen.evaluate(b, h, q_idx, kv_idx), expected)
    block_mask = rf.create_block_mask(mask, None, None, 200, 200, BLOCK_SIZE=16)
    assert torch.equal(block_mask.to_dense()[0, 0], expected)


def test_integers_that_are_calculated_with_are_kept_as_they_are() -> None:
    ids = torch.arange(200)
    offset = torch.tensor(3)
    frozen = trace_mask(lambda b, h, q_idx, kv_idx: (ids + offset)[q_idx] > ids[kv_idx]).frozen()
    assert {c.dtype for c in frozen.captures} == {torch.int64}


def test_every_captured_value_counts_in_a_digest() -> None:
    ids = torch.zeros(1 << 17, dtype=torch.int64)

    def digest() -> bytes:
        return trace_mask(lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]).digest()

    seen = {digest()}
    for place in (0, 1, (1 << 14) - 1, 1 << 14, 100_000, ids.numel() - 1):
        ids[place] += 1
        seen.add(digest())
    ids[[5, 6]] = torch.tensor([2, 1])  # the same numbers in another order
    seen.add(digest())
    ids[[5, 6]] = torch.tensor([1, 2])
    seen.add(digest())
    assert len(seen) == 9
    assert digest() in seen
