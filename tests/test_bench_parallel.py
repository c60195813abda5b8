"""scripts/bench_parallel.py: its problems, its stub that transfers nothing, and whole runs; and
bench_ranks.py, which measures ranks by that."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="scripts/bench_parallel.py draws its results")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_ranks  # noqa: E402
import parallel_measure as measuring  # noqa: E402
import problems  # noqa: E402
import ringflex as rf  # noqa: E402
from bench_longest import longest  # noqa: E402
from parallel_peers import GatherZigzag, zigzag_positions  # noqa: E402
from parallel_plots import ORDER, plot_all  # noqa: E402
from parallel_report import table  # noqa: E402
from parallel_trace import write_trace  # noqa: E402

CPU = torch.device("cpu")
ALONE = measuring.World(rank=0, size=1, device=CPU, control=None)


def spec(mask: str, tokens: int) -> measuring.Spec:
    return measuring.Spec(
        mask=mask, tokens=tokens, heads=2, kv_heads=1, dim=16, dtype=torch.float32
    )


# The problems


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("name", [*measuring.MASKS, "prefix", "alibi", "softcap"])
def test_pairs_are_what_the_mask_shows(name, shrink):
    p = problems.problem(name, 5000, CPU, shrink=shrink)
    block_mask = rf.create_block_mask(p.mask_mod or rf.full(), None, None, 5000, 5000)
    assert int(block_mask.to_dense().sum()) == p.pairs
    if name == "window":
        assert block_mask.to_dense()[0, 0, -1].sum() == (1250 if shrink else 4096)


@pytest.mark.parametrize("mask", measuring.MASKS)
def test_problems_of_several_gpus_have_a_mask(mask):
    p = measuring.problem(spec(mask, 700), CPU)
    block_mask = rf.create_block_mask(p.mask_mod, None, None, 700, 700)
    assert int(block_mask.to_dense().sum()) == p.pairs


def test_a_problem_that_does_not_exist():
    with pytest.raises(ValueError, match="'windows'"):
        problems.problem("windows", 100, CPU)


def test_mixed_documents_follow_the_table():
    lengths = problems.document_lengths("mixed", 2**17)
    shares = torch.histogram(
        lengths.double(), torch.tensor([0, *problems._ENDS], dtype=torch.float64) + 0.5
    ).hist
    wanted = torch.tensor(problems._SHARES, dtype=torch.float64)
    wanted[-2:] = torch.tensor([wanted[-2:].sum(), 0.0])  # capped at a quarter of the total: 32,768
    assert lengths.max() == 2**15
    assert torch.allclose(shares / shares.sum() * 100, wanted, atol=0.5)


def test_every_rank_gets_its_part_of_one_problem():
    whole, part = (
        measuring.inputs(
            spec("causal", 64), CPU, measuring.Contender(name="", run=max, positions=positions)
        )
        for positions in (None, torch.tensor([5, 60]))
    )
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[:, :, [5, 60]], y)


# The measurements


def test_the_silent_plan_computes_all_steps_without_a_group():
    plan = measuring.silent(rf.plan_all(rf.causal(), 512, 2, strategy="ring")[0], ALONE)
    q, k, v = (torch.randn(1, h, 256, 16).requires_grad_() for h in (2, 1, 1))
    out = rf.flex_attention(q, k, v, block_mask=plan, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert [g.shape for g in (out, *grads)] == [x.shape for x in (q, q, k, v)]


def test_a_silent_plan_receives_noise():
    comm = measuring.silent(rf.plan_all(rf.causal(), 512, 2)[0], ALONE).comm
    kv, gradient = torch.zeros(1 << 25, dtype=torch.bfloat16), torch.zeros(2, 70_000)
    comm.exchange([], [(1, kv), (1, gradient)], name="K/V and dK/dV", step=1).wait()
    for x in (kv, gradient):
        assert x.float().std() == pytest.approx(1, abs=0.01)


def test_contenders_take_turns_of_several_calls_there_and_back():
    calls: list[str] = []

    def case(name: str, milliseconds: float) -> measuring.Case:
        def run(q, k, v):
            calls.append(name)
            time.sleep(milliseconds / 1e3)
            return q + k + v

        tensors = *(torch.zeros(2, requires_grad=True) for _ in range(3)), torch.ones(2)
        return measuring.Contender(name=name, run=run), tensors

    inspected: list[Any] = []
    cases = [case("slow", 10), case("fast", 1)]
    slow, fast = measuring.measure_in_turn(ALONE, cases, 1.0, inspected.extend)
    turns = [(name, len(list(several))) for name, several in itertools.groupby(calls)]
    # What each needs at first, then five turns of each: at most a second of the first's.
    once = [("slow", 1), ("fast", 1)] * 2
    n = slow["calls"]
    there_and_back = [("slow", n), *[("fast", 2 * n), ("slow", 2 * n)] * 2, ("fast", n)]
    assert turns == once + there_and_back
    assert 2 <= n == fast["calls"] <= 20
    assert slow["turns"] == fast["turns"] == 5
    assert 10 <= slow["forward"] <= slow["both"]
    assert 1 <= fast["forward"] < slow["forward"]
    assert len(inspected) == 4


def test_a_wrong_result_differs():
    results = [torch.randn(1, h, 64, 16) for h in (2, 2, 1, 1)]
    sample = measuring.Sample.of(results)
    positions = torch.tensor([*range(40, 64), *range(40)])
    contender = measuring.Contender(name="", run=max, positions=positions)
    local = [x[:, :, positions] for x in results]
    assert sample.difference(ALONE, contender, local) == 0
    for i in range(4):
        wrong = [x * (1.1 if i == j else 1.0) for j, x in enumerate(local)]
        assert sample.difference(ALONE, contender, wrong) == pytest.approx(0.1, rel=1e-4)
    assert sample.difference(ALONE, contender, results) > 0.5  # the order of another layout


def _gather(group: Any) -> bool:
    """Whether K and the gradients of all ranks come together in global order."""
    world = measuring.World(rank=group.rank(), size=group.size(), device=CPU, control=None)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1, 2, 32, 4, generator=generator)
    upstream = torch.randn(group.size(), 1, 2, 32, 4, generator=generator)
    positions = zigzag_positions(world, 32)
    mine = whole[:, :, positions].requires_grad_()
    gathered = GatherZigzag.apply(mine, group.size())
    (grad,) = torch.autograd.grad(gathered, mine, upstream[world.rank])
    wanted = upstream.sum(0)[:, :, positions]
    return torch.equal(gathered, whole) and torch.allclose(grad, wanted, atol=1e-6)


def test_the_peers_gather_keeps_the_global_order(pool):
    assert pool.run(_gather, 8) == [True] * 8  # on the default group: all ranks of the pool


# Tables and pictures


def made_up_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for mask in ORDER:
        for tokens in (16384, 65536):
            common = {
                "mask": mask, "tokens": tokens, "heads": 32, "kv_heads": 8, "dim": 128, "gpus": 2,
                "pairs": tokens**2 // 2, "one_forward": tokens / 1e3, "one_both": tokens / 300,
            }  # fmt: skip
            for i, name in enumerate(("ringflex ring", "torch flex, all-gather", "a stranger")):
                row = {"forward": 1.0, "both": 4.0, "forward_tflops": 400.0 - i, "peak": 2**30}
                row |= {"both_tflops": 300.0, "exposed_forward": 0.1, "exposed_both": 0.25}
                row |= {"forward_efficiency": 0.9, "both_efficiency": 0.8}
                if i == 0:
                    row |= {"bytes_received": 2**20, "skipped": 0.5, "imbalance": 1.25}
                rows.append({**common, **row, "contender": name})
            rows.append({**common, "contender": "broken", "error": "ImportError: no | such thing"})
    return rows


def test_table_has_a_line_for_every_row():
    header, rule, *lines = table(made_up_rows()).splitlines()
    assert len(lines) == len(made_up_rows())
    assert {line.count("|") for line in (header, rule, *lines)} == {14}
    assert lines[0].startswith(
        "| causal, 16,384 | 2 | ringflex ring | 1.00 / 4.00 | 400 / 300 | 0.900 / 0.800 "
        "| 0.10 / 0.25 | - / - | 1.0 | 50.0% | 1.25 | 1,024 |"
    )
    assert "ImportError: no / such thing" in lines[3]


@pytest.mark.parametrize("rows", [made_up_rows(), []], ids=["rows", "no rows"])
def test_plots_are_drawn(tmp_path, rows):
    plot_all(rows, tmp_path / "parallel.json")
    for name in ("speed", "bytes", "memory"):
        assert (tmp_path / f"parallel-{name}.png").stat().st_size > 3000
    assert not (tmp_path / "parallel-scaling.png").exists()


def test_scaling_is_drawn_of_several_numbers_of_gpus(tmp_path):
    rows = made_up_rows()
    rows += [{**row, "gpus": 4} for row in rows]
    plot_all(rows, tmp_path / "parallel.json")
    assert (tmp_path / "parallel-scaling.png").stat().st_size > 3000


def test_trace_is_for_perfetto(tmp_path):
    span = {"track": "transfer", "name": "K/V", "step": 1, "start": 0.001, "end": 0.003}
    write_trace([[span], [span | {"track": "compute"}]], "title", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    first, second = (e for e in events if e["ph"] == "X")
    assert (first["pid"], first["tid"], second["pid"], second["tid"]) == (0, 2, 1, 0)
    assert (first["ts"], first["dur"]) == (pytest.approx(1000), pytest.approx(2000))  # microseconds
    assert (tmp_path / "trace.png").stat().st_size > 3000


# Whole runs


def launch(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPTS / "bench_parallel.py"), "--device", "cpu"]
    command += ["--heads", "2", "--kv-heads", "1", "--dim", "16", "--lengths", "600"]
    command += ["--masks", "documents", "--seconds", "0.02", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=140)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its ranks
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} ran past 140 s:\n{output}")
    assert process.returncode == 0, output
    return output


def test_two_ranks_measure_and_merge(tmp_path):
    output = tmp_path / "parallel.json"
    shared = ("--output", str(output), "--commit", "abc")
    trace = ("--trace", str(tmp_path / "trace.json"))
    launch("--strategies", "ring", "--check", *trace, *shared)
    others = ("--strategies", "all_gather", "hierarchical", "auto", "--gpus-per-node", "1")
    printed = launch(*others, "--check", "--merge", *shared)
    record = json.loads(output.read_text())
    assert [c["commit"] for c in record["commands"]] == ["abc", "abc"]
    assert "--strategies all_gather" in record["commands"][1]["command"]
    assert [c["error"] < 1e-5 for c in record["checks"]] == [True] * 4
    ring, gathered, *_ = record["rows"]
    names = [r["contender"].removeprefix("ringflex ") for r in record["rows"]]
    assert names == ["ring", "all_gather", "hierarchical", "auto"]
    assert [r["strategy"] for r in record["rows"]][:3] == names[:3]
    assert [r["command"] for r in record["rows"]] == [0, 1, 1, 1]
    for row in record["rows"]:
        assert (row["mask"], row["tokens"], row["gpus"]) == ("documents", 600, 2)
        for way in ("forward", "both"):
            assert row[way] > 0
            assert row[f"{way}_efficiency"] == pytest.approx(row[f"one_{way}"] / (2 * row[way]))
            assert isinstance(row[f"exposed_{way}"], float)
        assert row["forward_tflops"] == pytest.approx(
            4 * row["pairs"] * 2 * 16 / 2 / row["forward"] / 1e9
        )
        assert row["difference"] < 1e-5
        assert max(row["bytes_received_by_rank"]) == row["bytes_received"]
    assert gathered["skipped"] == 0
    assert 0 < ring["skipped"] < 1
    assert ring["bytes_received"] < gathered["bytes_received"]
    last_line = printed.rstrip().splitlines()[-1]
    assert last_line.startswith("| documents, 600 | 2 | ringflex auto")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {(e["pid"], e["cat"]) for e in events if e["ph"] == "X"} >= {
        (0, "compute"), (1, "compute"), (0, "transfer"), (1, "transfer"),
    }  # fmt: skip
    for name in ("parallel-speed", "parallel-bytes", "parallel-memory", "trace"):
        assert (tmp_path / f"{name}.png").stat().st_size > 3000


# Ranks on one device


def test_ranks_take_turns_on_one_device(tmp_path, monkeypatch, capsys):
    output = tmp_path / "ranks.json"
    small = "--masks documents --lengths 600 --ranks 2 3 --heads 2 --kv-heads 1 --dim 16"
    asked = f"bench_ranks.py {small} --device cpu --seconds 0.01 --commit abc --output {output}"
    for merge in ([], ["--merge"]):
        monkeypatch.setattr(sys, "argv", [*asked.split(), *merge])
        bench_ranks.main()
    record = json.loads(output.read_text())
    assert [row["ranks"] for row in record["rows"]] == [2, 3, 2, 3]
    assert [row["command"] for row in record["rows"]] == [0, 0, 1, 1]
    assert record["commands"][0] == {"command": f"python scripts/{asked}", "commit": "abc"}
    for row in record["rows"]:
        for way in ("forward", "both"):
            slowest = max(row[f"{way}_by_rank"])
            assert len(row[f"{way}_by_rank"]) == row["ranks"] and slowest > 0
            even = row[f"one_{way}"] / row["ranks"]
            assert row[f"{way}_efficiency"] == pytest.approx(even / slowest)
    assert "documents, 600 over 3: efficiency" in capsys.readouterr().out


# The longest sequence


def test_the_longest_sequence_fills_the_memory():
    memory = 1_000_000
    tried = []

    def peak_at(tokens):
        tried.append(tokens)
        peak = 5_000 + 7 * tokens
        return peak if peak <= memory else None

    tokens = longest(peak_at, 1024, 128, 900_000)
    assert tokens % 128 == 0 and 900_000 - 2 * 7 * 128 < peak_at(tokens) <= 900_000
    assert len(tried) == 4  # twice to learn, once to see, and this test's


def test_a_length_that_does_not_fit_is_shortened():
    peaks = lambda tokens: 10 * tokens if tokens < 8000 else None  # fragments, say
    tokens = longest(peaks, 1000, 100, 85_000)
    assert 7500 <= tokens < 8000
    with pytest.raises(RuntimeError, match="do not fit"):
        longest(lambda tokens: None, 1000, 100, 85_000)
