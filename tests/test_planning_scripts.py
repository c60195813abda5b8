"""scripts/simulate.py and scripts/bench_plan.py, whole runs of small problems."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import ringflex as rf

pytest.importorskip("matplotlib", reason="scripts/simulate.py draws its results")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from calibrate import beyond  # noqa: E402


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


# What torch.compile needs on a CPU.
COMPILES = shutil.which("g++") and (Path(sysconfig.get_path("include")) / "Python.h").exists()
COMPILED = pytest.param(
    "torch-cp",
    marks=pytest.mark.skipif(not COMPILES, reason="needs a C++ compiler and Python's headers"),
)


@pytest.mark.parametrize("contender", ["contiguous", "auto", "torch", COMPILED])
def test_bench_plan_measures(contender: str) -> None:
    row = json.loads(run("bench_plan.py", "--one", "4096", "4", contender).splitlines()[-1])
    assert row["contender"] == contender
    assert 0 < row["ms"] < 60_000
    assert row["peak_mib"] >= 0
    if not contender.startswith("torch"):
        assert row["steps"] >= 1
        assert 0 < row["told_bytes"] < 10_000


def test_a_machine_is_calibrated(tmp_path: Path) -> None:
    """Two processes of this machine; what they wrote is what simulate.py then takes."""
    output = tmp_path / "machine.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(SCRIPTS / "calibrate.py"), "--tokens", "1024", "--heads", "2"]
    command += ["--kv-heads", "1", "--dim", "16", "--megabytes", "16", "--seconds", "0.05"]
    command += ["--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(output.read_text())
    measured = {"forward", "backward", "launch", "gpus_per_node", "near", "latency", "one_pass"}
    assert set(written["measured"]) == measured
    machine = rf.Machine.load(output)
    assert machine.gpus_per_node == 2
    assert machine.far == rf.Machine().far  # one node
    assert 1e6 < machine.near < 1e12 and 0 < machine.latency < 1 and 0 < machine.launch < 1
    assert 1e6 < machine.forward < 1e13 and 1e6 < machine.backward < 1e13
    found = tmp_path / "simulated.json"
    run(
        "simulate.py", "--machine", str(output), "--far", "1e9", "--masks", "causal", "--gpus", "2",
        "--tokens-per-gpu", "1024", "--output", str(found),
    )  # fmt: skip
    assert json.loads(found.read_text())["machine"] == {**written["machine"], "far": 1e9}


def test_no_rate_follows_from_times_that_hardly_differ() -> None:
    assert beyond(1e-3, 3e-3, "--tokens") == pytest.approx(2e-3)
    with pytest.raises(SystemExit, match="larger --megabytes"):
        beyond(1e-3, 1.1e-3, "--megabytes")


@pytest.mark.parametrize("text", ["[]", '{"machine": {"speed": 1}}', '{"machine": {"near": 0}}'])
def test_a_file_that_is_no_machine_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wanted|near must be positive"):
        rf.Machine.load(path)


def test_predictions_are_compared_with_what_was_measured(tmp_path: Path) -> None:
    """A machine with no launch times and the record's rates needs what the record says."""
    common = {
        "mask": "causal", "tokens": 2048, "gpus": 2, "heads": 4, "kv_heads": 2, "dim": 64,
        "dtype": "bfloat16", "forward": 1000.0, "both": 3500.0, "one_forward": 2000.0,
        "one_both": 7000.0,
    }  # fmt: skip
    names = ("ringflex direct, zigzag", "ringflex ring", "torch flex, all-gather")
    rows = [common | {"contender": name} for name in names]
    rows.append({"mask": "causal", "contender": "ringflex ring", "error": "OutOfMemoryError"})
    record, output = tmp_path / "parallel.json", tmp_path / "predictions.json"
    record.write_text(json.dumps({"machine": "an abacus", "rows": rows}))
    printed = run("check_predictions.py", str(record), "--near", "1e12", "--output", str(output))
    found = json.loads(output.read_text())
    assert found["measured_on"] == "an abacus"
    assert [r["contender"] for r in found["rows"]] == list(names[:2])
    for r in found["rows"]:
        for way in ("forward", "both"):
            assert r[f"predicted_{way}"] == pytest.approx(r[way], rel=1e-3)
    assert "| causal, 2,048 | 2 | ringflex ring | 1,000.00 / 3,500.00 |" in printed
