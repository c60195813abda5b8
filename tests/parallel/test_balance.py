"""The balanced layout: even work first, few blocks received second, the same on every rank."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ringflex as rf
from attention_cases import LAYOUTS
from mask_zoo import MASKS
from parallel.mistakes import OFFENDER, SECONDS, S, W, check_refusal, good_plan_arguments
from parallel.test_plan_agreement import PLAN_REFUSALS
from rank_pool import RankPool
from ringflex.masks.builder import create_block_mask
from ringflex.parallel import draft as draft_module
from ringflex.parallel.balance import balance
from ringflex.parallel.links import Costs
from ringflex.parallel.machine import Machine
from ringflex.parallel.survey import Relays, Survey, balanced_layout, best_layout, chunk_blocks
from ringflex.parallel.swaps import Deal, Problem

TOKENS = 65536
BLOCKS = TOKENS // 128
MACHINE = Machine()
COSTS = Costs.of(MACHINE, 128)
LIMIT = 1.02


def packed(lengths: Tensor, tokens: int = TOKENS) -> Callable[..., Tensor]:
    """Causal documents of these lengths, as many as fill the tokens; the last is cut."""
    ends = lengths.long().clamp(min=1).cumsum(0).clamp(max=tokens)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    assert int(ends[-1]) == tokens
    return rf.causal() & rf.document_from_lengths(lengths[lengths > 0])


def log_normal(seed: int, tokens: int = TOKENS, *, longest: int = TOKENS) -> Callable[..., Tensor]:
    """Median 1,800 tokens, mean about 3,000."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(tokens).log_normal_(7.5, 1.0, generator=generator)
    return packed(lengths.clamp(max=longest), tokens)


