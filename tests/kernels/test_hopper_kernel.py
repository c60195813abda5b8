"""Which launches the Hopper kernels make, and which they leave to the portable ones."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import ringflex as rf
from ringflex.kernels import hopper_kernel, triton_kernel, triton_setup
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile
from ringflex.kernels.stages import ACTIVE, BEGINS, ENDS, Stage
from ringflex.kernels.triton_kernel import RowTerms
from ringflex.kernels.triton_tiles import Architecture
from ringflex.masks.trace import trace_score

CPU = torch.device("cpu")
TILES = (("forward", Tile(64, 64, 4, 2)),)


class Launches:
    """What would be launched: names of kernels, and what is called with the varying arguments."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.calls: list[mock.Mock] = []

    def prepared(self, kernel: Any, *_: Any) -> Any:
        self.names.append(kernel.__name__)
        found = mock.Mock()
        found.tile = Tile(128, 128, 4, 2)
        self.calls.append(found)
        return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    hopper = Architecture("cuda", (9, 0), 232_448)
    monkeypatch.setattr(triton_setup, "architecture", lambda device: hopper)
    for module in (hopper_kernel, triton_kernel):
        monkeypatch.setattr(module, "Prepared", found.prepared)
    return found


def tensors(D: int = 64, Dv: int = 64, offset: int = 0) -> list[torch.Tensor]:
    """q, k, v, dout of 256 tokens; `offset` elements off an aligned address."""
    shapes = [(1, 2, 256, D), (1, 1, 256, D), (1, 1, 256, Dv), (1, 2, 256, Dv)]
    return [torch.zeros(torch.Size(s).numel() + 8).half()[offset:][: torch.Size(s).numel()].view(s)
            for s in shapes]  # fmt: skip


def setup_of(mask: rf.BlockMask) -> triton_setup.Setup:
    """Of four query heads and one of K/V, which take no memory."""
    q, k = (torch.zeros(1, h, 1, 128).half().expand(-1, -1, mask.q_len, -1) for h in (4, 1))
    return triton_setup.Setup.of(q, k, k, mask, KernelOptions())


@pytest.mark.parametrize(
    ("options", "offset", "kernel"),
    [
        (KernelOptions(), 0, "hopper_forward_kernel"),
        (KernelOptions(deterministic=True), 0, "hopper_forward_kernel"),
        (KernelOptions(), 1, "forward_kernel"),
        (KernelOptions(tma=False), 0, "forward_kernel"),
        (KernelOptions(tiles=TILES), 0, "forward_kernel"),
    ],
)
def test_forward(options: KernelOptions, offset: int, kernel: str, launches: Launches) -> None:
    q, k, v, _ = tensors(offset=offset)
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    after = Partial(torch.zeros_like(q), torch.zeros(1, 2, 256))
    hopper_kernel.forward(q, k, v, mask, None, 0.125, None, after, options)
    assert launches.names == [kernel]


@pytest.mark.parametrize(
    ("options", "dims", "offset", "kernels"),
    [
        (KernelOptions(), (64, 64), 0, ["hopper_backward_kernel"]),
        (KernelOptions(backward="one_pass"), (128, 64), 0, ["hopper_backward_kernel"]),
        (KernelOptions(), (192, 128), 0, ["key_kernel", "query_kernel"]),
        (KernelOptions(), (64, 64), 1, ["key_kernel", "query_kernel"]),
        (KernelOptions(deterministic=True), (64, 64), 0, ["key_kernel", "query_kernel"]),
        (KernelOptions(backward="two_pass"), (64, 64), 0, ["key_kernel", "query_kernel"]),
        (KernelOptions(tiles=TILES), (64, 64), 0, ["key_kernel", "query_kernel"]),
    ],
)
def test_backward(
    options: KernelOptions,
    dims: tuple[int, int],
    offset: int,
    kernels: list[str],
    launches: Launches,
) -> None:
    q, k, v, dout = tensors(*dims, offset=offset)
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    gradients = Gradients(
        dq=torch.zeros_like(q), dk=torch.zeros_like(k), dv=torch.zeros_like(v), dcaptures=[]
    )
    hopper_kernel.backward(dout, q, k, v, terms, mask, None, 0.125, gradients, options)
    assert launches.names == kernels
    apart = hopper_kernel.has_separate_passes(q, v, options, False)
    assert apart == (len(kernels) == 2 and not offset)


