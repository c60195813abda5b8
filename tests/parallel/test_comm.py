"""Traffic: what a plan says it sends is what is sent, counted twice."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES, Case, Problem, attend
from rank_pool import RankPool
from ringflex.parallel.comm import Communicator, PlanAgreement
from ringflex.parallel.watch import has_nccl, timeout_of

RECORD = 512  # bytes that a rank may spend on agreement in a call


@dataclass
class Traffic:
    """Bytes at the door of torch.distributed, and peers (global ranks) of the messages."""

    sent: int = 0
    received: int = 0
    gathered: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    peers: set[int] = field(default_factory=set)


@contextmanager
def watched() -> Iterator[Traffic]:
    """Counts what passes through torch.distributed, whoever sends it."""
    traffic = Traffic()
    batch, gather = dist.batch_isend_irecv, dist.all_gather
    gather_of_plans = PlanAgreement.all_gather

    def batch_isend_irecv(ops: list[dist.P2POp]) -> object:
        for op in ops:
            if op.op is dist.isend:
                traffic.sent += op.tensor.numel() * op.tensor.element_size()
            else:
                assert op.op is dist.irecv
                traffic.received += op.tensor.numel() * op.tensor.element_size()
            traffic.peers.add(op.peer)
        return batch(ops)

    def all_gather(out: list[torch.Tensor], x: torch.Tensor, group: object) -> object:
        traffic.gathered.append(x.nbytes)
        return gather(out, x, group=group)

    def plan_gather(self: PlanAgreement, x: torch.Tensor) -> list[torch.Tensor]:
        traffic.gathered.append(x.nbytes)
        return gather_of_plans(self, x)

    def other(name: str) -> object:
        return lambda *args, **kwargs: traffic.others.append(name)

    # isend and irecv stay: batch_isend_irecv is given these very functions.
    names = ["all_reduce", "broadcast", "send", "recv", "all_to_all_single", "all_to_all"]
    names += ["all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_object", "gather"]
    with (
        patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
        patch.object(dist, "all_gather", all_gather),
        patch.object(PlanAgreement, "all_gather", plan_gather),
        patch.multiple(dist, **{name: other(name) for name in names}),
    ):
        yield traffic


def forward(problem: Problem, plan: rf.Plan) -> None:
    with torch.no_grad():
        rf.flex_attention(problem.q, problem.k, problem.v, problem.score, plan, enable_gqa=True)


def traffic_on_rank(
    group: dist.ProcessGroup, case: Case, combinations: list[tuple[str, str]]
) -> list[str]:
    """Differences between the statistics, the counter and the watch; none are expected."""
    problem = case.build()
    shape = {
        "batch": case.B,
        "kv_heads": case.Hkv,
        "head_dim": case.D,
        "v_head_dim": case.Dv,
        "dtype": case.dtype,
    }
    wrong = []
    for layout, strategy in combinations:
        plan = rf.plan(
            problem.mask, case.seq_len, group, B=case.B, H=case.Hq,
            layout=layout, strategy=strategy, block_size=case.block_size,
            machine=rf.Machine(at_once=0),
        )  # fmt: skip
        local = problem.shard(plan)
        comm = plan.comm
        assert comm is not None
        for backward in (False, True):
            sent, received = comm.bytes_sent, comm.bytes_received
            with watched() as traffic:
                if backward:
                    attend(local, plan)
                else:
                    forward(local, plan)
            stats = (
                plan.stats.bytes_sent(**shape, backward=backward),
                plan.stats.bytes_received(**shape, backward=backward),
            )
            counted = (comm.bytes_sent - sent, comm.bytes_received - received)
            seen = (traffic.sent, traffic.received)
            if not stats == counted == seen:
                wrong.append(f"{layout} {strategy} {backward=}: {stats=} {counted=} {seen=}")
            if traffic.others or sum(traffic.gathered) > RECORD:
                wrong.append(f"{layout} {strategy} {backward=}: {traffic}")
    return wrong


@pytest.mark.parametrize("world_size", [3, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16),
        Case(mask="full", Hkv=1, dtype=torch.float32),
        Case(mask="document rows", B=3, dtype=torch.float32),
        Case(mask="prefix rows", B=3, block_size=7),
        Case(mask="tree", score="composed", sinks=True, dtype=torch.bfloat16),
        Case(mask="opposite", seq_len=300),
        Case(mask="last batch element", dtype=torch.float16),
        Case(mask="far corner"),
        Case(mask="nothing"),
        Case(seq_len=1),
    ],
    ids=str,
)
def test_statistics_are_what_is_sent(pool: RankPool, case: Case, world_size: int) -> None:
    every, diagonal = list(product(LAYOUTS, STRATEGIES)), list(zip(LAYOUTS, STRATEGIES))
    combinations = every if world_size == 3 else diagonal
    assert pool.run(traffic_on_rank, world_size, case, combinations) == [[]] * world_size


def peers_on_rank(group: dist.ProcessGroup) -> list[set[int]]:
    found = []
    x = torch.randn(1, 1, 1024, 8)
    for strategy in STRATEGIES:
        mask = rf.causal() & rf.sliding_window(64)
        plan = rf.plan(mask, 1024, group, layout="contiguous", strategy=strategy, block_size=32)
        local = plan.shard(x, 2).requires_grad_()
        with watched() as traffic:
            rf.flex_attention(local, local, local, block_mask=plan).sum().backward()
        found.append(traffic.peers)
    return found


def test_a_window_talks_to_neighbours_only(pool: RankPool) -> None:
    for rank, (ring, direct, gather) in enumerate(pool.run(peers_on_rank, 4)):
        neighbours = {peer for peer in (rank - 1, rank + 1) if 0 <= peer < 4}
        assert ring == direct == neighbours
        assert gather == {0, 1, 2, 3} - {rank}


def planning_on_rank(group: dist.ProcessGroup, seq_len: int, layout: str) -> list[int]:
    with watched() as traffic:
        rf.plan(rf.causal() & rf.sliding_window(4096), seq_len, group, layout=layout)
    assert not (traffic.sent or traffic.received or traffic.others)
    return traffic.gathered


@pytest.mark.parametrize("layout", ["striped", "auto"])
def test_planning_is_a_few_small_collectives(pool: RankPool, layout: str) -> None:
    """Agreement and needs; before these, if layouts are compared, agreement and outlines."""
    for seq_len, most in ((1 << 16, 16_000), (1 << 20, 200_000)):
        gathered = pool.run(planning_on_rank, 4, seq_len, layout)[0]
        assert gathered[::2] == [RECORD] * (2 if layout == "auto" else 1)
        assert len(gathered) == 2 * len(gathered[::2])
        assert sum(gathered) < most


def waiting_on_rank(group: dist.ProcessGroup) -> list[str]:
    """Rank 1 does not come; what rank 0 is told. All ranks, as all must make the groups."""
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=1)) for _ in range(2)]
    said = []
    if dist.get_rank() == 1:
        time.sleep(4)
    if dist.get_rank() != 0:
        return said
    calls = [
        lambda comm: comm.exchange([], [(1, torch.empty(5))], name="K/V", step=3).wait(),
        lambda comm: comm.agree("a plan", b""),
    ]
    for few, call in zip(groups, calls, strict=True):
        try:
            call(Communicator(few))
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_who_waits_in_vain_says_for_what_and_whom(pool: RankPool) -> None:
    of_exchange, of_agreement = pool.run(waiting_on_rank, 8)[0]
    assert of_exchange.startswith("rank 0, step 3: K/V from rank 1 failed: ")
    assert of_agreement.startswith("rank 0: another rank did not come to agree on a plan: ")


@pytest.mark.parametrize(
    ("config", "nccl"),
    [
        ("cpu:gloo", False),
        ("cuda:nccl", True),
        ("cpu:gloo,cuda:nccl", True),
        ("undefined", torch.cuda.is_available()),
    ],
)
def test_a_group_made_without_a_backends_name(config: str, nccl: bool) -> None:
    """torch calls that "undefined"; what it chose stands in the configuration."""
    with patch.object(dist, "get_backend_config", return_value=config):
        with patch.object(dist, "get_backend", return_value="undefined"):
            assert has_nccl(object()) == nccl  # type: ignore[arg-type]


def test_timeouts_are_those_of_the_group_at_hand(tmp_path: Path) -> None:
    """A world that follows another has its name."""
    found = []
    for seconds in (30, 11):
        store = dist.FileStore(str(tmp_path / str(seconds)), 1)
        dist.init_process_group(
            "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=seconds)
        )
        try:
            found.append(timeout_of(dist.group.WORLD))
        finally:
            dist.destroy_process_group()
    assert found == [30, 11]