def library(seed: int) -> Callable[..., Tensor]:
    """Files as in a standard library: many small ones, some of tens of thousands of bytes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([300.0, 2_000.0, 8_000.0, 20_000.0, 40_000.0])
    share = torch.tensor([0.25, 0.25, 0.25, 0.2, 0.05])
    which = torch.multinomial(share, TOKENS, replacement=True, generator=generator)
    return packed(sizes[which] * (0.5 + torch.rand(TOKENS, generator=generator)))


SINGLE: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "full": rf.full,
    "causal": rf.causal,
    "window": lambda: rf.causal() & rf.sliding_window(4096),
    "symmetric window": lambda: rf.sliding_window(1000, 1000),
    "prefix": lambda: rf.prefix_lm(TOKENS // 3),
    "chunked": lambda: rf.causal() & rf.chunked(8192),
    "log-normal 0": lambda: log_normal(0),
    "log-normal 1": lambda: log_normal(1),  # one document has most of the work
    "log-normal 2": lambda: log_normal(2),
    "library 0": lambda: library(0),
    "library 1": lambda: library(1),
}
SETS: dict[str, list[Callable[[], Callable[..., Tensor]]]] = {
    **{name: [make] for name, make in SINGLE.items()},
    "local and global": [SINGLE["window"], SINGLE["causal"]],
    "local and documents": [SINGLE["window"], SINGLE["log-normal 0"]],
}


def visible(mask: Callable[..., Tensor], tokens: int = TOKENS) -> np.ndarray:
    """bool `[blocks, blocks]`."""
    return create_block_mask(mask, None, None, tokens, tokens).block_map()[0, 0] > 0


def measure(layers: list[np.ndarray], owner: np.ndarray) -> tuple[float, int]:
    """Work of the slowest rank over the mean, and the most blocks that a rank receives."""
    work, moved = [], []
    for rank in range(int(owner.max()) + 1):
        mine = owner == rank
        work.append(sum(int(seen[mine].sum()) for seen in layers))
        moved.append(sum(int((seen[mine].any(axis=0) & ~mine).sum()) for seen in layers))
    return max(work) * len(work) / sum(work), max(moved)


def survey_of(masks: list[Callable[..., Tensor]], tokens: int = TOKENS) -> Survey:
    return Survey.of([create_block_mask(m, None, None, tokens, tokens) for m in masks], 1)


# Who owns what.


@given(
    world_size=st.integers(1, 16),
    share=st.integers(1, 9),
    layers=st.integers(1, 3),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_equal_shares_of_any_mask(
    world_size: int, share: int, layers: int, density: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    chunks = world_size * share
    need = random.random((chunks, layers * chunks)) < density
    work = random.integers(0, 100, chunks)
    given_work, given_need = work.copy(), need.copy()
    owner = balance(work, need, world_size, transfer=10)
    assert (np.bincount(owner, minlength=world_size) == share).all()
    assert owner.shape == (chunks,)
    assert (balance(work, need, world_size, transfer=10) == owner).all()
    assert (work == given_work).all() and (need == given_need).all()


@pytest.mark.parametrize("world_size", range(1, 17))
def test_every_block_is_on_one_rank(world_size: int) -> None:
    for seq_len in (1, 17, 1001, 2048):
        mask = rf.causal() & rf.document(torch.arange(seq_len) // 300)
        plans = rf.plan_all(mask, seq_len, world_size, layout="balanced", block_size=16)
        layout = plans[0].layout
        assert layout.name == "balanced"
        real = -(-seq_len // 16)
        assert layout.blocks == -(-real // world_size) * world_size  # no more padding than it must
        assert (
            np.bincount(layout.owner, minlength=world_size) == layout.blocks // world_size
        ).all()
        seen = create_block_mask(mask, None, None, seq_len, seq_len, BLOCK_SIZE=16)
        assert sum(plans[0].stats.work) == seen.visible_blocks
        assert len({plan.layout.owner.tobytes() for plan in plans}) == 1


@given(
    world_size=st.integers(2, 6),
    share=st.integers(1, 8),
    layers=st.integers(1, 2),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_swaps_turn_out_as_judged(
    world_size: int, share: int, layers: int, density: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    chunks = world_size * share
    need = random.random((chunks, layers * chunks)) < density
    work = random.integers(0, 100, chunks)
    deal = Deal(
        Problem(work, need, world_size, 10), random.permutation(np.arange(chunks) % world_size)
    )
    for _ in range(5):
        a, b = random.integers(0, chunks, 2)
        length = 1
        while max(a, b) + length < chunks and all(
            deal.owner[x + length] == deal.owner[x] for x in (a, b)
        ):
            length += 1
        r, s = deal.owner[a], deal.owner[b]
        if r == s:
            continue
        once = [np.array([x]) for x in (s, a, b, length)]
        judged = deal.received_after(r, *once)[:, 0]
        deal.swap(a, b, length)
        owners = np.tile(deal.owner, layers)
        received = [
            int((need[deal.owner == rank].any(axis=0) & (owners != rank)).sum())
            for rank in range(world_size)
        ]
        assert deal.moved.tolist() == received
        assert judged.tolist() == [received[r], received[s]]
        assert (deal.work == np.bincount(deal.owner, work, world_size)).all()


# How good it is.


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("name", SETS)
def test_even_work_then_few_blocks(name: str, world_size: int) -> None:
    masks = [make() for make in SETS[name]]
    layers = [visible(mask) for mask in masks]
    if len(masks) == 1:
        layout = rf.plan_all(masks[0], TOKENS, world_size, layout="balanced")[0].layout
    else:
        layout = balanced_layout(survey_of(masks), TOKENS, world_size, 128, COSTS, Relays.NEVER)
    imbalance, moved = measure(layers, layout.owner)
    assert imbalance <= LIMIT
    for simple in LAYOUTS:
        owner = rf.make_layout(simple, TOKENS, world_size, 128).owner
        other_imbalance, other_moved = measure(layers, owner)
        if other_imbalance <= imbalance:
            assert moved <= other_moved, simple


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_folds_a_causal_triangle(world_size: int) -> None:
    plans = {
        name: rf.plan_all(rf.causal(), TOKENS, world_size, layout=name)
        for name in ("zigzag", "balanced")
    }
    most = {name: max(sum(p.stats.blocks_received) for p in plans[name]) for name in plans}
    assert most["balanced"] == most["zigzag"]
    assert plans["balanced"][0].stats.imbalance <= plans["zigzag"][0].stats.imbalance


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_keeps_even_windows_and_chunks_together(world_size: int) -> None:
    for name in ("symmetric window", "chunked", "full"):
        layer = visible(SINGLE[name]())
        owner = balanced_layout(
            survey_of([SINGLE[name]()]), TOKENS, world_size, 128, COSTS, Relays.NEVER
        ).owner
        contiguous = rf.make_layout("contiguous", TOKENS, world_size, 128).owner
        assert measure([layer], owner)[1] == measure([layer], contiguous)[1]


def test_keeps_documents_together() -> None:
    """Where no document is most of the work, two ranks hold whole ones and send next to nothing."""
    tokens, most = 131072, {"balanced": 0, "zigzag": 0}
    for seed in range(6):
        mask = log_normal(seed, tokens, longest=tokens // 8)
        for name in most:
            plans = rf.plan_all(mask, tokens, 2, layout=name)
            received_now = max(sum(p.stats.blocks_received) for p in plans)
            most[name] += received_now
            if name == "balanced":
                assert received_now <= 16  # of 512 that the other rank holds
                assert plans[0].stats.imbalance <= LIMIT
    assert most["balanced"] <= most["zigzag"] / 4


def test_few_blocks() -> None:
    """No rank has more than its even share by more than one row of blocks."""
    for world_size in (2, 3, 5, 8):
        for blocks in (world_size, 2 * world_size + 1, 5 * world_size):
            plans = rf.plan_all(
                rf.causal(), blocks * 16, world_size, layout="balanced", block_size=16
            )
            work = plans[0].stats.work
            assert max(work) <= sum(work) / world_size + blocks


# What is known of a mask before its layout.


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
@pytest.mark.parametrize("chunk", [1, 3])
def test_surveys_of_shares_are_that_of_the_whole(case: Any, chunk: int) -> None:
    B, H = 2 if case.needs_b else None, 4 if case.needs_h else None
    mask = case.make(400, 2, 4)
    block_mask = create_block_mask(mask, B, H, 400, 400, BLOCK_SIZE=16)
    blocks = -(-25 // (2 * chunk)) * 2 * chunk
    dense = np.zeros((block_mask.B, block_mask.H, blocks, blocks), dtype=np.int64)
    dense[:, :, :25, :25] = block_mask.block_map() > 0
    dense = dense.reshape(*dense.shape[:2], blocks // chunk, chunk, blocks // chunk, chunk)

    sizes = {"B": B, "H": H, "layout": "balanced", "strategy": "auto", "block_size": 16}
    request = draft_module.Request(seq_len=400, world_size=2, **sizes)
    draft = draft_module.Draft({"": mask}, request)
    draft.chunks = chunk, blocks
    told = np.concatenate([draft.survey(rank) for rank in range(2)])
    columns = block_mask.B * blocks // chunk
    survey = Survey.from_rows(told, chunk, block_mask.H, columns)
    assert (survey.work == dense.sum(axis=(0, 1, 3, 4, 5))).all()
    needs = dense.any(axis=(1, 3, 5)).transpose(1, 0, 2).reshape(blocks // chunk, columns)
    assert (survey.need == needs).all()


def test_masks_weigh_the_same() -> None:
    """However many heads a mask tells apart."""
    slopes = torch.full((6,), 100)
    alike = [
        rf.causal() & rf.sliding_window(100),
        lambda b, h, q, k: (q >= k) & (q - k <= slopes[h]),
    ]
    masks = [create_block_mask(m, None, 6, 2048, 2048, BLOCK_SIZE=16) for m in alike]
    survey = Survey.of(masks, 1)
    assert (survey.need[:, :128] == survey.need[:, 128:]).all()
    assert survey.heads == 6
    assert survey.work.sum() == 6 * masks[0].visible_blocks + masks[1].visible_blocks


@given(
    blocks=st.integers(1, 100_000),
    world_size=st.integers(1, 512),
    layers=st.sampled_from([1, 2, 16]),
)
def test_chunks_are_few_and_waste_little(blocks: int, world_size: int, layers: int) -> None:
    chunk = chunk_blocks(blocks, world_size, layers)
    share = -(-blocks // world_size)
    chunks = -(-share // chunk) * world_size
    assert chunks <= max(2048 / layers**0.5, 4 * world_size)
    assert -(-share // chunk) * chunk - share < chunk
    assert chunk == 1 or share > 3
    if blocks <= 2048 / layers**0.5 - world_size:
        assert chunk == 1


@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 3), density=st.floats(0, 1))
def test_no_layout_is_done_before_the_bound(seed: int, nodes: int, density: float) -> None:
    random = np.random.default_rng(seed)
    W, costs = 2 * nodes, replace(COSTS, node=2)
    chunks = 4 * W
    need = random.random((chunks, 2 * chunks)) < density
    survey = Survey(chunk=2, heads=3, work=random.integers(0, 50, chunks), need=need)
    owner = random.permutation(np.repeat(np.arange(W), 4))
    for relays in Relays:
        slowest = survey.slowest(owner, W, costs, relays)
        assert slowest >= survey.bound(W, costs, relays) - 1e-9


def test_a_machine_is_checked_and_agreed_upon() -> None:
    with pytest.raises(TypeError, match=r"machine must be an rf\.Machine, got str"):
        rf.plan_all(rf.causal(), 128, 2, machine="h100")  # type: ignore[arg-type]
    plans = [
        rf.plan_all(rf.causal(), 128, 2, machine=m)[0] for m in (None, MACHINE, Machine(far=1e9))
    ]
    assert plans[0].identity == plans[1].identity != plans[2].identity


# What "auto" makes of it.


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("name", SINGLE)
def test_auto_is_done_first(name: str, world_size: int) -> None:
    survey = survey_of([SINGLE[name]()])
    best = best_layout(survey, TOKENS, world_size, 128, COSTS, Relays.NEVER)
    simple = {n: rf.make_layout(n, TOKENS, world_size, 128) for n in LAYOUTS}
    times = {n: survey.slowest(x.owner, world_size, COSTS, Relays.NEVER) for n, x in simple.items()}
    assert survey.slowest(best.owner, world_size, COSTS, Relays.NEVER) <= min(times.values())
    if best.name != "balanced":
        assert times[best.name] == min(times.values())
    if name in ("full", "causal", "chunked", "symmetric window"):  # these have a simple optimum
        assert best.name == min(times, key=lambda n: times[n])
    if world_size == 8 and name.startswith("log-normal"):
        assert best.name == "balanced"


# What it costs.


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_time(world_size: int) -> None:
    """Processor time for 128 Ki tokens, and for a million; several times what it takes alone."""
    for tokens, seconds in ((131072, 3.0), (1 << 20, 6.0)):
        chunk = chunk_blocks(tokens // 128, world_size, 1)
        mask = create_block_mask(log_normal(0, tokens), None, None, tokens, tokens)
        survey = Survey.of([mask], chunk)
        start = time.process_time()
        layout = balanced_layout(survey, tokens, world_size, 128, COSTS, Relays.NEVER)
        assert time.process_time() - start < seconds
        assert layout.blocks == tokens // 128


# All ranks alike.


def layers_on_rank(group: dist.ProcessGroup, seq_len: int) -> list[int]:
    """Both layers of a model on one balanced layout, forward and backward."""
    documents = rf.document(torch.arange(seq_len) // 90)
    masks = {"local": rf.causal() & rf.sliding_window(50), "global": rf.causal() & documents}
    plans = rf.plan(masks, seq_len, group, layout="balanced", block_size=16)
    assert plans["local"].layout is plans["global"].layout
    x = torch.randn(1, 2, seq_len, 8, dtype=torch.float64)
    for name, mask in masks.items():
        whole, sharded = x.clone().requires_grad_(), x.clone().requires_grad_()
        local = plans[name].shard(sharded, 2)
        out = rf.flex_attention(local, local, local, block_mask=plans[name])
        out = plans[name].unshard(out, 2)
        expected = rf.flex_attention(
            whole, whole, whole, block_mask=create_block_mask(mask, None, None, seq_len, seq_len)
        )
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
        (out * x).sum().backward()
        (expected * x).sum().backward()
        gradient = sharded.grad
        assert gradient is not None and whole.grad is not None
        dist.all_reduce(gradient, group=group)
        scale = dist.get_world_size(group)  # every rank computed the whole loss
        torch.testing.assert_close(gradient / scale, whole.grad, rtol=1e-9, atol=1e-11)
    return plans["local"].layout.owner.tolist()


@pytest.mark.parametrize("seq_len", [300, 517])
def test_attention_on_a_balanced_layout(pool: RankPool, seq_len: int) -> None:
    owners = pool.run(layers_on_rank, 3, seq_len)
    assert owners[0] == owners[1] == owners[2]


def refused_on_rank(group: dist.ProcessGroup, name: str, layout: str) -> None:
    arguments = good_plan_arguments() | {"layout": layout}
    if dist.get_rank(group) == OFFENDER:
        arguments |= PLAN_REFUSALS[name].change()
    rf.plan(group=group, **arguments)


@pytest.mark.parametrize("layout", ["auto", "balanced"])
@pytest.mark.parametrize("name", ["no tokens", "mask of numbers", "one mask of several"])
def test_a_mistake_of_one_rank(pool: RankPool, name: str, layout: str) -> None:
    errors = pool.errors(refused_on_rank, W, name, layout, timeout=SECONDS)
    check_refusal(errors, PLAN_REFUSALS[name], [OFFENDER])


def failing_choice(*args: Any) -> rf.Layout:
    raise ValueError("out of ideas")


def other_choice(*args: Any) -> rf.Layout:
    return rf.make_layout("striped", S, W, 16)


def astray_on_rank(group: dist.ProcessGroup, choice: str) -> None:
    """One rank goes wrong after the surveys, where the others go on to a second agreement."""
    chosen = dict(draft_module._CHOICES)
    if dist.get_rank(group) == OFFENDER:
        chosen["balanced"] = globals()[choice]
    with patch.object(draft_module, "_CHOICES", chosen):
        rf.plan(group=group, **good_plan_arguments() | {"layout": "balanced"})


def test_a_rank_that_fails_to_choose(pool: RankPool) -> None:
    errors = pool.errors(astray_on_rank, W, "failing_choice", timeout=SECONDS)
    for rank, error in enumerate(errors):
        prefix = "" if rank == OFFENDER else f"rank {OFFENDER} refused: "
        assert str(error) == prefix + "out of ideas"


def test_a_rank_that_chooses_otherwise(pool: RankPool) -> None:
    errors = pool.errors(astray_on_rank, W, "other_choice", timeout=SECONDS)
    assert all(str(error).startswith("ranks disagree") for error in errors)


def layouts_on_rank(group: dist.ProcessGroup) -> None:
    layout = "balanced" if dist.get_rank(group) == OFFENDER else "contiguous"
    rf.plan(group=group, **good_plan_arguments() | {"layout": layout})


def test_ranks_that_ask_for_different_layouts(pool: RankPool) -> None:
    """Though one of them would have exchanged surveys first."""
    errors = pool.errors(layouts_on_rank, W, timeout=SECONDS)
    assert all(str(error).startswith("ranks disagree") for error in errors)
