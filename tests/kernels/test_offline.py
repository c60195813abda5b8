"""What needs Triton's compiler but no GPU, in processes of their own without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_other_batches_do_not_compile_anew() -> None:
    """20 batches of other documents, prefixes, lengths and biases: one compilation of each."""
    counts = dict(line.split() for line in run("tests/kernels/specialisations.py").splitlines())
    kernels = ("forward_kernel", "row_terms_kernel", "key_kernel", "query_kernel")
    assert counts == dict.fromkeys(kernels, "1")


def test_kernels_compile_within_their_budget() -> None:
    """A few here; `scripts/compile_kernels.py --check` compiles every configuration."""
    text = run("scripts/compile_kernels.py", "--check", "--only", "bfloat16 D64/64 captures")
    assert "15 configurations compiled, 0 failed" in text


def test_generated_mods_compile() -> None:
    assert int(run("tests/kernels/compile_mods.py")) > 60


def test_the_budget_is_for_what_exists() -> None:
    names = run(
        "-c",
        "import sys; sys.path.insert(0, 'scripts'); import compile_kernels as c; "
        "print(*map(str, c.all_configurations()), sep='\\n')",
    ).splitlines()
    budget = json.loads((ROOT / "tests/kernels/spill_budget.json").read_text())
    assert set(budget) <= set(names)
    assert all(spilled > 0 for spilled in budget.values())
