"""Run by test_offline.py without the interpreter: counts what Triton would compile.

Attention over 20 batches of other documents, prefixes, lengths and biases; prints how many
specialisations of each kernel they ask for.
"""

import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compile_kernels
import ringflex as rf
from ringflex.kernels import triton_kernel, triton_setup
from ringflex.kernels.contract import Gradients, KernelOptions, Partial
from ringflex.kernels.triton_launch import Prepared
from ringflex.masks.trace_cache import traced_score

TARGET, WHERE = compile_kernels.TARGETS["sm_90"]
BACKEND = make_backend(TARGET)
seen: dict[str, set[str]] = defaultdict(set)


class Counted(Prepared):
    def __call__(self, *varying: object) -> None:
        fn = self._kernel
        bind = create_function_from_signature(fn.signature, fn.params, BACKEND)
        _, specialization, _ = bind(*varying, *self._rest, num_warps=self.tile.num_warps)
        functions = {id(x): x.__name__ for x in self._rest if hasattr(x, "cache_key")}
        text = str([(kind, functions.get(id(value), value)) for kind, value in specialization])
        seen[fn.__name__].add(text)


def batch(i: int) -> None:
    generator = torch.Generator().manual_seed(i)
    S = int(torch.randint(100, 5000, (), generator=generator))
    ids = (torch.rand(2, S, generator=generator) < 0.02).cumsum(1)
    prefix = torch.randint(0, S, (2,), generator=generator)
    bias = torch.randn(4, 41, requires_grad=True)
    mask = rf.document(ids) & (rf.causal() | rf.prefix_lm(prefix))
    score = traced_score(rf.relative_position(bias), torch.float32)
    block_mask = rf.create_block_mask(mask, 2, 4, S, S)
    make = lambda H: torch.zeros(2, H, S, 64, dtype=torch.bfloat16)
    q, k, v, dout, out, lse = make(4), make(2), make(2), make(4), make(4), torch.zeros(2, 4, S)
    options = KernelOptions()
    triton_kernel.forward(q, k, v, block_mask, score, 0.1, None, Partial(out, lse), options)
    terms = triton_kernel.row_terms(dout, out, lse, None, q, block_mask, score, 0.1, options, True)
    gradients = Gradients(
        dq=make(4), dk=make(2), dv=make(2), dcaptures=[torch.zeros_like(bias)],
    )  # fmt: skip
    triton_kernel.backward(dout, q, k, v, terms, block_mask, score, 0.1, gradients, options)


with (
    mock.patch.object(triton_kernel, "Prepared", Counted),
    mock.patch.object(triton_setup, "architecture", return_value=WHERE),
):
    for number in range(20):
        batch(number + 1)
for name, found in seen.items():
    print(name, len(found))
    if len(found) > 1:
        print(*sorted(found), sep="\n", file=sys.stderr)
