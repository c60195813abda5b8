"""Chunks of the eager kernel: every visible block once, nothing else, no conflicts in a chunk."""

from collections import Counter

import pytest
import torch

import ringflex as rf
from ringflex.kernels.tiles import Chunk, chunks_of

BLOCK = 16
S = 300
IDS = torch.sort(torch.randint(0, 9, (2, S), generator=torch.Generator().manual_seed(1)))[0]
PER_HEAD = torch.tensor([3, 40, 300, 7])
MASKS = {
    "causal": rf.causal(),
    "window": rf.causal() & rf.sliding_window(50),
    "documents": rf.causal() & rf.document(IDS),
    "per head": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < PER_HEAD[h],
    "nothing": rf.causal() & ~rf.causal(),
}


def block_mask(name: str, seq_len: int = S) -> rf.BlockMask:
    return rf.create_block_mask(MASKS[name], 2, 4, seq_len, seq_len, BLOCK_SIZE=BLOCK)


def visits(chunk: Chunk) -> list[tuple[int, ...]]:
    """(batch element, head or -1, query block, K/V block) of everything that a chunk computes."""
    counts = chunk.counts.tolist() if chunk.counts is not None else [None] * len(chunk.row)
    heads = chunk.head.tolist() if chunk.head is not None else [-1] * len(chunk.row)
    rows = zip(chunk.b.tolist(), heads, chunk.row.tolist(), strict=True)
    return [
        (*row, block)
        for row, blocks, count in zip(rows, chunk.blocks.tolist(), counts, strict=True)
        for block in blocks[:count]
    ]


@pytest.mark.parametrize("elements", [1, 4 * BLOCK**2, 40 * BLOCK**2, 1 << 22])
@pytest.mark.parametrize("name", MASKS)
def test_chunks_visit_every_visible_block_once(name: str, elements: int) -> None:
    mask = block_mask(name)
    chunks = chunks_of(mask, 2, 4, elements=elements, device=torch.device("cpu"))
    blocks = torch.from_numpy(mask.block_map()).expand(2, -1, -1, -1)
    for partial, state in ((False, 2), (True, 1)):
        seen = Counter(v for chunk in chunks if chunk.partial is partial for v in visits(chunk))
        expected = {
            (b, h if mask.H > 1 else -1, row, block)
            for b, h, row, block in (blocks == state).nonzero().tolist()
        }
        assert set(seen) == expected
        assert set(seen.values()) <= {1}


@pytest.mark.parametrize("name", MASKS)
def test_chunks_are_bounded_and_free_of_conflicts(name: str) -> None:
    mask, elements = block_mask(name), 40 * BLOCK**2
    inner = 4 if mask.H == 1 else 1
    for chunk in chunks_of(mask, 2, 4, elements=elements, device=torch.device("cpu")):
        assert chunk.blocks.numel() * inner * BLOCK**2 <= elements
        heads = chunk.head if chunk.head is not None else torch.zeros_like(chunk.b)
        written = torch.stack([chunk.b, heads, chunk.row])
        assert written.unique(dim=1).shape[1] == written.shape[1]


def test_padding_within_chunks_is_small() -> None:
    """Rows of unequal length share a chunk only if they are nearly equal."""
    mask = rf.create_block_mask(rf.causal(), None, None, 4096, 4096, BLOCK_SIZE=32)
    chunks = chunks_of(mask, 1, 1, elements=1 << 20, device=torch.device("cpu"))
    computed = sum(chunk.blocks.numel() for chunk in chunks)
    assert computed <= 1.1 * mask.visible_blocks


def test_a_window_costs_linear_work_in_few_operations() -> None:
    def cost(seq_len: int) -> tuple[int, int]:
        mask = rf.create_block_mask(MASKS["window"], None, None, seq_len, seq_len, BLOCK_SIZE=BLOCK)
        chunks = chunks_of(mask, 1, 4, elements=1 << 20, device=torch.device("cpu"))
        return sum(chunk.blocks.numel() for chunk in chunks), len(chunks)

    (blocks, _), (more_blocks, chunks) = cost(4096), cost(16384)
    assert more_blocks == pytest.approx(4 * blocks, rel=0.05)
    assert chunks < more_blocks / 50
