"""Many ranks, simulated in one process: the error does not grow with their number."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ringflex as rf
from attention_cases import (
    DEVICE,
    FP64_RELATIVE,
    LAYOUTS,
    STRATEGIES,
    Case,
    assert_within,
    deviation,
    fp64_tolerance,
    reference,
    tensors,
)
from ringflex.kernels import eager, triton_kernel
from ringflex.kernels.contract import KernelOptions, Way
from ringflex.parallel import lanes, schedule
from ringflex.parallel.lanes import Lanes
from ringflex.reference import Reference, reference_attention_with_gradients
from simulated_ranks import SimulatedCommunicator, SimulatedExchange, run_ranks

NATIVE = DEVICE.type == "cuda"
MANY_STEPS = rf.Machine(at_once=0)
KERNELS = {"eager": eager, "triton": triton_kernel}


def simulate(
    case: Case,
    world_size: int,
    kernel: Any = eager,
    layout: str = "zigzag",
    strategy: str = "ring",
    options: KernelOptions | None = None,
    machine: rf.Machine = MANY_STEPS,
) -> Reference:
    p = case.build(device=DEVICE)
    plans = rf.plan_all(
        p.mask, case.seq_len, world_size, B=case.B, H=case.Hq,
        layout=layout, strategy=strategy, block_size=case.block_size, machine=machine,
    )  # fmt: skip
    return run_ranks(plans, kernel, p.q, p.k, p.v, p.dout, p.score, sinks=p.sinks, options=options)


def without_sinks(found: Reference) -> dict[str, Tensor]:
    return {name: x for name, x in tensors(found).items() if name != "dsinks"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 5, 16])
def test_simulated_ranks_are_exact(layout: str, strategy: str, world_size: int) -> None:
    case = Case(mask="document rows", score="relative", sinks=True, seq_len=150)
    found = without_sinks(simulate(case, world_size, layout=layout, strategy=strategy))
    exact = tensors(reference(case))
    allowed = fp64_tolerance(case)
    del allowed["dsinks"]  # autograd's part
    assert_within({name: deviation(x, exact[name]) for name, x in found.items()}, allowed)


@pytest.mark.parametrize("layout", [*LAYOUTS, "nested"])
@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (2, 3), (4, 4), (5, 1), (1, 4)])
def test_simulated_nodes_are_exact(layout: str, nodes: int, per_node: int) -> None:
    case = Case(mask="document rows", score="relative", seq_len=150)
    machine = rf.Machine(gpus_per_node=per_node, at_once=0)
    found = simulate(
        case, nodes * per_node, layout=layout, strategy="hierarchical", machine=machine
    )
    exact = tensors(reference(case))
    deviations = {name: deviation(x, exact[name]) for name, x in without_sinks(found).items()}
    assert_within(deviations, fp64_tolerance(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_does_not_grow_with_ranks(dtype: torch.dtype) -> None:
    """Root mean square against fp64, of eager and natively of Triton: at most 1.2 times that of
    one rank."""
    kernel = triton_kernel if NATIVE and dtype == torch.bfloat16 else eager
    case = Case(
        mask="causal", seq_len=1024, B=1, Hq=4, Hkv=2, D=32, Dv=32, block_size=16, dtype=dtype
    )
    p = case.build(device=DEVICE)
    exact = reference_attention_with_gradients(
        *(x.double() for x in (p.q, p.k, p.v, p.dout)), mask_mod=p.mask
    )

    def errors(world_size: int, layout: str, strategy: str) -> list[float]:
        nodes = rf.Machine(gpus_per_node=4, at_once=0)
        found = simulate(case, world_size, kernel, layout, strategy, machine=nodes)
        return [
            float((x.double() - want).square().mean().sqrt())
            for x, want in zip(found[:5], exact[:5], strict=True)
        ]

    alone = errors(1, "contiguous", "direct")
    for world_size in (8, 16, 32):
        pairs = [*zip(LAYOUTS, STRATEGIES, strict=False), ("zigzag", "hierarchical")]
        for layout, strategy in pairs:
            for one, many in zip(alone, errors(world_size, layout, strategy), strict=True):
                assert many <= 1.2 * one, (world_size, layout, strategy, many / one)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"backward": "one_pass"}, {"deterministic": True}], ids=str
)
def test_triton_with_its_passes_apart(options: dict[str, object], world_size: int) -> None:
    """The local dQ and dK/dV first, each by itself; dQ rounded by the last of its passes."""
    case = Case(
        mask="causal documents", score="alibi", sinks=True, seq_len=90, B=1, Hq=2, Hkv=1,
        D=16, Dv=16, block_size=16, dtype=torch.float16 if NATIVE else torch.float32,
    )  # fmt: skip
    found = simulate(case, world_size, triton_kernel, options=KernelOptions.of(dict(options)))
    exact = reference(case)
    for name, x in without_sinks(found).items():
        want = tensors(exact)[name]
        scale = float(want.abs().masked_fill(want.isinf(), 0).max())
        assert deviation(x, want) <= (5e-3 if NATIVE else 1e-5) * max(1.0, scale), name


@pytest.mark.parametrize(
    ("mask", "layout", "strategy", "world_size", "options"),
    [
        ("causal documents", "contiguous", "ring", 3, {}),
        ("causal documents", "contiguous", "ring", 3, {"backward": "one_pass"}),
        ("full", "zigzag", "direct", 5, {"backward": "one_pass"}),
    ],
)
def test_two_lanes_compute_the_same(
    mask: str,
    layout: str,
    strategy: str,
    world_size: int,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of local K/V are added in the end, as on a GPU: held one by one, or, of a full
    mask, in a sum of their own."""
    case = Case(
        mask=mask, sinks=True, seq_len=100, B=2, Hq=2, Hkv=1, D=16, Dv=16,
        block_size=16, dtype=torch.float16 if NATIVE else torch.float32,
    )  # fmt: skip
    kinds: dict[str, Any] = {
        "layout": layout, "strategy": strategy, "options": KernelOptions.of(dict(options)),
    }  # fmt: skip
    one = without_sinks(simulate(case, world_size, triton_kernel, **kinds))
    met: list[Lanes] = []
    monkeypatch.setattr(Lanes, "meeting", True)
    monkeypatch.setattr(Lanes, "meet", lambda lanes: met.append(lanes))
    two = without_sinks(simulate(case, world_size, triton_kernel, **kinds))
    assert len(set(met)) == world_size
    for name, x in two.items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=5e-3 if NATIVE else 1e-5)


