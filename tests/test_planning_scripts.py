"""scripts/simulate.py and scripts/bench_plan.py, whole runs of small problems."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="scripts/simulate.py draws its results")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_simulate_predicts_and_draws(tmp_path: Path) -> None:
    output, trace = tmp_path / "found.json", tmp_path / "trace.json"
    printed = run(
        "simulate.py", "--masks", "causal", "documents", "--gpus", "2", "3",
        "--tokens-per-gpu", "1024", "--layouts", "contiguous", "auto",
        "--strategies", "direct", "all_gather", "--near", "1e9", "--gpus-per-node", "2",
        "--output", str(output), "--trace", str(trace),
    )  # fmt: skip
    record = json.loads(output.read_text())
    assert record["machine"]["near"] == 1e9
    rows = record["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert (
        sum(line.startswith(("| causal |", "| documents |")) for line in printed.splitlines()) == 16
    )
    for row in rows:
        assert row["tokens"] == 1024 * row["gpus"]
        assert 0 < row["efficiency"] <= 1
        assert 0 < row["forward_ms"] < row["both_ms"]
        assert row["imbalance"] >= 1
    by = {(r["mask"], r["gpus"], r["layout"], r["strategy"]): r for r in rows}
    everything, needed = (by["documents", 3, "contiguous", s] for s in ("all_gather", "direct"))
    assert needed["bytes_received"] < everything["bytes_received"]
    assert output.with_suffix(".png").stat().st_size > 5000
    assert trace.with_suffix(".png").stat().st_size > 5000
    events = json.loads(trace.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {e["pid"] for e in events} == {0, 1, 2}


@pytest.mark.parametrize("contender", ["contiguous", "auto", "torch"])
def test_bench_plan_measures(contender: str) -> None:
    row = json.loads(run("bench_plan.py", "--one", "4096", "4", contender).splitlines()[-1])
    assert row["contender"] == contender
    assert 0 < row["ms"] < 60_000
    assert row["peak_mib"] >= 0
    if contender != "torch":
        assert row["steps"] >= 1
        assert 0 < row["told_bytes"] < 10_000
