"""A million tokens: milliseconds and kilobytes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# CPU time, so that a busy machine does not fail the test. tracemalloc sees what numpy allocates,
# the peak of the resident set also what torch does.
MEASURE = """
import json, resource, time, tracemalloc
import torch
import ringflex as rf

torch.set_num_threads(1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes


def masks(S):
    ends = torch.rand(S, generator=torch.Generator().manual_seed(0)) < 1 / 3000
    return {
        "causal": rf.causal(),
        "window": rf.sliding_window(4096),
        "documents": rf.causal() & rf.document(ends.cumsum(0)),
    }


found = {}
small = 1 << 17
for mask in masks(small).values():  # what is loaded at the first use is not the mask's
    rf.create_block_mask(mask, None, None, small, small)
for S in (small, 1 << 20):
    for name, mask in masks(S).items():
        before, seconds = peak(), []
        for _ in range(3):
            begin = time.process_time()
            bm = rf.create_block_mask(mask, None, None, S, S)
            seconds.append(time.process_time() - begin)
        resident = peak() - before
        tracemalloc.start()
        rf.create_block_mask(mask, None, None, S, S)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[f"{name} {S}"] = {
            "seconds": min(seconds),
            "resident": resident,
            "traced": traced,
            "rows": bm.q_blocks,
            "full_runs": bm.full.start.size,
            "partial_runs": bm.partial.start.size,
            "full": bm.full.blocks,
            "partial": bm.partial.blocks,
        }
print(json.dumps(found))
"""

SMALL, LARGE = 1 << 17, 1 << 20  # tokens
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_a_million_tokens(measured: dict[str, dict[str, Any]], name: str) -> None:
    found = measured[f"{name} {LARGE}"]
    assert found["seconds"] < 1.0
    assert found["traced"] < 100 * MEGABYTE
    assert found["resident"] < 100 * MEGABYTE
    assert found["rows"] == LARGE // 128


def test_runs_are_linear_in_the_rows(measured: dict[str, dict[str, Any]]) -> None:
    rows = LARGE // 128
    causal, window, documents = (
        measured[f"{name} {LARGE}"] for name in ("causal", "window", "documents")
    )
    assert (causal["full_runs"], causal["partial_runs"]) == (rows - 1, rows)
    assert (causal["full"], causal["partial"]) == (rows * (rows - 1) // 2, rows)
    # A row sees its own block, 31 whole ones before it, and the end of one more.
    assert (window["full_runs"], window["partial_runs"]) == (rows - 1, 2 * rows - 32)
    assert (window["full"], window["partial"]) == (31 * rows - 31 * 32 // 2, 2 * rows - 32)
    # At most the block in which a document begins, its whole blocks, and the row's own block.
    assert documents["full_runs"] <= rows and documents["partial_runs"] <= 3 * rows


def test_time_and_memory_grow_with_the_length_not_its_square(
    measured: dict[str, dict[str, Any]],
) -> None:
    """Eight times the tokens: at most 32 times the work where the square would be 64."""
    for name in ("causal", "window", "documents"):
        small, large = (measured[f"{name} {S}"] for S in (SMALL, LARGE))
        assert large["seconds"] < 32 * max(small["seconds"], 0.002)
        assert large["traced"] < 32 * small["traced"]
