"""Where steps begin and end, and that each leaves the others' queries alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import ringflex as rf
from attention_cases import DEVICE
from ringflex.kernels import eager, triton_kernel
from ringflex.kernels.block_lists import query_lists
from ringflex.kernels.contract import Gradients, KernelOptions, Partial
from ringflex.kernels.stages import ACTIVE, BEGINS, ENDS, Stage

CPU = torch.device("cpu")
ALONE = ACTIVE | BEGINS | ENDS


def turns(mask: rf.MaskMod, seq_len: int, world_size: int, rank: int) -> list[list[int] | None]:
    plan = rf.plan_all(
        mask, seq_len, world_size, layout="contiguous", strategy="ring", block_size=16
    )[rank]
    return [None if s.stage is None else s.stage.turns.reshape(-1).tolist() for s in plan.steps]


def test_a_window_ends_where_it_begins() -> None:
    """But for the first blocks, which see some of the neighbour's."""
    local, remote = turns(rf.causal() & rf.sliding_window(20), 256, 4, 1)
    assert local == [ACTIVE | BEGINS, ACTIVE | BEGINS, ALONE, ALONE]
    assert remote == [ACTIVE | ENDS, ACTIVE | ENDS, 0, 0]


def test_one_step_has_no_stage() -> None:
    assert not any(turns(rf.causal(), 256, 4, 0))
    assert turns(rf.document(torch.arange(256) // 64), 256, 4, 2) == [None]


def test_a_step_that_nobody_sees_has_none() -> None:
    mask = rf.MaskMod(lambda b, h, q, k: (k < 64) | (q // 64 == k // 64))
    local, first, second, third = turns(mask, 256, 4, 3)
    assert first is None and second is None  # of ranks 2 and 1, which only pass on
    assert local == [ACTIVE | BEGINS] * 4 and third == [ACTIVE | ENDS] * 4


def test_what_sees_nothing_ends_with_the_first_step() -> None:
    mask = rf.MaskMod(lambda b, h, q, k: (k < 16) & (q >= 96) & (q < 112) | (q == 64) & (k == 64))
    local, remote = turns(mask, 128, 2, 1)
    assert local == [ALONE, ALONE, 0, ALONE] and remote == [0, 0, ALONE, 0]


def test_a_step_has_places_for_its_own_queries_only() -> None:
    plan = rf.plan_all(
        rf.causal() & rf.sliding_window(20), 256, 4, layout="contiguous", block_size=16
    )[1]
    for step, order, work in zip(
        plan.steps, ([2, 3, 1, 0], [0, 1]), ([3, 3, 2, 1], [2, 1]), strict=True
    ):
        assert step.mask is not None
        lists = query_lists(step.mask, CPU, step.stage)
        assert lists.order.reshape(-1)[: lists.places].tolist() == order  # longest first
        assert lists.places == len(order) and lists.work.tolist() == work


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_block_begins_and_ends_once(world_size: int) -> None:
    ids = (torch.rand(2, 320, generator=torch.Generator().manual_seed(0)) < 0.02).cumsum(1)
    mask = rf.document(ids) & rf.MaskMod(lambda b, h, q, k: (q >= k) | (h == 1))
    for plan in rf.plan_all(mask, 320, world_size, B=2, H=2, layout="striped", block_size=16):
        stages = [s.stage for s in plan.steps if s.stage is not None]
        assert stages
        found = np.stack([s.turns for s in stages])
        assert ((found & BEGINS > 0).sum(0) == 1).all() and ((found & ENDS > 0).sum(0) == 1).all()
        for earlier, later in pairwise(found):
            assert not ((earlier & ENDS > 0) & (later > 0)).any()
            assert not ((later & BEGINS > 0) & (earlier > 0)).any()


@pytest.mark.parametrize("kernel", [eager, triton_kernel])
def test_a_step_touches_only_its_own_queries(kernel: object) -> None:
    """Four blocks of queries: one left alone, one that begins, one in between, one that ends."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    q, k, v, dout = (torch.randn(1, 2, 64, 16, generator=generator) for _ in range(4))
    q, k, v, dout = (x.to(DEVICE, dtype) for x in (q, k, v, dout))
    seen = rf.causal() & rf.MaskMod(lambda b, h, q_idx, kv_idx: q_idx >= 16)
    mask = rf.create_block_mask(seen, None, None, 64, 64, BLOCK_SIZE=16)
    turn = np.array([0, ACTIVE | BEGINS, ACTIVE, ACTIVE | ENDS], dtype=np.int32)
    stage = Stage(turns=turn.reshape(1, 1, 4), block_size=16)
    options = KernelOptions()
    out, lse = torch.full_like(q, 7), torch.full((1, 2, 64), 7.0, device=DEVICE)
    running = Partial(q.float() * 0, torch.full_like(lse, 0.5, dtype=torch.float64))
    running.out[:, :, 16:32] = torch.nan  # not begun: whatever was there
    running.lse[:, :, 16:32] = torch.nan
    running.out[:, :, :16] = 3
    kernel.forward(  # type: ignore[attr-defined]
        q, k, v, mask, None, 0.25, None, Partial(out, lse), options, stage, running
    )
    alone = Partial(torch.empty_like(q, dtype=torch.float32), torch.empty_like(lse))
    kernel.forward(q, k, v, mask, None, 0.25, None, alone, options)  # type: ignore[attr-defined]
    merged = torch.logaddexp(alone.lse.double(), torch.full_like(running.lse, 0.5))
    share = (alone.lse.double() - merged).exp()[..., None]
    where = [slice(16 * i, 16 * (i + 1)) for i in range(4)]
    assert (out[:, :, :48] == 7).all() and (lse[:, :, :48] == 7).all()
    assert (running.out[:, :, where[0]] == 3).all() and (running.lse[:, :, where[0]] == 0.5).all()
    close = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=2e-3, atol=1e-3)
    close(running.out[:, :, where[1]], alone.out[:, :, where[1]])
    close(running.lse[:, :, where[1]], alone.lse[:, :, where[1]])
    close(running.out[:, :, where[2]], (alone.out * share)[:, :, where[2]])
    close(running.lse[:, :, where[2]], merged[:, :, where[2]])
    close(out[:, :, where[3]], (alone.out * share)[:, :, where[3]])
    close(lse[:, :, where[3]], merged[:, :, where[3]])

    terms = kernel.row_terms(  # type: ignore[attr-defined]
        dout, alone.out, alone.lse, None, q, mask, None, 0.25, options, True
    )

    def dq_of(dq: torch.Tensor, running_q: torch.Tensor | None) -> torch.Tensor:
        kernel.backward(  # type: ignore[attr-defined]
            dout, q, k, v, terms, mask, None, 0.25,
            Gradients(
                dq=dq, dk=torch.empty_like(k), dv=torch.empty_like(v), dcaptures=[],
                stage=None if running_q is None else stage, running_q=running_q,
            ),
            options,
        )  # fmt: skip
        return dq

    plain = dq_of(torch.empty_like(q, dtype=torch.float32), None)
    running_q = torch.full_like(plain, 2.0)
    running_q[:, :, where[1]] = torch.nan
    staged = dq_of(torch.full_like(q, 7), running_q)
    assert (staged[:, :, :48] == 7).all() and (running_q[:, :, where[0]] == 2).all()
    close(running_q[:, :, where[1]], plain[:, :, where[1]])
    close(running_q[:, :, where[2]], plain[:, :, where[2]] + 2)
    close(staged[:, :, where[3]], plain[:, :, where[3]] + 2)


def test_selections_leave_as_many_queries_alone_everywhere() -> None:
    whole = ACTIVE | BEGINS | ENDS
    stage = lambda *heads: Stage(turns=np.array([heads], dtype=np.int32), block_size=16)
    assert stage([whole, 0], [0, whole]).is_selection
    assert not stage([whole, 0], [whole, whole]).is_selection  # lists would have places too many
    assert not stage([whole, 0], [0, whole]).merges and not stage([whole, 0], [0, 0]).merges
    for turn in (ACTIVE, ACTIVE | BEGINS, ACTIVE | ENDS):
        assert stage([whole, turn]).merges and not stage([whole, turn]).is_selection
