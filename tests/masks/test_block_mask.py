"""BlockMask: exact blocks for every mask at every length, its views, its picture, its refusals."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from mask_zoo import MASKS, MaskCase
from masks.csr import assert_canonical, dense
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.builder import BlockMaskBuilder, create_block_mask
from ringflex.masks.mods import causal, chunked, document, full, sliding_window
from ringflex.masks.trace import trace_mask

B, H = 2, 2
LENGTHS = [(1, 1), (5, 5), (129, 129), (129, 1000), (1000, 300)]
BLOCK_SIZES: list[int | tuple[int, int]] = [16, 32, (32, 16), 128]
CASES = {case.name: case for case in MASKS}


def axes(case: MaskCase) -> tuple[int | None, int | None]:
    return B if case.needs_b else None, H if case.needs_h else None


@functools.cache
def elements(name: str, q_len: int, kv_len: int) -> Tensor:
    """bool `[B or 1, H or 1, q_len, kv_len]`: torch's own evaluation of the plain function."""
    case = CASES[name]
    b, h = axes(case)
    mask_mod = case.make(max(q_len, kv_len), B, H)
    return create_mask(mask_mod, b or 1, h or 1, q_len, kv_len, device="cpu")


def classes(elements: Tensor, block_size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """What every block is: 0 nothing visible, 2 all visible and no padding, 1 anything else."""
    bq, bk = block_size
    q_len, kv_len = elements.shape[2:]
    padded = torch.nn.functional.pad(elements, (0, -kv_len % bk, 0, -q_len % bq))
    blocks = padded.unflatten(3, (-1, bk)).unflatten(2, (-1, bq)).transpose(3, 4).flatten(4)
    return (blocks.any(4).to(torch.uint8) + blocks.all(4).to(torch.uint8)).numpy()


def assert_exact(block_mask: BlockMask, elements: Tensor) -> None:
    truth = classes(elements, block_mask.block_size)
    rows, columns = block_mask.q_blocks, block_mask.kv_blocks
    assert (block_mask.block_map() == truth).all()
    assert torch.equal(block_mask.to_dense(), elements)
    assert block_mask.visible_blocks == (truth > 0).sum()
    assert block_mask.density == (truth > 0).mean()
    assert (block_mask.needed() == (truth > 0).any(axis=(1, 2))).all()
    for runs, turned, state in zip(
        (block_mask.full, block_mask.partial), block_mask.transpose(), (2, 1)
    ):
        assert_canonical(runs, columns)
        assert_canonical(turned, rows)
        listed = dense(runs, columns).reshape(truth.shape)
        assert (listed == (truth == state)).all()
        assert (dense(turned, rows).reshape(listed.mT.shape) == listed.mT).all()


@pytest.mark.parametrize("q_len_kv_len", LENGTHS, ids=lambda n: f"{n[0]}x{n[1]}")
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_every_block_is_exact(case: MaskCase, q_len_kv_len: tuple[int, int]) -> None:
    q_len, kv_len = q_len_kv_len
    truth = elements(case.name, q_len, kv_len)
    mask_mod = case.make(max(q_len, kv_len), B, H)
    for block_size in BLOCK_SIZES if max(q_len, kv_len) < 500 else BLOCK_SIZES[2:]:
        built = create_block_mask(mask_mod, *axes(case), q_len, kv_len, BLOCK_SIZE=block_size)
        assert built.block_size == (
            block_size if isinstance(block_size, tuple) else (block_size, block_size)
        )
        assert truth.shape[:2] == (built.B, built.H)
        assert (built.q_len, built.kv_len) == (q_len, kv_len)
        assert_exact(built, truth)


def test_axes_exist_only_where_the_mask_uses_them() -> None:
    for mask_mod, B, H in (
        (causal(), 1, 1),
        (lambda b, h, q, k: k >= h, 1, 5),
        (lambda b, h, q, k: k >= b, 7, 1),
        (lambda b, h, q, k: k >= b + h, 7, 5),
    ):
        built = create_block_mask(mask_mod, 7, 5, 64, 64)
        assert (built.B, built.H) == (B, H)


def builder(case: MaskCase, q_len: int, kv_len: int, block_size: int) -> BlockMaskBuilder:
    b, h = axes(case)
    return BlockMaskBuilder(
        trace_mask(case.make(max(q_len, kv_len), B, H)),
        B=b,
        H=h,
        q_limit=q_len,
        kv_limit=kv_len,
        block_size=(block_size, block_size),
    )


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_rows_of_a_layout_are_the_rows_of_the_whole(case: MaskCase) -> None:
    """A rank builds its own query blocks only, wherever a layout put them, padding included."""
    block, q_len, kv_len = 16, 300, 200
    whole = create_block_mask(
        case.make(q_len, B, H), *axes(case), q_len, kv_len, BLOCK_SIZE=block
    )  # 19 x 13 blocks
    kv_blocks = 15  # two more, of padding
    some = builder(case, q_len, kv_len, block)
    truth = elements(case.name, q_len, kv_len)
    for chosen in ([*range(19)], [0, 18], [3, 4, 5, 12, 13], [17], [2, 18, 19, 22], [20, 21]):
        starts = np.array(chosen, dtype=np.int64) * block
        rows = some.build(starts, kv_blocks, q_len=len(chosen) * block, kv_len=kv_blocks * block)
        inside = [r for r in chosen if r < 19]
        map_of_rows = rows.block_map()
        assert map_of_rows.shape[2:] == (len(chosen), kv_blocks)
        assert (map_of_rows[:, :, : len(inside), :13] == whole.block_map()[:, :, inside]).all()
        assert not map_of_rows[:, :, len(inside) :].any() and not map_of_rows[..., 13:].any()
        for runs in (rows.full, rows.partial):
            assert_canonical(runs, kv_blocks)
        seen = rows.to_dense()
        tokens = (torch.from_numpy(starts)[:, None] + torch.arange(block)).reshape(-1)
        real = tokens < q_len
        assert torch.equal(seen[:, :, real, :kv_len], truth[:, :, tokens[real]])
        assert not seen[:, :, ~real].any() and not seen[..., kv_len:].any()


COLUMNS = {
    "all": [[*range(13)], [*range(13)]],
    "different": [[0, 3, 4, 12], [1, 2, 3, 5, 6, 7, 11]],
    "one_empty": [[], [0, 12]],
    "both_empty": [[], []],
    "last": [[12], [12]],
    "neighbours_become_adjacent": [[0, 2, 4, 6, 8, 10, 12], [0, 5, 10]],
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_select_kv(case: MaskCase, columns: list[list[int]]) -> None:
    """A K/V tensor that holds some blocks side by side: other ones for each batch element."""
    block, q_len, kv_len = 16, 120, 200
    mask_mod = case.make(kv_len, B, H)
    whole = create_block_mask(mask_mod, *axes(case), q_len, kv_len, BLOCK_SIZE=block)
    truth = elements(case.name, q_len, kv_len)
    held = columns[: whole.B]
    selected = whole.select_kv([np.array(c, dtype=np.int64) for c in held])
    width = max(map(len, held))
    assert selected.kv_len == width * block and selected.q_len == q_len
    assert selected.kv_blocks == width and selected.q_blocks == whole.q_blocks
    dense_selected, map_selected = selected.to_dense(), selected.block_map()
    assert dense_selected.shape == (whole.B, whole.H, q_len, width * block)
    for b, blocks in enumerate(held):
        padded = torch.nn.functional.pad(truth[b], (0, 13 * block - kv_len))
        expected = padded.unflatten(2, (13, block))[:, :, blocks].flatten(2)
        held_len = len(blocks) * block
        assert torch.equal(dense_selected[b, :, :, :held_len], expected)
        assert not dense_selected[b, :, :, held_len:].any()
        assert (map_selected[b, :, :, : len(blocks)] == whole.block_map()[b][:, :, blocks]).all()
        assert not map_selected[b, :, :, len(blocks) :].any()
    for runs in (selected.full, selected.partial):
        assert_canonical(runs, width)
    assert selected.needed().shape == (whole.B, width)
    assert str(selected)


def test_select_kv_twice() -> None:
    whole = create_block_mask(sliding_window(40, 40), None, None, 128, 128, BLOCK_SIZE=16)
    once = whole.select_kv([np.array([0, 2, 3, 5, 7])]).select_kv([np.array([1, 2, 4])])
    direct = whole.select_kv([np.array([2, 3, 7])])
    assert torch.equal(once.to_dense(), direct.to_dense())
    assert (once.kv_starts == direct.kv_starts).all()


def test_select_kv_twice_of_a_batch() -> None:
    """The second time each batch element has positions of its own."""
    mask_mod = CASES["batch_documents"].make(128, B, H)
    whole = create_block_mask(mask_mod, B, None, 128, 128, BLOCK_SIZE=16)
    once = whole.select_kv([np.array([0, 2, 3, 5]), np.array([1, 4, 6, 7])])
    twice = once.select_kv([np.array([1, 3]), np.array([0, 2])])
    direct = whole.select_kv([np.array([2, 5]), np.array([1, 6])])
    assert (twice.kv_starts == direct.kv_starts).all()
    assert torch.equal(twice.to_dense(), direct.to_dense())


def test_a_mask_read_by_elements_no_block_can_decide() -> None:
    """Visible only where all corners are not: settled by asking every element."""
    hidden = torch.zeros(64, 64, dtype=torch.bool)
    hidden[5, 7] = hidden[40, 35] = True
    one = create_block_mask(lambda b, h, q, k: hidden[q, k], None, None, 64, 64, BLOCK_SIZE=16)
    assert np.argwhere(one.block_map()[0, 0]).tolist() == [[0, 0], [2, 2]]
    rest = create_block_mask(lambda b, h, q, k: ~hidden[q, k], None, None, 64, 64, BLOCK_SIZE=16)
    assert np.argwhere(rest.block_map()[0, 0] == 1).tolist() == [[0, 0], [2, 2]]
    assert rest.full.blocks == 14


def test_picture() -> None:
    block_mask = create_block_mask(causal(), None, None, 60, 64, BLOCK_SIZE=16)
    assert block_mask.picture().split("\n") == ["▓   ", "█▓  ", "██▓ ", "▓▓▓▓"]  # a ragged last row
    assert str(block_mask) == (
        "BlockMask(causal, B=1, H=1, q_len=60, kv_len=64, block_size=(16, 16), "
        "62.5% of blocks visible: 3 full, 7 partial)\n▓   \n█▓  \n██▓ \n▓▓▓▓"
    )
    assert repr(block_mask) == str(block_mask)


def test_picture_of_a_part_and_made_smaller() -> None:
    ids = torch.stack([torch.arange(128) // 64, torch.zeros(128, dtype=torch.int64)])
    block_mask = create_block_mask(document(ids), 2, None, 128, 128, BLOCK_SIZE=16)
    assert block_mask.picture(0, columns=4).split("\n") == ["██  ", "  ██"]
    assert block_mask.picture(1, columns=4).split("\n") == ["████", "████"]
    # A character stands for four by two blocks; of eight visible ones are 7 and 3, or 4, 3 and 1.
    wide = create_block_mask(causal(), None, None, 128, 128, BLOCK_SIZE=16)
    assert wide.picture(columns=4).split("\n") == ["▓▒  ", "██▓▒"]
    narrow = create_block_mask(sliding_window(16), None, None, 128, 128, BLOCK_SIZE=16)
    assert narrow.picture(columns=4).split("\n") == ["▒▒  ", " ░▒▒"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (lambda b, h, q, k: k > b, None, None, 64, 64),
            "depends on b: pass B=the number of b",
        ),
        ((lambda b, h, q, k: k > h, 1, None, 64, 64), "depends on h: pass H=the number of q"),
        ((causal(), 0, None, 64, 64), "B must be a positive int, got 0"),
        ((causal(), None, -1, 64, 64), "H must be a positive int, got -1"),
        ((causal(), None, None, 0, 64), "Q_LEN must be a positive int, got 0"),
        ((causal(), None, None, 64, 64.0), "KV_LEN must be a positive int, got 64.0"),
        ((causal(), None, None, None, 64), "Q_LEN must be a positive int, got None"),
        ((causal(), None, None, 64, True), "KV_LEN must be a positive int, got True"),
        ((causal(), None, None, 64, 64, None, 0), "BLOCK_SIZE must be .*, got 0"),
        ((causal(), None, None, 64, 64, None, (16, -1)), "BLOCK_SIZE must be .*-1"),
        ((causal(), None, None, 64, 64, None, 16.0), r"BLOCK_SIZE must be .*16\.0"),
        ((causal(), None, None, 64, 64, None, (16, 32.0)), r"BLOCK_SIZE must be .*32\.0"),
        ((causal(), None, None, 64, 64, None, (16, "32")), "BLOCK_SIZE must be .*32"),
        ((causal(), None, None, 64, 64, None, (16,)), r"BLOCK_SIZE must be .*16"),
        ((causal(), None, None, 64, 64, None, (16, 16, 16)), "BLOCK_SIZE must be .*16"),
        ((causal(), None, None, 64, 64, None, [16, 16]), r"BLOCK_SIZE must be .*\[16, 16\]"),
    ],
)
def test_bad_sizes_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_block_mask(*arguments)


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(TypeError, match="mask_mod must be a function"):
        create_block_mask(None, None, None, 64, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="turns a tensor into a Python value") as caught:
        create_block_mask(lambda b, h, q, k: (q > k) and (h > 1), None, None, 64, 64)
    assert "`a & b` for `a and b`" in str(caught.value)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_device_is_accepted(device: Any) -> None:
    built = create_block_mask(chunked(8) | full(), 1, 1, 20, 20, device, 16)
    assert built.to_dense().all()
