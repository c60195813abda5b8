"""The same masks over the same values are planned once."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringflex as rf
from parallel.test_planner import fingerprint
from rank_pool import RankPool
from ringflex.parallel import recent
from ringflex.parallel.draft import Draft

S, W = 700, 3


def documents(length: int) -> Callable[..., Tensor]:
    return rf.causal() & rf.document(torch.arange(S) // length)


def plan_of(group: dist.ProcessGroup, mask: Any, **options: Any) -> tuple[Any, int]:
    """And how often rows were built for it."""
    built = 0
    original = Draft._build

    def counted(*arguments: Any) -> Any:
        nonlocal built
        built += 1
        return original(*arguments)

    with patch.object(Draft, "_build", counted):
        return rf.plan(mask, S, group, block_size=16, **options), built


def twice_on_rank(group: dist.ProcessGroup, layout: str) -> None:
    first, built = plan_of(group, documents(90), layout=layout)
    assert built
    second, built = plan_of(group, documents(90), layout=layout)  # another tensor, the same values
    assert built == 0
    assert second.steps is first.steps and fingerprint(second) == fingerprint(first)
    assert second.comm is not None
    x = torch.randn(1, 2, S, 8, generator=torch.Generator().manual_seed(0))
    local = second.shard(x, 2)
    out = second.unshard(rf.flex_attention(local, local, local, block_mask=second), 2)
    mask = rf.create_block_mask(documents(90), None, None, S, S)
    torch.testing.assert_close(out, rf.flex_attention(x, x, x, block_mask=mask))
    others = [
        plan_of(group, documents(91), layout=layout),
        plan_of(group, documents(90) & rf.sliding_window(50), layout=layout),
        plan_of(group, documents(90), layout=layout, strategy="all_gather"),
        plan_of(group, {"": documents(90), "more": rf.causal()}, layout=layout),
    ]
    assert all(built for _, built in others)
    plans, built = plan_of(group, {"": documents(90), "more": rf.causal()}, layout=layout)
    assert built == 0 and fingerprint(plans["more"]) == fingerprint(others[3][0]["more"])
    assert plan_of(group, documents(90), layout=layout)[1]  # the oldest of five is forgotten


@pytest.mark.parametrize("layout", ["zigzag", "auto"])
def test_planned_once(pool: RankPool, layout: str) -> None:
    pool.run(twice_on_rank, W, layout)


def forgetful_on_rank(group: dist.ProcessGroup, layout: str) -> tuple[Any, ...]:
    plan_of(group, documents(90), layout=layout)
    if dist.get_rank(group) == 1:
        recent._recent.clear()
    found, built = plan_of(group, documents(90), layout=layout)
    assert built
    assert plan_of(group, documents(90), layout=layout)[1] == 0
    return fingerprint(found)


@pytest.mark.parametrize("layout", ["zigzag", "auto"])
def test_a_rank_that_has_forgotten(pool: RankPool, layout: str) -> None:
    """All plan again."""
    expected = rf.plan_all(documents(90), S, W, layout=layout, block_size=16)
    assert pool.run(forgetful_on_rank, W, layout) == [fingerprint(plan) for plan in expected]
