"""Blocks into messages and back, by torch and by Triton."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

from attention_cases import DEVICE
from ringflex.parallel import packing
from ringflex.parallel.packing import Pair, add, new_message, pack, unpack
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


def transfer(name: str, peer: int = 1) -> Transfer:
    return Transfer(peer, tuple(np.array(blocks, dtype=np.int64) for blocks in CHOSEN[name]))


def pair(dtype: torch.dtype = torch.float32, B: int = 3, blocks: int = 5) -> Pair:
    """Tokens before heads in memory, as many models have them."""
    make = lambda D: torch.randn(B, blocks * BLOCK, 2, D, device=DEVICE).to(dtype).transpose(1, 2)
    return Pair(make(24), make(7))


def places(name: str, pair: Pair) -> list[tuple[torch.Tensor, list[int]]]:
    """Each tensor's blocks by batch element group, and which of them are chosen."""
    return [
        (part, chosen)
        for x in pair
        for part, chosen in zip(
            x.unflatten(2, (-1, BLOCK)).chunk(len(CHOSEN[name])), CHOSEN[name], strict=True
        )
    ]


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_message_holds_the_blocks(by: None, name: str, dtype: torch.dtype) -> None:
    source = pair()
    message = new_message(transfer(name), source, BLOCK, dtype)
    pack(transfer(name), source, message, BLOCK)
    wanted = [part[:, :, chosen].reshape(-1) for part, chosen in places(name, source)]
    assert torch.equal(message, torch.cat(wanted).to(dtype))


@pytest.mark.parametrize("name", CHOSEN)
def test_messages_are_added(by: None, name: str) -> None:
    source, target = pair(), pair()
    expected = Pair(*(x.clone() for x in target))
    message = new_message(transfer(name), source, BLOCK, torch.float16)
    pack(transfer(name), source, message, BLOCK)
    add(transfer(name), message, target, BLOCK)
    for (part, chosen), (given, _) in zip(
        places(name, expected), places(name, source), strict=True
    ):
        part[:, :, chosen] += given[:, :, chosen].half().float()
    for x, y in zip(target, expected, strict=True):
        assert torch.equal(x, y)


def test_messages_of_several_peers_make_a_buffer(by: None) -> None:
    """Blocks that none of them brings are zero."""
    source = pair()
    transfers = [transfer("scattered"), Transfer(2, (np.array([4]),))]
    messages = [new_message(t, source, BLOCK) for t in transfers]
    for t, message in zip(transfers, messages, strict=True):
        pack(t, source, message, BLOCK)
    buffer = unpack(transfers, messages, source, 5, BLOCK)
    for x, original in zip(buffer, source, strict=True):
        expected = original.unflatten(2, (-1, BLOCK)).clone()
        expected[:, :, 1] = 0
        assert torch.equal(x, expected.flatten(2, 3))


def test_one_message_is_the_buffer() -> None:
    source = pair()
    message = new_message(transfer("scattered"), source, BLOCK)
    pack(transfer("scattered"), source, message, BLOCK)
    buffer = unpack([transfer("scattered")], [message], source, 3, BLOCK)
    assert buffer.k.data_ptr() == message.data_ptr()
    blocks = buffer.k.unflatten(2, (-1, BLOCK))
    assert torch.equal(blocks, source.k.unflatten(2, (-1, BLOCK))[:, :, [0, 2, 3]])