@pytest.mark.parametrize(
    ("D", "Dv", "backward"),
    [
        (24, 24, ["hopper_backward_kernel"]),
        (20, 24, ["hopper_backward_kernel"]),
        (24, 20, ["key_kernel", "query_kernel"]),  # rows of dout of 40 bytes
        (18, 24, ["key_kernel", "query_kernel"]),  # of dQ, of 72
    ],
)
def test_rows_of_gradients_that_tma_cannot_address(
    D: int, Dv: int, backward: list[str], launches: Launches
) -> None:
    """Those of the inputs, slices of wider tensors, it can."""
    q, k, v = (x[..., :d] for x, d in zip(tensors(24, 24)[:3], (D, D, Dv)))
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    out, dout = torch.zeros(1, 2, 256, Dv).half(), torch.zeros(1, 2, 256, Dv).half()
    after = Partial(out, torch.zeros(1, 2, 256))
    hopper_kernel.forward(q, k, v, mask, None, 0.125, None, after, KernelOptions())
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    gradients = Gradients(
        dq=torch.zeros(q.shape).half(), dk=torch.zeros(k.shape).half(),
        dv=torch.zeros(v.shape).half(), dcaptures=[],
    )  # fmt: skip
    hopper_kernel.backward(dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions())
    assert launches.names == ["hopper_forward_kernel", *backward]


