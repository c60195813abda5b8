"""Blocks into messages and back, by torch and by Triton."""

from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest
import torch

from attention_cases import DEVICE
from ringflex.parallel import packing
from ringflex.parallel.packing import Messages, Pair
from ringflex.parallel.steps import Transfer

BLOCK = 16
CHOSEN = {
    "all": ([0, 1, 2, 3, 4],),
    "a stretch": ([1, 2, 3],),
    "scattered": ([0, 2, 3],),
    "by batch element": ([0, 4], [2], []),
    "none": ([],),
}


@pytest.fixture(params=["torch", "triton"])
def by(request: pytest.FixtureRequest) -> Iterator[None]:
    with mock.patch.object(packing, "_in_triton", return_value=request.param == "triton"):
        yield


def transfer(*blocks: Sequence[int], peer: int = 1, of: int = 0) -> Transfer:
    return Transfer(peer, tuple(np.array(chosen, dtype=np.int64) for chosen in blocks), of)


def pair(dtype: torch.dtype = torch.float32, B: int = 3, blocks: int = 5) -> Pair:
    """Tokens before heads in memory, as many models have them."""
    make = lambda D: torch.randn(B, blocks * BLOCK, 2, D, device=DEVICE).to(dtype).transpose(1, 2)
    return Pair(make(24), make(7))


def blocks_of(x: torch.Tensor, groups: int) -> Sequence[torch.Tensor]:
    return x.unflatten(2, (-1, BLOCK)).chunk(groups)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_messages_hold_the_blocks(by: None, name: str, dtype: torch.dtype) -> None:
    source, other = pair(), pair(blocks=4)
    groups = len(CHOSEN[name])
    moved = [transfer(*CHOSEN[name]), transfer(*[[3]] * groups, peer=2, of=1)]
    messages = Messages(moved, source, BLOCK, dtype)
    messages.pack({0: source, 1: other})
    for t, (peer, message), x in zip(moved, messages.to_peers, (source, other), strict=True):
        wanted = [
            part[:, :, chosen].reshape(-1)
            for y in x
            for part, chosen in zip(blocks_of(y, groups), t.blocks, strict=True)
        ]
        assert peer == t.peer
        assert torch.equal(message, torch.cat(wanted).to(dtype))


def sum_of(
    target: Pair, moved: Sequence[Transfer], source: Pair, of: int, dtype: torch.dtype
) -> Pair:
    """`target` and the source's blocks, transfer by transfer."""
    total = Pair(*(x.clone() for x in target))
    for t in (t for t in moved if t.of == of):
        for x, given in zip(total, source, strict=True):
            parts = zip(blocks_of(x, len(t.blocks)), blocks_of(given, len(t.blocks)), strict=True)
            for (part, addend), chosen in zip(parts, t.blocks, strict=True):
                part[:, :, chosen] += addend[:, :, chosen].to(dtype).float()
    return total


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_messages_are_added(by: None, name: str, dtype: torch.dtype) -> None:
    """Those of two peers at the same blocks, and those of another step elsewhere."""
    source, groups = pair(), len(CHOSEN[name])
    moved = [
        transfer(*CHOSEN[name]),
        transfer(*[[3]] * groups, peer=2),
        transfer(*[[0, 3]] * groups, peer=2, of=2),
    ]
    messages = Messages(moved, source, BLOCK, dtype)
    messages.pack({0: source, 2: source})
    targets = {0: pair(), 2: pair()}
    expected = {of: sum_of(x, moved, source, of, dtype) for of, x in targets.items()}
    messages.add_to(targets)
    for of, total in expected.items():
        for x, y in zip(targets[of], total, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", CHOSEN)
def test_messages_are_added_and_rounded_at_once(by: None, name: str) -> None:
    source, target = pair(), pair()
    moved = [transfer(*CHOSEN[name]), transfer(*[[3]] * len(CHOSEN[name]), peer=2)]
    messages = Messages(moved, source, BLOCK)
    messages.pack({0: source})
    total = sum_of(target, moved, source, 0, torch.float32)
    for x, y in zip(messages.added_to(target, torch.float16), total, strict=True):
        assert torch.equal(x, y.half())


def test_no_messages_are_added(by: None) -> None:
    target = pair()
    for x, y in zip(Messages([], target, BLOCK).added_to(target, torch.float16), target):
        assert torch.equal(x, y.half())


def test_messages_of_several_peers_make_a_buffer(by: None) -> None:
    """Blocks that none of them brings are zero."""
    source = pair()
    moved = [transfer(CHOSEN["scattered"][0]), transfer([4], peer=2)]
    messages = Messages(moved, source, BLOCK)
    messages.pack({0: source})
    for x, original in zip(messages.unpack(source, 5), source, strict=True):
        expected = original.unflatten(2, (-1, BLOCK)).clone()
        expected[:, :, 1] = 0
        assert torch.equal(x, expected.flatten(2, 3))


def test_one_message_is_the_buffer() -> None:
    source = pair()
    messages = Messages([transfer([0, 2, 3])], source, BLOCK)
    messages.pack({0: source})
    buffer = messages.unpack(source, 3)
    assert buffer.k.data_ptr() == messages.parts[0].data_ptr()
    blocks = buffer.k.unflatten(2, (-1, BLOCK))
    assert torch.equal(blocks, source.k.unflatten(2, (-1, BLOCK))[:, :, [0, 2, 3]])
