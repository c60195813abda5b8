"""Two versions of the package in one process."""

import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ringflex as rf

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from compare_versions import PASSES, ROOT, Version, apart, attention, take_turns

CAUSAL = "lambda b, h, q_idx, kv_idx: kv_idx <= q_idx"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkout in which causal attention sees one key more."""
    shutil.copytree(ROOT / "ringflex", tmp_path / "ringflex")
    mods = tmp_path / "ringflex" / "masks" / "mods.py"
    text = mods.read_text()
    assert text.count(CAUSAL) == 1
    mods.write_text(text.replace(CAUSAL, f"{CAUSAL} + 1"))
    return tmp_path


@pytest.mark.parametrize("passes", PASSES)
def test_each_version_runs_its_own_code(passes: str, other: Path) -> None:
    before = {n: m for n, m in sys.modules.items() if n.startswith("ringflex")}
    tensors = [torch.randn(1, 2, 64, 8, dtype=torch.float64) for _ in range(4)]
    tensors = (*(x.requires_grad_() for x in tensors[:3]), tensors[3])
    versions = {0: Version(ROOT), 1: Version(other)}
    runs = {}
    for more, version in versions.items():
        assert version.package is not rf
        runs[more] = attention(version, version.package.causal(), None, tensors, passes)
    for more, run in [*runs.items(), *runs.items()]:  # each after the other
        mask = rf.create_block_mask(lambda b, h, q, kv, n=more: kv <= q + n, None, None, 64, 64)
        out = rf.flex_attention(*tensors[:3], block_mask=mask)
        gradients = torch.autograd.grad(out, tensors[:3], tensors[3])
        expected = {"forward": [out], "backward": gradients, "both": [out, *gradients]}[passes]
        assert apart(run(), expected) < 1e-6
        assert apart(runs[1 - more](), expected) > 1e-3
    assert before == {n: m for n, m in sys.modules.items() if n.startswith("ringflex")}


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkout"):
        Version(tmp_path)


def test_runs_take_turns() -> None:
    calls: list[str] = []
    numbers = itertools.count()
    runs = {name: lambda name=name: calls.append(name) or [] for name in "ab"}
    begun = []
    marks = take_turns(runs, lambda: begun.append(len(calls)), lambda: next(numbers), 0.01)
    assert begun == list(range(0, len(calls), 2))
    assert len(marks["a"]) == len(marks["b"]) > 1
    assert {"".join(pair) for pair in zip(calls[::2], calls[1::2], strict=True)} == {"ab", "ba"}
    assert sorted(n for pairs in marks.values() for pair in pairs for n in pair) == list(
        range(4 * len(marks["a"]))
    )
