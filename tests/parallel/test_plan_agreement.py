"""Bad input to plan(): an error on every rank and no hang, also if only one rank is given it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringflex as rf
from parallel.mistakes import (
    DOCUMENTS,
    OFFENDER,
    OTHER_DOCUMENTS,
    SECONDS,
    Mistake,
    S,
    W,
    check_disagreement,
    check_refusal,
    good_plan_arguments,
)
from rank_pool import RankPool

EIGHT = torch.arange(8)


def branching(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx <= q_idx if q_idx > 10 else kv_idx == 0


def indices(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx


def head_dependent(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx <= h


def layout_for(seq_len: int, world_size: int, block_size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"layout": rf.make_layout("zigzag", seq_len, world_size, block_size)}


def shifted_layout() -> rf.Layout:
    """Of the same name as another, with other owners."""
    layout = rf.make_layout("contiguous", S, W, 16)
    return rf.Layout(
        name="contiguous", seq_len=S, world_size=W, block_size=16, owner=(layout.owner + 1) % W
    )


def layout_of(owner: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "layout": rf.Layout(name="own", seq_len=S, world_size=W, block_size=16, owner=owner)
    }


PLAN_REFUSALS = {
    "no tokens": Mistake(
        change=lambda: {"seq_len": 0}, text="seq_len must be a positive int, got 0"
    ),
    "float tokens": Mistake(
        change=lambda: {"seq_len": 100.0}, text="seq_len must be a positive int, got 100.0"
    ),
    "tensor tokens": Mistake(
        change=lambda: {"seq_len": torch.tensor(100)},
        text="seq_len must be a positive int, got tensor(100)",
    ),
    "no block": Mistake(
        change=lambda: {"block_size": 0}, text="block_size must be a positive int, got 0"
    ),
    "block pair": Mistake(
        change=lambda: {"block_size": (16, 16)},
        text="block_size must be a positive int, got (16, 16)",
    ),
    "no batch": Mistake(change=lambda: {"B": 0}, text="B must be a positive int, got 0"),
    "negative heads": Mistake(change=lambda: {"H": -1}, text="H must be a positive int, got -1"),
    "unknown layout": Mistake(
        change=lambda: {"layout": "spiral"}, text="layout='spiral' is not one of auto, contiguous"
    ),
    "layout of another type": Mistake(
        change=lambda: {"layout": 3}, text="layout=3 is not one of auto, contiguous"
    ),
    "layout for another length": Mistake(
        change=layout_for(S + 1, W, 16),
        text="the layout is for (seq_len, world_size, block_size) = (101, 3, 16), this plan for "
        "(100, 3, 16)",
    ),
    "layout for another group": Mistake(
        change=layout_for(S, W + 1, 16),
        text="the layout is for (seq_len, world_size, block_size) = (100, 4, 16)",
    ),
    "layout for other blocks": Mistake(
        change=layout_for(S, W, 32),
        text="the layout is for (seq_len, world_size, block_size) = (100, 3, 32)",
    ),
    "layout of too few blocks": Mistake(
        change=layout_of(np.arange(W)),
        text="owner names 3 blocks of 16 tokens, too few for 100 tokens",
    ),
    "layout of unlike shares": Mistake(
        change=layout_of(np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])),
        text="every rank below 3 must own as many blocks; by rank they own {0: 4, 1: 3, 2: 2}",
    ),
    "layout of a rank that is not there": Mistake(
        change=layout_of(np.arange(12) % 4),
        text="every rank below 3 must own as many blocks",
    ),
    "layout of a list": Mistake(
        change=layout_of([0, 1, 2] * 3),
        error=TypeError,
        text="owner must be an int64 array [blocks], got [0, 1, 2,",
    ),
    "mask that reads beyond a table within": Mistake(
        change=lambda: {"mask_mod": lambda b, h, q, k: EIGHT[q * (99 - q) // 200] > 3},
        text="reads beyond a captured tensor of shape (8,)",
    ),
    "unknown strategy": Mistake(
        change=lambda: {"strategy": "fastest"},
        text="strategy='fastest' is not one of auto, ring, direct, all_gather, hierarchical",
    ),
    "no masks": Mistake(change=lambda: {"mask_mod": {}}, text="empty dict of masks"),
    "no mask": Mistake(
        change=lambda: {"mask_mod": 3},
        error=TypeError,
        text="mask_mod must be a function mask_mod(b, h, q_idx, kv_idx), got int: 3",
    ),
    "block mask for mask": Mistake(
        change=lambda: {"mask_mod": rf.create_block_mask(rf.causal(), None, None, S, S)},
        error=TypeError,
        text="mask_mod must be a function mask_mod(b, h, q_idx, kv_idx), got BlockMask",
    ),
    "score mod for mask": Mistake(
        change=lambda: {"mask_mod": rf.softcap(3.0)},
        error=TypeError,
        text="mask_mod 'softcap_score' must be callable as mask_mod(b, h, q_idx, kv_idx)",
    ),
    "mask of numbers": Mistake(
        change=lambda: {"mask_mod": indices},
        error=TypeError,
        text="mask_mod 'indices' must return a boolean tensor",
    ),
    "mask of Python": Mistake(
        change=lambda: {"mask_mod": lambda b, h, q_idx, kv_idx: True},
        error=TypeError,
        text="mask_mod '<lambda>' must return a boolean tensor",
    ),
    "mask that branches": Mistake(
        change=lambda: {"mask_mod": branching},
        text="mask_mod 'branching' turns a tensor into a Python value",
    ),
    "mask of b without B": Mistake(
        change=lambda: {"mask_mod": rf.document(torch.zeros(2, S, dtype=torch.int64)), "B": None},
        text="mask 'document(2x100)' depends on b: pass B=the number of batch elements",
    ),
    "mask of h without H": Mistake(
        change=lambda: {"mask_mod": head_dependent, "H": None},
        text="mask 'head_dependent' depends on h: pass H=the number of query heads",
    ),
    "one mask of several": Mistake(
        change=lambda: {"mask_mod": {"local": rf.causal(), "global": branching}},
        text="mask_mod 'branching' turns a tensor into a Python value",
    ),
}

# Right in themselves; the other ranks pass something else.
PLAN_DISAGREEMENTS = {
    "seq_len": Mistake(change=lambda: {"seq_len": S - 1}),
    "mask": Mistake(change=lambda: {"mask_mod": rf.causal()}),
    "mask of the same name": Mistake(
        change=lambda: {"mask_mod": rf.MaskMod(rf.causal(), "document(100)")}
    ),
    "captured values": Mistake(change=lambda: {"mask_mod": rf.document(OTHER_DOCUMENTS)}),
    "captured dtype": Mistake(change=lambda: {"mask_mod": rf.document(DOCUMENTS.int())}),
    "captured shape": Mistake(
        change=lambda: {"mask_mod": rf.document(torch.cat([DOCUMENTS, DOCUMENTS]))}
    ),
    "layout": Mistake(change=lambda: {"layout": "striped"}),
    "layout's owners": Mistake(change=lambda: {"layout": shifted_layout()}),
    "strategy": Mistake(change=lambda: {"strategy": "direct"}),
    "block_size": Mistake(change=lambda: {"block_size": 32}),
    "B": Mistake(change=lambda: {"B": 5}),
    "H": Mistake(change=lambda: {"H": None}),
    "number of masks": Mistake(
        change=lambda: {"mask_mod": {"local": rf.document(DOCUMENTS), "global": rf.causal()}}
    ),
    "name of the mask": Mistake(change=lambda: {"mask_mod": {"local": rf.document(DOCUMENTS)}}),
}


def plan_on_rank(group: dist.ProcessGroup, mistakes: str, name: str, ranks: list[int]) -> None:
    arguments = good_plan_arguments()
    if dist.get_rank(group) in ranks:
        arguments |= globals()[mistakes][name].change()
    rf.plan(group=group, **arguments)


@pytest.mark.parametrize("ranks", [[0, 1, 2], [OFFENDER]], ids=["all", "one"])
@pytest.mark.parametrize("name", PLAN_REFUSALS)
def test_plan_refuses(pool: RankPool, name: str, ranks: list[int]) -> None:
    errors = pool.errors(plan_on_rank, W, "PLAN_REFUSALS", name, ranks, timeout=SECONDS)
    check_refusal(errors, PLAN_REFUSALS[name], ranks)


@pytest.mark.parametrize("name", PLAN_DISAGREEMENTS)
def test_plans_disagree(pool: RankPool, name: str) -> None:
    check_disagreement(
        pool.errors(plan_on_rank, W, "PLAN_DISAGREEMENTS", name, [OFFENDER], timeout=SECONDS)
    )


TOO_SHORT: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "document(60)": lambda: rf.document(DOCUMENTS[:60]),
    "document(61)": lambda: rf.document(torch.zeros(61, dtype=torch.int64)),  # one document
    "document(2x62)": lambda: rf.document(torch.zeros(2, 62, dtype=torch.int64)),
    "document(1x100)": lambda: rf.document(DOCUMENTS[None]),  # B = 2
    "prefix_lm([1])": lambda: rf.prefix_lm(torch.tensor([7])),
}


def too_short_on_rank(group: dist.ProcessGroup, name: str) -> None:
    rf.plan(TOO_SHORT[name](), S, group, B=2, block_size=16)


@pytest.mark.parametrize("name", TOO_SHORT)
def test_captured_tensors_that_are_too_short(pool: RankPool, name: str) -> None:
    """Each is read out of bounds somewhere, also where no block is left undecided."""
    for error in pool.errors(too_short_on_rank, W, name, timeout=SECONDS):
        assert type(error) is ValueError, error
        assert name in str(error)


def test_plan_all_refuses_like_plan() -> None:
    for name, mistake in PLAN_REFUSALS.items():
        if name in ("no masks", "one mask of several"):  # plan_all takes one mask
            continue
        arguments = good_plan_arguments() | mistake.change()
        with pytest.raises(mistake.error) as caught:
            rf.plan_all(world_size=W, **arguments)
        assert mistake.text in str(caught.value), name
    with pytest.raises(ValueError, match="world_size must be a positive int, got 0"):
        rf.plan_all(rf.causal(), S, 0)


def wrong_group_on_rank(group: dist.ProcessGroup, wrong: object) -> None:
    rf.plan(rf.causal(), S, wrong)


def test_what_is_no_group(pool: RankPool) -> None:
    for error in pool.errors(wrong_group_on_rank, W, "world", timeout=SECONDS):
        assert type(error) is TypeError
        assert "group must be a ProcessGroup or a 1-D DeviceMesh, got str" in str(error)
