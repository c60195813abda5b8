"""Run by test_offline.py without the interpreter: compiles generated mods for GPUs.

The interpreter takes much that a GPU's compiler refuses. Prints how many functions compiled.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compile_kernels
from attention_cases import MASKS, SCORES, Case
from kernels.arithmetic import arithmetic, half_scores
from kernels.random_scores import EXTENT, HEADS
from ringflex.kernels.contract import Tile
from ringflex.kernels.lowering import lower_mask
from ringflex.kernels.mod_tables import TableSpec, gradient_arguments, table_arguments
from ringflex.kernels.triton_mods import ScoreMod, accumulators, in_32_bits
from ringflex.masks.pointwise import pointwise
from ringflex.masks.trace import trace_mask, trace_score

CPU = torch.device("cpu")


@triton.jit
def mask_kernel(result, tables, mask_mod: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    seen = mask_mod(tl.program_id(0), tl.program_id(1), at[:, None], at[None, :], tables)
    seen = tl.where(seen, 1, tl.zeros([SIZE, SIZE], tl.int32))
    tl.store(result + at[:, None] * SIZE + at[None, :], seen)


@triton.jit
def score_kernel(
    x, tables, into, score_mod: tl.constexpr, score_grad: tl.constexpr, SIZE: tl.constexpr
):
    b, h, at = tl.program_id(0), tl.program_id(1), tl.arange(0, SIZE)
    q_idx, kv_idx = at[:, None], at[None, :]
    places = x + q_idx * SIZE + kv_idx
    s = tl.load(places)
    score = score_mod(s, b, h, q_idx, kv_idx, tables)
    grad = score_grad(s, score, b, h, q_idx, kv_idx, tables, into, 0, 0)
    tl.store(places, score + grad)


def of_mask(fn: Callable[..., Tensor]) -> tuple[Any, ...]:
    traced = trace_mask(fn)
    body = pointwise(traced)
    tables = [in_32_bits(t) for t in body.tables(traced.captures)]
    specs = [TableSpec.of(t) for t in tables]
    function = lower_mask(body, specs).function
    return mask_kernel, (torch.zeros(32 * 32).int(), table_arguments(tables, specs), function, 32)


def of_score(fn: Callable[..., Tensor]) -> tuple[Any, ...]:
    traced = trace_score(fn, torch.float32)
    mod = ScoreMod(traced, CPU, approximate_tanh=False)
    wanted = mod.wanted([c.requires_grad for c in traced.captures])
    into = gradient_arguments(accumulators(mod, wanted))
    functions = mod.function(), mod.gradient(wanted)
    return score_kernel, (torch.zeros(32 * 32), mod.arguments, into, *functions, 32)


def main() -> None:
    case = Case(seq_len=EXTENT, Hq=HEADS, dtype=torch.float32)
    masks = [*arithmetic().values(), *(MASKS[name](case) for name in MASKS)]
    problems = (Case(score=n, seq_len=EXTENT, Hq=HEADS, dtype=torch.float32) for n in SCORES)
    scores = [*half_scores().values(), *(p.build().score for p in problems)]
    launches = [*map(of_mask, masks), *map(of_score, scores)]
    tile = Tile(32, 32, 4, 1)
    for kernel, arguments in launches:
        launch = compile_kernels.Launch(kernel=kernel, arguments=arguments, tile=tile)
        for target in ("sm_90", "gfx942"):
            compile_kernels.compile_for(launch, compile_kernels.TARGETS[target][0])
    print(len(launches))


if __name__ == "__main__":
    main()
