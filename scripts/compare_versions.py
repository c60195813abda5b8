"""Times this checkout's kernels and another's, in turn in one process, on one GPU.

    git worktree add ../before 71c3633
    python scripts/compare_versions.py ../before --masks full causal --dims 64 128
    python scripts/compare_versions.py ../before --passes backward

Between two processes the same kernel differs by up to a tenth, as GPUs get hot; between calls in
turn, in an order that changes, by a percent. Prints a row for each problem of `bench_kernels.py`:
milliseconds of both, and how many times as fast this checkout is; and how far their results are
apart, relative to the other's norm. Writes JSON to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from commit import current_commit

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ringflex"
_FILLER = 8192  # rows of products that keep the GPU busy while the host is ahead
PASSES = ("forward", "backward", "both")
Run = Callable[[], list[Tensor]]


class Version:
    """The package of a checkout, beside that of others.

    Attributes:
        package: the module. Call its functions inside `in_use`: some import others when called.
    """

    def __init__(self, checkout: Path) -> None:
        if not (checkout / PACKAGE / "__init__.py").exists():
            raise ValueError(f"{checkout} is no checkout of {PACKAGE}")
        self._modules: dict[str, ModuleType] = {}
        sys.path.insert(0, str(checkout))
        try:
            with self.in_use():
                self.package = importlib.import_module(PACKAGE)
        finally:
            sys.path.remove(str(checkout))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Its modules are those that `import` finds."""
        others = _taken_out()
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            self._modules = _taken_out()
            sys.modules.update(others)


def _taken_out() -> dict[str, ModuleType]:
    """The package's modules, no longer in `sys.modules`."""
    names = [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]
    return {name: sys.modules.pop(name) for name in names}


def take_turns(
    runs: dict[str, Run], begin: Callable[[], object], mark: Callable[[], Any], seconds: float
) -> dict[str, list[Any]]:
    """Calls all runs in turn, in shuffled order, for some seconds.

    Args:
        begin: called before each round.

    Returns:
        By run: what `mark` returned before and after each call, in pairs.
    """
    marks: dict[str, list[Any]] = {name: [] for name in runs}
    order, shuffled = list(runs), random.Random(0)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        shuffled.shuffle(order)
        begin()
        for name in order:
            before = mark()
            runs[name]()
            marks[name].append((before, mark()))
    return marks


def attention(
    version: Version, mask_mod: Any, score_mod: Any, tensors: tuple[Tensor, ...], passes: str
) -> Run:
    """A call of a version's `flex_attention` on q, k, v, of its gradients alone, or of both.

    passes: of `PASSES`. tensors: q, k, v, dout.
    """
    (*leaves, dout), rf = tensors, version.package
    S = dout.shape[2]
    with version.in_use():
        mask = mask_mod and rf.create_block_mask(mask_mod, None, None, S, S, device=dout.device)

    def forward() -> Tensor:
        with version.in_use(), torch.set_grad_enabled(passes != "forward"):
            found: Tensor = rf.flex_attention(*leaves, score_mod, mask, enable_gqa=True)
            return found

    def backward(out: Tensor) -> list[Tensor]:
        with version.in_use():
            return list(torch.autograd.grad(out, leaves, dout, retain_graph=passes == "backward"))

    if passes == "forward":
        return lambda: [forward()]
    if passes == "backward":
        return functools.partial(backward, forward())

    def both() -> list[Tensor]:
        out = forward()
        return [out, *backward(out)]

    return both


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance of a result from what is expected, relative to its norm."""
    distances = (
        ((x.float() - y.float()).norm() / y.float().norm()).item()
        for x, y in zip(found, expected, strict=True)
    )
    return max(distances)


def main() -> None:
    import triton

    from bench_kernels import MASKS, Spec, inputs, problem

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384])
    parser.add_argument("--dims", nargs="+", type=int, default=[128])
    parser.add_argument("--passes", choices=PASSES, default="forward")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each problem")
    parser.add_argument(
        "--commits", nargs=2, metavar=("BEFORE", "NOW"), help="where git cannot tell them"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/versions.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("compare_versions.py needs a GPU")
    versions = {"before": Version(arguments.before), "now": Version(ROOT)}
    commits = arguments.commits or map(current_commit, (arguments.before, ROOT))
    record: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": " ".join(["python", "scripts/compare_versions.py", *sys.argv[1:]]),
        "commits": dict(zip(versions, commits, strict=True)),
        "rows": [],
    }
    filler = torch.randn(_FILLER, _FILLER, device="cuda", dtype=torch.bfloat16)

    def begin() -> None:
        torch.cuda.synchronize()
        for _ in range(4):
            filler @ filler

    def mark() -> torch.cuda.Event:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    kinds = itertools.product(arguments.dims, arguments.lengths, arguments.masks)
    for dim, tokens, mask in kinds:
        spec = Spec(mask=mask, tokens=tokens, heads=32, kv_heads=8, dim=dim)
        p, tensors = problem(spec), inputs(spec)
        runs = {
            name: attention(version, p.mask_mod, p.score_mod, tensors, arguments.passes)
            for name, version in versions.items()
        }
        results = {name: run() for name, run in runs.items()}  # compiles
        difference = apart(results.pop("now"), results.pop("before"))
        marks = take_turns(runs, begin, mark, arguments.seconds)
        torch.cuda.synchronize()
        ms = {n: statistics.median(a.elapsed_time(b) for a, b in x) for n, x in marks.items()}
        row = {**asdict(spec), "passes": arguments.passes, **ms, "apart": difference}
        record["rows"].append(row | {"times_as_fast": ms["before"] / ms["now"]})
        print(
            f"{spec}: {ms['before']:.3f} ms before, {ms['now']:.3f} ms now, "
            f"{ms['before'] / ms['now']:.3f} times as fast; {difference:.1e} apart",
            flush=True,
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