@pytest.mark.parametrize(
    ("heads", "tokens", "beside", "backward", "apart"),
    [
        (8, 1024, False, "auto", True),  # 64 tiles of keys, for 132 multiprocessors
        (8, 2048, False, "auto", False),
        (8, 1024, True, "auto", False),  # of several steps, whose queries see little of each
        (8, 1024, False, "one_pass", False),
    ],
)
def test_few_tiles_of_keys_are_computed_apart(
    heads: int, tokens: int, beside: bool, backward: str, apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(hopper_kernel, "multiprocessors", lambda device: 132)
    x: Any = SimpleNamespace(shape=(1, heads, tokens, 128), device=torch.device("cuda", 0))
    options = KernelOptions(backward=backward)
    assert hopper_kernel.has_separate_passes(x, x, options, beside) is apart


def test_portable_steps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that the Hopper kernel cannot serve adds its dQ atomically, as the others do."""
    q, k, v, dout = tensors(offset=1)
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    gradients = Gradients(
        dq=torch.zeros_like(q), dk=torch.zeros_like(k), dv=torch.zeros_like(v), dcaptures=[],
        running_q=torch.zeros(q.shape),
    )  # fmt: skip
    given: list[Any] = []
    monkeypatch.setattr(triton_kernel, "backward", lambda *arguments: given.extend(arguments))
    hopper_kernel.backward(
        dout, q, k, v, terms._replace(factor=0.125), mask, None, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    assert given[-2] is gradients and given[-1] == KernelOptions(backward="one_pass")
    assert given[4].factor == 1 and (given[4].lse_log2 == -3).all()  # the weights that it expects


@pytest.mark.parametrize(
    ("dtype", "score", "scale", "apart", "factor"),
    [
        (torch.bfloat16, None, 0.125, False, 0.125),
        (torch.float16, None, 0.125, False, 1),
        (torch.bfloat16, rf.softcap(20.0), 0.125, False, 1),
        (torch.bfloat16, None, -0.125, False, 1),
        (torch.bfloat16, None, 0.125, True, 1),  # which the portable kernel computes
    ],
)
def test_weights_times_the_scale(
    dtype: torch.dtype,
    score: Any,
    scale: float,
    apart: bool,
    factor: float,
    launches: Launches,
) -> None:
    q, dout = (torch.zeros(1, 2, 256, 64, dtype=dtype) for _ in range(2))
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    traced = None if score is None else trace_score(score, torch.float32)
    terms = hopper_kernel.row_terms(
        dout, dout, torch.zeros(1, 2, 256), None, q, mask, traced, scale, KernelOptions(), apart
    )
    assert terms.factor == factor


@pytest.mark.parametrize(
    ("mask", "tokens", "heads"),
    [
        (rf.causal(), 65_536, 1),
        (rf.causal(), 16_384, 1),
        (rf.causal(), 1_024, 1),  # some keys are seen by many more queries than others
        (rf.causal() & rf.document_from_lengths([1000] * 65 + [536]), 65_536, 1),
        (rf.full(), 16_384, 1),  # a group's queries do not fit into the L2 cache
        (rf.full(), 4_096, 4),
        (rf.causal() & rf.sliding_window(4096), 65_536, 4),  # programs walk queries of their own
    ],
    ids=str,
)
def test_heads_of_a_group_are_apart_where_that_is_faster(
    mask: rf.MaskMod, tokens: int, heads: int
) -> None:
    block_mask = rf.create_block_mask(mask, None, None, tokens, tokens)
    setup = setup_of(block_mask)
    assert hopper_kernel._heads_of_a_tile(setup, CPU, None) == heads
    assert hopper_kernel._heads_of_a_tile(setup, CPU, 10_000) == heads
    assert hopper_kernel._heads_of_a_tile(setup, CPU, 1_000) == 2  # of 4: 2,000 tiles
    assert hopper_kernel._heads_of_a_tile(setup, CPU, 500) == 1


@pytest.mark.parametrize(
    ("mask", "tokens", "stretches"),
    [
        (rf.causal(), 16_384, 1),
        (rf.full(), 32_768, 1),
        (rf.causal(), 65_536, 3),
        (rf.full(), 131_072, 6),
        (rf.causal() & rf.sliding_window(4096), 131_072, 1),  # a tile of keys reads few queries
    ],
    ids=str,
)
def test_queries_are_parted_where_the_cache_does_not_hold_them(
    mask: rf.MaskMod, tokens: int, stretches: int
) -> None:
    block_mask = rf.create_block_mask(mask, None, None, tokens, tokens)
    setup = setup_of(block_mask)
    assert hopper_kernel._stretches(setup, CPU, True) == stretches
    assert hopper_kernel._stretches(setup, CPU, False) == 1


@pytest.mark.parametrize("stretches", [1, 2])
def test_stretches_add_into_zeros_in_fp32(
    stretches: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_kernel, "_stretches", lambda *_: stretches)
    q, k, v, dout = (x[:, :1] for x in tensors())  # one head: nothing to be apart
    mask = rf.create_block_mask(rf.full(), None, None, 256, 256)
    gradients = Gradients(
        dq=torch.empty_like(q), dk=torch.full_like(k, 7), dv=torch.full_like(v, 7), dcaptures=()
    )
    terms = RowTerms(*(torch.zeros(1, 1, 256) for _ in range(2)))
    hopper_kernel.backward(
        dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    assert gradients.dk is not None and gradients.dv is not None
    written = 0.0 if stretches > 1 else 7.0
    assert (gradients.dk == written).all() and (gradients.dv == written).all()


@pytest.mark.parametrize(
    ("mask", "tokens", "D", "Dv", "score", "turn", "ahead"),
    [
        (rf.full(), 256, 128, 128, None, 0, True),
        (rf.full(), 200, 128, 128, None, 0, False),  # the last block of keys is partial
        (rf.causal(), 256, 128, 128, None, 0, False),
        (rf.causal(), 256, 64, 64, None, 0, True),
        (rf.causal(), 256, 64, 128, None, 0, False),
        (rf.causal(), 256, 64, 64, rf.softcap(20.0), 0, False),
        (rf.full(), 256, 64, 64, None, 0, False),
        (rf.full(), 256, 256, 256, None, 0, False),
        (rf.full(), 256, 128, 128, None, ACTIVE | BEGINS, False),
        (rf.full(), 256, 128, 128, None, ACTIVE | BEGINS | ENDS, True),  # merges nothing
    ],
)
def test_forwards_that_load_ahead(
    mask: Any, tokens: int, D: int, Dv: int, score: Any, turn: int, ahead: bool,
    launches: Launches, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where it was measured to be faster, and where it fits."""
    found: list[bool] = []
    asked = hopper_kernel._ahead
    monkeypatch.setattr(
        hopper_kernel, "_ahead", lambda *x, **named: found.append(asked(*x, **named)) or found[-1]
    )
    q, k, v, _ = tensors(D, Dv)
    k, v = k[:, :, :tokens], v[:, :, :tokens]
    block_mask = rf.create_block_mask(mask, None, None, 256, tokens)
    traced = None if score is None else trace_score(score, torch.float32)
    after = Partial(q.new_empty(1, 2, 256, Dv), torch.zeros(1, 2, 256))
    stage = running = None
    if turn:
        stage = Stage(turns=np.full((1, 1, 2), turn, dtype=np.int32), block_size=128)
        running = Partial(torch.zeros(1, 2, 256, Dv), torch.zeros(1, 2, 256).double())
    hopper_kernel.forward(
        q, k, v, block_mask, traced, 0.125, None, after, KernelOptions(), stage, running
    )
    assert found == [ahead]


@pytest.mark.parametrize("apart", [False, True])
def test_the_queue_knows_the_work(
    apart: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads, full blocks: 4 FLOP per pair and element in the forward, 10 in the backward."""
    given: list[tuple[int, float]] = []
    queue = hopper_kernel.queue

    def noted(*x: Any, **how: Any) -> Any:
        given.append(x[:2])
        return queue(*x, **how)

    monkeypatch.setattr(hopper_kernel, "queue", noted)
    monkeypatch.setattr(hopper_kernel, "_heads_of_a_tile", lambda *_: 1 if apart else 2)
    q, k, v, dout = tensors()
    mask = rf.create_block_mask(rf.full(), None, None, 256, 256)
    after = Partial(torch.zeros_like(q), torch.zeros(1, 2, 256))
    hopper_kernel.forward(q, k, v, mask, None, 0.125, None, after, KernelOptions())
    gradients = Gradients(
        dq=torch.empty_like(q), dk=torch.empty_like(k), dv=torch.empty_like(v), dcaptures=()
    )
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    hopper_kernel.backward(
        dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    pairs = 2 * 256 * 256
    assert given == [(4, 4 * 64 * pairs), (4 if apart else 2, 10 * 64 * pairs)]


LINES, HALF, MORE = [1, 8, 4, 2, 128], [1, 1, 64, 64], [1, 8, 4, 2, 64]


@pytest.mark.parametrize(
    ("D", "Dv", "tokens", "score", "batch", "bshd", "dq", "dk", "dv"),
    [
        (128, 128, 256, None, 1, False, LINES, LINES, LINES),
        (128, 128, 256, None, 2, False, LINES, LINES, LINES),
        (128, 128, 256, None, 1, True, LINES, LINES, LINES),
        (128, 128, 256, None, 2, True, HALF, MORE, MORE),  # heads do not follow each other
        (96, 64, 256, None, 1, False, LINES, LINES, MORE),
        (128, 128, 252, None, 1, False, HALF, None, None),
        (128, 128, 256, rf.softcap(20.0), 1, False, HALF, MORE, MORE),
        (64, 64, 256, None, 1, False, HALF, MORE, MORE),
        (64, 128, 256, None, 1, False, [1, 1, 32, 64], None, None),  # leaves too little room
        (64, 64, 256, rf.softcap(20.0), 1, False, [1, 1, 32, 64], None, None),
    ],
)
def test_what_is_added_at_once(
    D: int, Dv: int, tokens: int, score: Any, batch: int, bshd: bool,
    dq: list[int], dk: list[int] | None, dv: list[int] | None,
    launches: Launches, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A whole tile of dQ where groups of consumers take turns, half elsewhere; tiles of dK and dV
    where heads are apart, or None: by atomics."""
    monkeypatch.setattr(hopper_kernel, "_heads_of_a_tile", lambda *_: 1)

    def zeros(heads: int, dim: int) -> torch.Tensor:
        shape = (batch, tokens, heads, dim) if bshd else (batch, heads, tokens, dim)
        x = torch.zeros(shape, dtype=torch.bfloat16)
        return x.transpose(1, 2) if bshd else x

    q, k, v, dout = zeros(2, D), zeros(1, D), zeros(1, Dv), zeros(2, Dv)
    mask = rf.create_block_mask(rf.causal(), None, None, tokens, tokens)
    terms = RowTerms(*(torch.zeros(batch, 2, 256) for _ in range(2)))
    gradients = Gradients(
        dq=torch.zeros_like(q), dk=zeros(1, D), dv=zeros(1, Dv), dcaptures=[]
    )  # fmt: skip
    traced = None if score is None else trace_score(score, torch.float32)
    hopper_kernel.backward(
        dout, q, k, v, terms, mask, traced, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    given = launches.calls[-1].call_args.args[6:9]
    assert [getattr(x, "block_shape", None) for x in given] == [dq, dk, dv]


@pytest.mark.parametrize("offset", [0, 1])
def test_what_tma_cannot_address_is_added_by_atomics(
    offset: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_kernel, "_heads_of_a_tile", lambda *_: 1)
    q, k, v, dout = tensors(128, 128)
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    dk = torch.zeros(k.numel() + 1)[offset:][: k.numel()].view(k.shape)
    gradients = Gradients(dq=torch.zeros_like(q), dk=dk, dv=v.float(), dcaptures=[])
    hopper_kernel.backward(
        dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    given = launches.calls[-1].call_args.args[7:9]
    assert [hasattr(x, "block_shape") for x in given] == [not offset] * 2


@pytest.mark.parametrize("cache", [0, 50 << 20])
def test_heads_apart_add_into_zeros_in_fp32(
    cache: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_kernel, "l2_cache", lambda _: cache)
    q, k, v, dout = tensors()
    mask = rf.create_block_mask(rf.causal(), None, None, 256, 256)
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    gradients = Gradients(
        dq=torch.empty_like(q), dk=torch.full_like(k, 7), dv=torch.full_like(v, 7), dcaptures=()
    )
    hopper_kernel.backward(
        dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions()
    )  # fmt: skip
    assert gradients.dk is not None and gradients.dv is not None
    written = 0.0 if cache == 0 else 7.0
    assert (gradients.dk == written).all() and (gradients.dv == written).all()


@pytest.mark.parametrize("heads", [(1, 2), (1, 1)])
def test_launches_beside_transfers_and_alone_are_two(
    heads: tuple[int, int], launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads apart beside transfers: that one adds to dK and dV, which the other writes, in fp32
    both. Heads apart in both: only the one alone may have rows in pieces."""
    beside_heads, alone_heads = heads
    monkeypatch.setattr(
        hopper_kernel, "_heads_of_a_tile", lambda *x: beside_heads if x[2] else alone_heads
    )
    q, k, v, dout = tensors()
    mask = rf.create_block_mask(rf.full(), None, None, 256, 256)
    terms = RowTerms(*(torch.zeros(1, 2, 256) for _ in range(2)))
    for beside in (False, True, False, True):
        gradients = Gradients(
            dq=torch.empty_like(q), dk=torch.empty(k.shape), dv=torch.empty(v.shape), dcaptures=(),
            beside=beside,
        )  # fmt: skip
        hopper_kernel.backward(
            dout, q, k, v, terms, mask, None, 0.125, gradients, KernelOptions()
        )  # fmt: skip
    assert launches.names == ["hopper_backward_kernel"] * 2
