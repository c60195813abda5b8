"""Bad input to flex_attention() with a plan: an error on every rank, and no hang.

Tensors have 2 batch elements, 4 query heads, 2 key heads, D = 8, and 48 slots on each rank.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

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


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def qkv(B: int = 2, Hq: int = 4, Hkv: int = 2, D: int = 8, **options: Any) -> dict[str, Tensor]:
    return {
        "query": tensor(B, Hq, 48, D, **options),
        "key": tensor(B, Hkv, 48, D, **options),
        "value": tensor(B, Hkv, 48, D, **options),
    }


def bias_of(x: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q_idx, kv_idx: score + x[h]


ATTENTION_REFUSALS = {
    "no tensor": Mistake(
        change=lambda: {"key": 3}, error=TypeError, text="key must be a tensor, got int"
    ),
    "three dimensions": Mistake(
        change=lambda: {"query": tensor(4, 48, 8)},
        text="query must be [B, H, S, D], got shape (4, 48, 8)",
    ),
    "empty batch": Mistake(
        change=lambda: qkv(B=0), text="query has an empty dimension: shape (0, 4, 48, 8)"
    ),
    "integers": Mistake(
        change=lambda: qkv(dtype=torch.int64),
        error=TypeError,
        text="query must be bf16, fp16, fp32 or fp64, got torch.int64",
    ),
    "two dtypes": Mistake(
        change=lambda: {"query": tensor(2, 4, 48, 8, dtype=torch.float64)},
        error=TypeError,
        text="must have one dtype, got torch.float64, torch.float32, torch.float32",
    ),
    "two devices": Mistake(
        change=lambda: {"value": tensor(2, 2, 48, 8, device="meta")},
        text="must be on one device, got cpu, cpu, meta",
    ),
    "another device": Mistake(
        change=lambda: {**qkv(device="meta"), "score_mod": None},
        text="process group moves CPU tensors, query is on meta",
    ),
    "two batch sizes": Mistake(
        change=lambda: {"query": tensor(3, 4, 48, 8)}, text="must have one batch size"
    ),
    "heads of value": Mistake(
        change=lambda: {"value": tensor(2, 1, 48, 8)},
        text="key and value must have the same heads and length",
    ),
    "length of value": Mistake(
        change=lambda: {"value": tensor(2, 2, 32, 8)},
        text="key and value must have the same heads and length",
    ),
    "head dims": Mistake(
        change=lambda: {"query": tensor(2, 4, 48, 16)},
        text="query and key must have the same head dim",
    ),
    "head ratio": Mistake(
        change=lambda: {"query": tensor(2, 3, 48, 8)},
        text="query heads must be a multiple of key heads",
    ),
    "no enable_gqa": Mistake(
        change=lambda: {"enable_gqa": False},
        text="query has 4 heads, key 2: pass enable_gqa=True for grouped-query attention",
    ),
    "another length": Mistake(
        change=lambda: {"query": tensor(2, 4, 100, 8)},
        text="the plan holds 48 slots of 100 tokens on each of 3 ranks; query and key have 100 and "
        "48 tokens: pass this rank's shard, e.g. plan.shard(x, dim=2)",
    ),
    "batch of the mask": Mistake(
        change=lambda: qkv(B=3), text="depends on b and was made for B=2; query has shape (3, 4"
    ),
    "scale of nan": Mistake(
        change=lambda: {"scale": float("nan")},
        text="scale must be a finite number or None, got nan",
    ),
    "scale of text": Mistake(
        change=lambda: {"scale": "auto"}, text="scale must be a finite number or None, got 'auto'"
    ),
    "kernel options": Mistake(
        change=lambda: {"kernel_options": {"BLOCK_M": 64}},
        text="kernel_options has ['BLOCK_M']; options are deterministic, backward, "
        "approximate_tanh, tune, tiles, tma",
    ),
    "lse twice": Mistake(
        change=lambda: {"return_lse": True, "return_aux": AuxRequest(lse=True)},
        text="pass return_lse or return_aux, not both",
    ),
    "max scores": Mistake(
        change=lambda: {"return_aux": AuxRequest(max_scores=True)},
        error=NotImplementedError,
        text="max_scores is not supported; lse is",
    ),
    "unknown backend": Mistake(
        change=lambda: {"backend": "fastest"}, text="backend='fastest' is not one of auto, eager"
    ),
    "sinks of key heads": Mistake(
        change=lambda: {"sinks": tensor(2)}, text="sinks must be [Hq] = [4], got shape (2,)"
    ),
    "sinks of integers": Mistake(
        change=lambda: {"sinks": tensor(4, dtype=torch.int64)},
        error=TypeError,
        text="sinks must be a floating-point tensor [Hq]",
    ),
    "sinks elsewhere": Mistake(
        change=lambda: {"sinks": tensor(4, device="meta")},
        text="sinks are on meta, query is on cpu",
    ),
    "score mod of another type": Mistake(
        change=lambda: {"score_mod": 3},
        error=TypeError,
        text="score_mod must be a function score_mod(score, b, h, q_idx, kv_idx), got int: 3",
    ),
    "mask for score mod": Mistake(
        change=lambda: {"score_mod": rf.causal()},
        error=TypeError,
        text="score_mod 'causal' must be callable as score_mod(score, b, h, q_idx, kv_idx)",
    ),
    "score mod of booleans": Mistake(
        change=lambda: {"score_mod": lambda score, b, h, q_idx, kv_idx: score > 0},
        error=TypeError,
        text="score_mod '<lambda>' must return the score as a floating-point tensor",
    ),
    "score mod that branches": Mistake(
        change=lambda: {
            "score_mod": lambda score, b, h, q_idx, kv_idx: score if q_idx > 3 else -score
        },
        text="score_mod '<lambda>' turns a tensor into a Python value",
    ),
    "captured elsewhere": Mistake(
        change=lambda: {"score_mod": bias_of(tensor(4, device="meta"))},
        text="score_mod '<lambda>' captures a tensor of shape (4,) on meta, query is on cpu",
    ),
}

ATTENTION_DISAGREEMENTS = {
    "query heads": Mistake(change=lambda: {"query": tensor(2, 2, 48, 8)}),
    "key heads": Mistake(change=lambda: qkv(Hkv=1)),
    "head dim": Mistake(change=lambda: qkv(D=16)),
    "value dim": Mistake(change=lambda: {"value": tensor(2, 2, 48, 16)}),
    "dtype": Mistake(change=lambda: qkv(dtype=torch.float64)),
    "scale": Mistake(change=lambda: {"scale": 0.5}),
    "sinks": Mistake(change=lambda: {"sinks": tensor(4)}),
    "no score mod": Mistake(change=lambda: {"score_mod": None}),
    "score mod": Mistake(change=lambda: {"score_mod": rf.softcap(3.0)}),
    "constant of the score mod": Mistake(
        change=lambda: {"score_mod": rf.compose(bias_of(tensor(4)), rf.softcap(21.0))}
    ),
    "captured shape": Mistake(
        change=lambda: {"score_mod": rf.compose(bias_of(tensor(5)), rf.softcap(20.0))}
    ),
    "captured dtype": Mistake(
        change=lambda: {
            "score_mod": rf.compose(bias_of(tensor(4, dtype=torch.bfloat16)), rf.softcap(20.0))
        }
    ),
    # A gradient wanted on one rank alone would have its backward wait for the others for ever.
    "gradients": Mistake(change=lambda: {"query": tensor(2, 4, 48, 8).requires_grad_()}),
    "gradients of a captured tensor": Mistake(
        change=lambda: {
            "score_mod": rf.compose(bias_of(tensor(4).requires_grad_()), rf.softcap(20.0))
        }
    ),
    "mask of the plan": Mistake(
        change=lambda: {"mask_mod": rf.causal() & rf.prefix_lm(torch.tensor([0, 3]))}
    ),
    "strategy of the plan": Mistake(change=lambda: {"strategy": "all_gather"}),
}


def attention_on_rank(group: dist.ProcessGroup, mistakes: str, name: str, ranks: list[int]) -> None:
    """A mistake in an argument of plan() takes another plan of the same group instead."""
    change = globals()[mistakes][name].change()
    made_otherwise = {key: change.pop(key) for key in ("mask_mod", "strategy") if key in change}
    of_plan = good_plan_arguments() | {
        "mask_mod": rf.document(torch.stack([DOCUMENTS, OTHER_DOCUMENTS]))
    }
    plan = rf.plan(group=group, **of_plan)
    arguments = {
        **qkv(),
        "score_mod": rf.compose(bias_of(tensor(4)), rf.softcap(20.0)),
        "block_mask": plan,
        "enable_gqa": True,
    }
    rf.flex_attention(**arguments)
    if made_otherwise:
        change["block_mask"] = rf.plan(group=group, **(of_plan | made_otherwise))
    if dist.get_rank(group) in ranks:
        arguments |= change
    rf.flex_attention(**arguments)


@pytest.mark.parametrize("ranks", [[0, 1, 2], [OFFENDER]], ids=["all", "one"])
@pytest.mark.parametrize("name", ATTENTION_REFUSALS)
def test_attention_refuses(pool: RankPool, name: str, ranks: list[int]) -> None:
    errors = pool.errors(attention_on_rank, W, "ATTENTION_REFUSALS", name, ranks, timeout=SECONDS)
    check_refusal(errors, ATTENTION_REFUSALS[name], ranks)


@pytest.mark.parametrize("name", ATTENTION_DISAGREEMENTS)
def test_attention_disagrees(pool: RankPool, name: str) -> None:
    check_disagreement(
        pool.errors(
            attention_on_rank, W, "ATTENTION_DISAGREEMENTS", name, [OFFENDER], timeout=SECONDS
        )
    )


def short_table_on_rank(group: dist.ProcessGroup) -> None:
    """Rank 0 reads within the table, the others beyond its end."""
    plan = rf.plan(rf.causal(), S, group, layout="contiguous", block_size=16)
    table = torch.zeros(4, 60)
    score = lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx]
    rf.flex_attention(**qkv(), score_mod=score, block_mask=plan, enable_gqa=True)


def test_captured_score_table_that_is_too_short(pool: RankPool) -> None:
    for error in pool.errors(short_table_on_rank, W, timeout=SECONDS):
        assert type(error) is ValueError, error
        assert "(4, 60)" in str(error)


def groupless_on_rank(group: dist.ProcessGroup) -> None:
    plan = rf.plan_all(rf.causal(), S, W, block_size=16)[dist.get_rank(group)]
    rf.flex_attention(*qkv(Hkv=4).values(), block_mask=plan)


def test_a_plan_without_a_group_cannot_run(pool: RankPool) -> None:
    for error in pool.errors(groupless_on_rank, W, timeout=SECONDS):
        assert type(error) is ValueError
        assert "plan of 3 ranks was made without a process group (plan_all); make it" in str(error)


def planned_for_the_world_on_rank(group: dist.ProcessGroup) -> None:
    pairs = [dist.new_group([first, first + 1]) for first in range(0, 8, 2)]
    pair = rf.plan(rf.causal(), S, pairs[dist.get_rank() // 2], block_size=16)
    x = pair.shard(torch.zeros(1, 1, S, 8), 2)
    rf.flex_attention(x, x, x, block_mask=rf.plan(rf.causal(), S, group, block_size=16))


def test_a_plan_of_another_group(pool: RankPool) -> None:
    """Shards of plans of two ranks, used with the plan of all eight."""
    for error in pool.errors(planned_for_the_world_on_rank, 8, timeout=SECONDS):
        assert type(error) is ValueError
        assert "the plan holds 16 slots of 100 tokens on each of 8 ranks; query" in str(error)


def recovers_on_rank(group: dist.ProcessGroup) -> None:
    """Refused calls leave the group, the plan and its cache as they were."""
    for _ in range(2):
        with pytest.raises(ValueError, match="ranks disagree"):
            rf.plan(rf.causal(), S + dist.get_rank(group), group)
        with pytest.raises(ValueError, match=r"rank|scale"):
            attention_on_rank(group, "ATTENTION_REFUSALS", "scale of nan", [OFFENDER])
        with pytest.raises(ValueError, match="ranks disagree"):
            attention_on_rank(group, "ATTENTION_DISAGREEMENTS", "scale", [OFFENDER])
    plan = rf.plan(rf.causal(), S, group, block_size=16)
    x = torch.randn(1, 1, S, 8, dtype=torch.float64)
    local = plan.shard(x, 2)
    out = plan.unshard(rf.flex_attention(local, local, local, block_mask=plan), 2)
    alone = rf.create_block_mask(rf.causal(), None, None, S, S)
    expected = rf.flex_attention(x, x, x, block_mask=alone)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_a_refusal_does_no_harm(pool: RankPool) -> None:
    pool.run(recovers_on_rank, W, timeout=SECONDS)
