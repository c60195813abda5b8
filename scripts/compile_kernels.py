"""Compiles the Triton kernels for GPUs that are not here, and reports registers and spills.

    python scripts/compile_kernels.py                  # every configuration, a table
    python scripts/compile_kernels.py --check          # fail on spills above the recorded budget
                                                       # and on faults (machine_code.py)
    python scripts/compile_kernels.py --record         # record the budget anew

The launches are those that the library makes: its own code runs on small tensors, and what it would
launch is compiled instead, for each target in turn. Needs no GPU; NVIDIA's assembler comes with
Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

import ringflex as rf
from machine_code import disassembled, repeated_additions, unset_registers
from ringflex.kernels import hopper_kernel, triton_kernel, triton_setup
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_tiles import Architecture
from ringflex.masks.trace import trace_score

BUDGET = Path(__file__).parents[1] / "tests" / "kernels" / "spill_budget.json"

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Architecture("cuda", (8, 0), 166_912)),
    "sm_90": (GPUTarget("cuda", 90, 32), Architecture("cuda", (9, 0), 232_448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Architecture("cuda", (10, 0), 232_448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Architecture("hip", (9, 4), 65_536)),
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: a kind of launch, for one target.

    Attributes:
        kernel: forward, merge (with a result before), key, query, one_pass, row_terms; staged and
            staged_query: the forward and dQ of one step of several. Those for Hopper:
            hopper_forward, hopper_merge, hopper_more (a forward with K/V in two pairs of tensors),
            hopper_staged, hopper_staged_sinks, hopper_staged_more, hopper_backward, hopper_apart (a
            backward with the heads of a group apart).
        mods: "none" (a causal mask), "full" (nor that), "documents" (and causal), "score"
            (softcap), "captures" (documents and ALiBi with gradients), "positions" (biases by
            query and by key, with gradients).
    """

    target: str
    kernel: str
    dtype: torch.dtype
    D: int
    Dv: int
    mods: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.target} {self.kernel} {dtype} D{self.D}/{self.Dv} {self.mods}"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the library would launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    tile: Tile