def kernel_that_makes_way(ways: dict[str, list[Way]], asks: int) -> SimpleNamespace:
    """Eager, as if its launches could overlap; of those left behind it notes what way they make.

    asks: how often each launch of a backward asks others."""

    def leave(way: Way | None, kind: str) -> None:
        if way is not None:
            way.word = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            ways[kind].append(way)

    def forward(*given: Any) -> None:
        leave(given[-1], "forward")
        eager.forward(*given)

    def backward(*given: Any) -> None:
        for _ in range(asks):
            given[8].make_room()
        leave(given[8].behind, "backward")
        eager.backward(*given)

    changed = {"forward": forward, "backward": backward, "may_overlap": True}
    changed["has_separate_passes"] = lambda *_: False
    return SimpleNamespace(**vars(eager) | changed)


def test_what_is_left_behind_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch that is left behind: for each later one, in the forward also for the rest of its
    own step; for what unpacks and packs K/V (the last step's here are where they arrived), adds and
    packs dK/dV, and for transfers. It is prepared for as much."""
    world_size, ways = 3, {"forward": list[Way](), "backward": list[Way]()}
    monkeypatch.setattr(lanes, "_numbers", lambda: list(torch.arange(64, dtype=torch.int32)))
    case = Case(mask="causal", seq_len=384, B=1, block_size=16, dtype=torch.float32)
    found = without_sinks(simulate(case, world_size, kernel_that_makes_way(ways, asks=1)))
    exact = without_sinks(simulate(case, world_size, eager))
    for name, x in found.items():
        torch.testing.assert_close(x, exact[name], rtol=0, atol=1e-5)
    # Only of the first rank do some queries see nothing of others.
    told = {kind: [int(way.word) for way in left] for kind, left in ways.items()}
    assert told == {"forward": [1 + 3 + 1], "backward": [3 + 3 + 2] * 3}
    assert [way.times for way in ways["forward"]] == told["forward"]
    # Launches of a backward may ask twice, but these ask once.
    assert [way.times - 2 for way in ways["backward"]] == told["backward"]


@pytest.mark.parametrize(
    ("layout", "strategy", "world_size"),
    [
        ("contiguous", "ring", 3), ("contiguous", "direct", 2), ("zigzag", "direct", 5),
        ("zigzag", "all_gather", 3),
    ],
)  # fmt: skip
def test_who_is_asked_to_make_way_is_prepared(
    layout: str, strategy: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked more often does not end, and the others wait until all of it is done."""
    ways = {"forward": list[Way](), "backward": list[Way]()}
    monkeypatch.setattr(lanes, "_numbers", lambda: list(torch.arange(64, dtype=torch.int32)))
    case = Case(mask="causal", seq_len=384, B=1, block_size=16, dtype=torch.float32)
    simulate(case, world_size, kernel_that_makes_way(ways, asks=2), layout, strategy)
    assert ways["backward"]
    for kind, spare in (("forward", 0), ("backward", 1)):
        for way in ways[kind]:
            told = min(schedule._MOST_ASKS, int(way.word))
            assert told <= way.times <= told + spare


@pytest.mark.parametrize("overlap", [False, True])
def test_what_must_not_overlap_is_not_left_behind(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager kernel copies whole tensors: on another stream it would undo what others write."""
    assert not eager.may_overlap
    left: list[str] = []
    behind = Lanes.behind

    def note(self: Lanes, *args: Any) -> Any:
        left.append("behind")
        return behind(self, *args)

    monkeypatch.setattr(Lanes, "behind", note)
    kernel = SimpleNamespace(**vars(eager) | {"may_overlap": overlap})
    simulate(Case(mask="causal", seq_len=384, B=1, block_size=16, dtype=torch.float32), 3, kernel)
    assert bool(left) is overlap


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_buffers_are_not_used_again_where_a_step_fails(
    on_gpu: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the GPU's stream; a CPU would wait for a peer that may have failed as well."""
    waited: list[int] = []
    wait = SimulatedExchange.wait

    def note(self: SimulatedExchange) -> None:
        waited.append(self.comm.rank)
        wait(self)

    def fail(*given: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(SimulatedCommunicator, "on_gpu", on_gpu)
    case = Case(mask="causal", seq_len=64, B=1, dtype=torch.float32)
    simulate(case, 2)
    monkeypatch.setattr(SimulatedExchange, "wait", note)
    kernel = SimpleNamespace(**vars(eager) | {way: fail})
    with pytest.raises(MemoryError, match="no room"):
        simulate(case, 2, kernel)
    of_the_forward = [0, 1] if way == "backward" else []
    assert sorted(waited) == sorted(of_the_forward + [0, 1] * on_gpu)


@pytest.mark.parametrize("strategy", ["ring", "hierarchical"])
def test_gradients_may_travel_in_bf16(strategy: str) -> None:
    case = Case(mask="causal", seq_len=128, B=1, dtype=torch.float32)
    nodes = rf.Machine(gpus_per_node=2, at_once=0)
    plain, narrow = (
        simulate(case, 4, strategy=strategy, machine=nodes, options=KernelOptions.of(options))
        for options in ({}, {"gradient_dtype": torch.bfloat16})
    )
    assert torch.equal(plain.out, narrow.out) and torch.equal(plain.dq, narrow.dq)
    for a, b in ((plain.dk, narrow.dk), (plain.dv, narrow.dv)):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 2**-9 * float(a.abs().max()))


def test_the_same_bits_every_time() -> None:
    case = replace(Case(mask="causal", seq_len=200), dtype=torch.float32)
    first, second = (simulate(case, 5) for _ in range(2))
    for name, x in without_sinks(first).items():
        assert torch.equal(x, tensors(second)[name]), name
    assert FP64_RELATIVE < 1e-6
