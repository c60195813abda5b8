"""200 random cases for several GPUs, of few enough kinds that kernels compile in a minute or two:
no mask or score here has a number in it that differs from case to case. Half of them are in blocks
of 64, which the portable kernels compute, and half in blocks of 128, for Hopper's where there are.

    PYTHONPATH=tests python tests/gpu/random_cases.py 0   # the first share of them, simulated

The ranks of that form live in one process, on one GPU. A share has cases of one kind and block
size; all are run at once, as compiling takes longest.
"""

import random
import sys
from typing import NamedTuple

import torch

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES, Case, assert_equals_reference
from ringflex.kernels import hopper_kernel, triton_kernel
from simulated_ranks import run_ranks

COUNT = 200
SHARES = 32  # two of each kind and block size
KINDS = [  # mask, score, dtype, head dims
    ("causal", None, torch.bfloat16, (64, 64)),
    ("causal", "softcap", torch.float16, (64, 64)),
    ("short window", None, torch.float16, (128, 128)),
    ("causal documents", None, torch.bfloat16, (128, 128)),
    ("causal documents", "relative", torch.float16, (64, 64)),
    ("mixed heads", "composed", torch.bfloat16, (64, 64)),
    ("prefix rows", "by position", torch.float16, (64, 32)),
    ("near in time", None, torch.bfloat16, (80, 80)),
]


class RandomCase(NamedTuple):
    case: Case
    layout: str
    strategy: str


def random_cases(count: int = COUNT) -> list[RandomCase]:
    """The same on every rank."""
    r = random.Random(0)
    made = []
    for i in range(count):
        mask, score, dtype, (D, Dv) = KINDS[i % len(KINDS)]
        block_size = (64, 128)[i // len(KINDS) % 2]
        Hkv = r.choice([1, 2])
        case = Case(
            mask=mask, score=score, dtype=dtype, D=D, Dv=Dv, Hkv=Hkv, Hq=Hkv * r.choice([1, 2, 4]),
            B=r.choice([1, 2]), seq_len=r.randint(1, 600), block_size=block_size,
            bshd=r.random() < 0.3, sinks=False, seed=i,
        )  # fmt: skip
        made.append(RandomCase(case, r.choice(LAYOUTS), r.choice(STRATEGIES)))
    return made


def simulate(share: int) -> None:
    hopper = torch.cuda.get_device_capability()[0] == 9
    for case, layout, strategy in random_cases()[share::SHARES]:
        p = case.build(device=torch.device("cuda"))
        plans = rf.plan_all(
            p.mask, case.seq_len, 2, B=case.B, H=case.Hq,
            layout=layout, strategy=strategy, block_size=case.block_size,
            machine=rf.Machine(at_once=case.seed % 2 * 65536),
        )  # fmt: skip
        kernel = hopper_kernel if hopper and case.block_size == 128 else triton_kernel
        found = run_ranks(plans, kernel, p.q, p.k, p.v, p.dout, p.score)
        assert_equals_reference(case, found, f"{layout} {strategy}")
    print(f"simulated ranks agree with fp64: {KINDS[share % len(KINDS)]}", flush=True)


if __name__ == "__main__":
    simulate(int(sys.argv[1]))