def configurations() -> Iterator[Configuration]:
    base = Configuration(target="", kernel="", dtype=torch.bfloat16, D=128, Dv=128, mods="none")
    for target in TARGETS:
        for D, Dv in ((16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
            common = D in (64, 128)
            for kernel in ("forward", "key", "query"):
                for mods in ("none", "score", "captures") if common else ("none",):
                    yield replace(base, target=target, kernel=kernel, D=D, Dv=Dv, mods=mods)
            if common:  # another tile
                yield replace(base, target=target, kernel="forward", D=D, Dv=Dv, mods="documents")
        for kernel in ("merge", "one_pass", "row_terms"):
            yield replace(base, target=target, kernel=kernel, mods="none")
        for kernel in ("query", "one_pass"):
            yield replace(base, target=target, kernel=kernel, mods="positions")
        for D in (64, 128, 256):
            for kernel in ("staged", "staged_query"):
                yield replace(base, target=target, kernel=kernel, D=D, Dv=D)
        for kernel in ("forward", "key", "query"):
            yield replace(base, target=target, kernel=kernel, dtype=torch.float16)
            for D in (64, 128, 256):
                yield replace(base, target=target, kernel=kernel, dtype=torch.float32, D=D, Dv=D)


def hopper_configurations() -> Iterator[Configuration]:
    base = Configuration(target="sm_90", kernel="", dtype=torch.bfloat16, D=128, Dv=128, mods="")
    for D in (64, 128):
        for kernel in ("hopper_forward", "hopper_backward"):
            common = ("documents", "score") if D == 128 else ()
            for mods in ("full", "none", "captures", *common):
                yield replace(base, kernel=kernel, D=D, Dv=D, mods=mods)
        for mods in ("none", "captures"):
            yield replace(base, kernel="hopper_apart", D=D, Dv=D, mods=mods)
    yield replace(base, kernel="hopper_backward", mods="positions")
    for kind in ("merge", "more", "staged", "staged_sinks", "staged_more"):
        yield replace(base, kernel=f"hopper_{kind}", mods="none")
    for D, Dv in ((80, 80), (192, 128), (256, 256)):
        yield replace(base, kernel="hopper_forward", D=D, Dv=Dv, mods="none")
    for D, Dv in ((16, 16), (128, 64)):
        yield replace(base, kernel="hopper_backward", D=D, Dv=Dv, mods="none", dtype=torch.float16)


def all_configurations() -> Iterator[Configuration]:
    yield from configurations()
    yield from hopper_configurations()


def launch_of(c: Configuration) -> Launch:
    """The launch that the library makes for a configuration."""
    S, Hq, Hkv = 256, 2, 1
    make = lambda H, D: torch.zeros(1, H, S, D, dtype=c.dtype)
    q, k, v, dout = make(Hq, c.D), make(Hkv, c.D), make(Hkv, c.Dv), make(Hq, c.Dv)
    mask, score = rf.full() if c.mods == "full" else rf.causal(), None
    slopes = torch.ones(Hq, requires_grad=True)
    by_q, by_kv = (torch.ones(S, requires_grad=True) for _ in range(2))
    if c.mods == "score":
        score = trace_score(rf.softcap(20.0), torch.float32)
    if c.mods in ("documents", "captures"):
        mask &= rf.document(torch.arange(S) // 100)
    if c.mods == "captures":
        score = trace_score(rf.alibi(slopes), torch.float32)
    if c.mods == "positions":
        score = trace_score(lambda s, b, h, q, kv: s + by_q[q] + by_kv[kv], torch.float32)
    more = (k, v) if c.kernel.endswith("more") else None
    block_mask = rf.create_block_mask(mask, None, None, S, 2 * S if more else S)
    options = KernelOptions(backward="one_pass" if c.kernel == "one_pass" else "auto")
    found: list[Launch] = []

    class Recorded(Prepared):
        def __call__(self, *varying: Any) -> None:
            arguments = (*varying, *self._rest)
            found.append(Launch(kernel=self._kernel, arguments=arguments, tile=self.tile))

    where = lambda _: TARGETS[c.target][1]
    even = 2.0 if c.kernel == "hopper_apart" else 0.0  # so that heads are apart
    hopper = c.kernel.startswith("hopper")
    kind = c.kernel.removeprefix("hopper_")
    module = hopper_kernel if hopper else triton_kernel
    with (
        mock.patch.object(triton_kernel, "Prepared", Recorded),
        mock.patch.object(hopper_kernel, "Prepared", Recorded),
        mock.patch.object(triton_setup, "architecture", where),
        mock.patch.object(hopper_kernel, "_EVEN", even),
    ):
        out, lse = torch.zeros(1, Hq, S, c.Dv, dtype=c.dtype), torch.zeros(1, Hq, S)
        stage = None
        if kind.startswith("staged"):
            turns = np.ones((1, 1, block_mask.q_blocks), dtype=np.int32)
            stage = Stage(turns=turns, block_size=block_mask.block_size[0])
        if kind in ("forward", "merge", "more", "staged", "staged_sinks", "staged_more"):
            earlier = Partial(out.float(), lse.double())
            before = {"merge": earlier, "staged_sinks": Partial(None, lse)}.get(kind)
            module.forward(
                q, k, v, block_mask, score, 0.1, before, Partial(out, lse), options, stage,
                earlier, more=more,
            )  # fmt: skip
            return found[0]
        apart = module.has_separate_passes(q, v, options, False)
        terms = module.row_terms(dout, out, lse, None, q, block_mask, score, 0.1, options, apart)
        if c.kernel == "row_terms":
            return found[0]
        gradients = Gradients(
            dq=torch.zeros_like(q), dk=torch.zeros_like(k), dv=torch.zeros_like(v),
            dcaptures=[] if score is None else [torch.zeros_like(x) for x in score.captures],
            stage=stage, running_q=None if stage is None else q.float(),
        )  # fmt: skip
        module.backward(dout, q, k, v, terms, block_mask, score, 0.1, gradients, options)
    wanted = "query_kernel" if c.kernel.endswith("query") else "key_kernel"
    wanted = "hopper_backward_kernel" if hopper else wanted
    return next(launch for launch in found if launch.kernel.__name__ == wanted)


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """The launch's kernel as Triton compiles it for `target`."""
    backend = make_backend(target)
    fn = launch.kernel
    options = {"num_warps": launch.tile.num_warps, "sanitize_overflow": False}
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, given = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = fn._pack_args(
        backend, options, bound, specialization, given
    )
    kind = GluonASTSource if fn.is_gluon() else ASTSource
    source = kind(fn, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def report(c: Configuration) -> dict[str, Any]:
    """Registers per thread, bytes spilled per thread, bytes of shared memory."""
    target, where = TARGETS[c.target]
    launch = launch_of(c)
    row: dict[str, Any] = {"tile": "x".join(map(str, launch.tile[:2]))}
    row["tile"] += f" w{launch.tile.num_warps} s{launch.tile.num_stages}"
    compiled = compile_for(launch, target)
    if target.backend == "cuda":
        row |= _ptxas(compiled.asm["ptx"], target.arch)
        repeated = repeated_additions(compiled.asm["ptx"])
        unset = []
        if c.target == "sm_90":
            cuobjdump = triton.knobs.nvidia.cuobjdump.path
            unset = unset_registers(disassembled(compiled.asm["cubin"], cuobjdump))
        if repeated or unset:
            row["fault"] = f"{repeated} repeated additions, unset registers in {unset[:1]}"
    else:
        text = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))  # type: ignore
        row |= {"registers": number("vgpr_count"), "spilled": 4 * number("vgpr_spill_count")}
    row["shared"] = compiled.metadata.shared
    row["fits"] = compiled.metadata.shared <= where.shared_memory
    return row


def _ptxas(ptx: str, arch: int) -> dict[str, Any]:
    name = re.search(r"\.target (\S+)", ptx).group(1).rstrip(",")  # type: ignore[union-attr]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spills is not None and registers is not None, text
    row = {"registers": int(registers.group(1)), "spilled": int(spills.group(1))}
    if "wgmma.mma_async instructions are serialized" in text:
        row["serialized"] = True
    return row


def _attempt(c: Configuration) -> dict[str, Any]:
    try:
        return report(c)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--check", action="store_true", help="fail on more spills than recorded")
    parser.add_argument("--record", action="store_true", help="record today's spills as the budget")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [c for c in all_configurations() if arguments.only in str(c)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = dict(zip(map(str, chosen), pool.map(_attempt, chosen), strict=True))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    failed = []
    for name, row in rows.items():
        problem = row.get("error", "")
        if not problem and not row["fits"]:
            problem = "more shared memory than the device has"
        problem = problem or row.get("fault", "")
        if not problem and arguments.check and row["spilled"] > budget.get(name, 0):
            problem = f"budget is {budget.get(name, 0)} bytes"
        failed += [name] if problem else []
        text = " ".join(f"{k}={v}" for k, v in row.items() if k not in ("error", "fault", "fits"))
        print(f"{name}: {text}{'  <-- ' + problem if problem else ''}")
    if arguments.record:
        if failed:
            sys.exit(f"nothing is recorded: {len(failed)} configurations failed")
        budget |= {name: row["spilled"] for name, row in rows.items()}
        everything = set(map(str, all_configurations()))
        kept = {name: n for name, n in sorted(budget.items()) if n and name in everything}
        BUDGET.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{len(rows)} configurations compiled, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
