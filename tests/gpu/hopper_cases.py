"""The Hopper kernels against fp64, on one GPU, a share of the cases per process.

    PYTHONPATH=tests python tests/gpu/hopper_cases.py 0 14      # the first of 14 shares
    PYTHONPATH=tests python tests/gpu/hopper_cases.py 0 14 forward       # of that, only forwards
    PYTHONPATH=tests python tests/gpu/hopper_cases.py launches  # 10,000 launches, the same bits
    PYTHONPATH=tests compute-sanitizer --tool memcheck python tests/gpu/hopper_cases.py few

(Its racecheck reports whatever one warp hands to others in shared memory: it does not follow a
barrier at which one thread arrives for them all, not even in a kernel of nothing else.)

Every mask, every score and every head dim, keys that grow, then 500 random cases of few enough
kinds that kernels compile in a minute: no mask or score of those has a number in it that differs
from case to case. In every other share the forward computes most tiles once more, as if sums had
left their range.
"""

import faulthandler
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.experimental.gluon import language as gl

import ringflex as rf
from attention_cases import (
    LAYOUTS,
    MASKS,
    SCORES,
    Case,
    assert_equals_reference,
    assert_same_bits,
    attend,
)
from ringflex.kernels import hopper_kernel, hopper_softmax
from ringflex.kernels.block_lists import BlockLists
from ringflex.kernels.pieces import Tail
from ringflex.parallel import waiting
from simulated_ranks import run_ranks

RANDOM = 500
DIMS = [(16, 16), (64, 32), (80, 80), (96, 128), (128, 64), (192, 128), (256, 256), (128, 128)]
KINDS = [  # mask, score, dtype, head dims
    ("causal", None, torch.bfloat16, (64, 64)),
    ("causal", "softcap", torch.float16, (128, 128)),
    ("short window", None, torch.float16, (128, 128)),
    ("causal documents", None, torch.bfloat16, (128, 128)),
    ("causal documents", "alibi", torch.bfloat16, (128, 128)),
    ("mixed heads", "composed", torch.bfloat16, (64, 64)),
    ("prefix rows", "by position", torch.float16, (64, 32)),
    ("near in time", None, torch.bfloat16, (256, 256)),
    ("full", None, torch.float16, (128, 128)),
    ("document rows", "relative", torch.bfloat16, (192, 128)),
]
BASE = Case(
    seq_len=300, D=64, Dv=64, Hq=4, Hkv=2, dtype=torch.bfloat16, block_size=128, dlse=True
)  # fmt: skip
DEVICE = torch.device("cuda")
FORWARD_ONLY = "forward"  # an argument


def groups() -> Iterator[list[tuple[Case, str]]]:
    """Cases that compile the same kernels, and on how many simulated ranks, by which strategy."""
    for i, mask in enumerate(MASKS):  # of a multiple of 8 tokens, where more is added by TMA
        yield [(replace(BASE, mask=mask, D=128, Dv=128, seq_len=304, seed=i), "")]
    for score in SCORES:
        yield [(replace(BASE, mask="causal documents", score=score, dtype=torch.float16), "")]
    for D, Dv in DIMS:
        sizes = [(1, 0), (128, 0), (513, 0), (264, 1)]
        yield [(replace(BASE, mask="tree", D=D, Dv=Dv, seq_len=n, seed=i), "") for n, i in sizes]
    # Whole blocks of keys only, for which there is a forward of its own.
    whole = replace(BASE, mask="full", D=128, Dv=128)
    for sinks in (False, True):
        yield [(replace(whole, sinks=sinks, dlse=not sinks, seq_len=n), "") for n in (128, 640)]
    # Scores that exceed those of the first tile by more than sums can hold.
    for kind in ("full", "causal documents", "short window"):
        grown = replace(whole, mask=kind, growth=512.0)
        yield [(replace(grown, seq_len=n), how) for n in (640, 1500) for how in ("", "direct")]
    r = random.Random(1)
    for i, (mask, score, dtype, (D, Dv)) in enumerate(KINDS):
        cases = []
        for j in range(RANDOM // len(KINDS)):
            Hkv = r.choice([1, 2])
            length = r.randint(1, 400)
            length += r.choice([0, -length % 8])
            case = Case(
                mask=mask, score=score, dtype=dtype, D=D, Dv=Dv, Hkv=Hkv,
                Hq=Hkv * r.choice([1, 2, 4]), B=r.choice([1, 2]),
                seq_len=length, block_size=128, bshd=r.random() < 0.3, sinks=r.random() < 0.2,
                dlse=False, seed=100 * i + j,
            )  # fmt: skip
            alone = case.sinks or r.random() < 0.6
            cases.append((case, "" if alone else r.choice(["ring", "direct"])))
        yield from (cases[n : n + 10] for n in range(0, len(cases), 10))


def few() -> list[tuple[Case, str]]:
    """One of each configuration, for compute-sanitizer, which is slow."""
    large = replace(BASE, B=1, seq_len=200, D=128, Dv=128)
    return [
        (replace(large, D=64, Dv=64), ""),
        (replace(large, D=80, Dv=80, dtype=torch.float16), ""),
        (replace(large, D=192), ""),
        (replace(large, D=256, Dv=256), ""),
        (replace(large, mask="causal documents", score="alibi", sinks=True), ""),
        (replace(large, mask="mixed heads", score="composed", bshd=True), ""),
        (replace(large, mask="tree", dlse=False), "ring"),
        (replace(large, mask="nothing"), ""),
        (replace(large, seed=1), ""),
        (replace(large, mask="full", seed=2), ""),
        (replace(large, D=64, Dv=64, seed=1), ""),
    ]


def check(case: Case, strategy: str) -> None:
    """On one device, or by two ranks simulated in this process, whose results merge. In the
    backward heads of a group are apart with an odd seed, together with an even one, and by halves
    with every fifth; the queries are parted with every third seed; a row of keys, if it can be,
    with three of four; and queries wait for K/V that arrives with an odd seed, if they can, or some
    of them with an even one."""
    even = 2.0 if case.seed % 2 else 0.0
    heads = hopper_kernel._heads_of_a_tile
    if case.seed % 5 == 4:
        heads = lambda setup, *_: max(1, setup.group // 2)
    stretches = lambda *_: 3 if case.seed % 3 == 2 else 1

    def tail(lists: BlockLists, *_: Any) -> Tail | None:
        if len(lists.visited) != len(lists.order_here):  # heads that share an order
            return None
        visited = np.take_along_axis(lists.visited, lists.order_here, axis=1)[:, : lists.places]
        pieces = min(case.seed % 4 + 1, visited.min(initial=0))
        return Tail(1, pieces) if pieces > 1 else None

    patches = {
        "_EVEN": even, "_MANY": 0, "_heads_of_a_tile": heads, "_stretches": stretches,
        "tail_of": tail, "blocks_at_once": lambda q, _: float(q.shape[0] * q.shape[1]),
    }  # fmt: skip
    hidden = (1e9, 0.0, 0.3, 0.0)[case.seed % 4]
    with (
        mock.patch.multiple(hopper_kernel, **patches),
        mock.patch.object(waiting, "_HIDDEN", hidden),
    ):
        _check(case, strategy)


def _check(case: Case, strategy: str) -> None:
    p = case.build(device=DEVICE)
    if strategy:
        layout = LAYOUTS[case.seed % len(LAYOUTS)]
        plans = rf.plan_all(
            p.mask, case.seq_len, 2, B=case.B, H=case.Hq, layout=layout, strategy=strategy,
            block_size=case.block_size,
        )  # fmt: skip
        found = run_ranks(plans, hopper_kernel, p.q, p.k, p.v, p.dout, p.score)
    else:
        mask = rf.create_block_mask(p.mask, case.B, case.Hq, case.seq_len, case.seq_len)
        found = attend(p, mask, backend="hopper")
    only = ("out", "lse") if FORWARD_ONLY in sys.argv else None
    assert_equals_reference(case, found, strategy, only)


def no_backward(*_: Any) -> None:
    """In place of the kernels' own, which take longer to compile."""


def launches(count: int = 10_000) -> None:
    """Forwards of random masks and lengths: none hangs, and two in a row give the same bits."""
    r = random.Random(2)
    done = 0
    while done < count:
        mask, score, dtype, (D, Dv) = KINDS[r.choice([0, 2, 3, 8])]
        case = Case(
            mask=mask, score=score, dtype=dtype, D=D, Dv=Dv, Hkv=2, Hq=4, B=1,
            seq_len=r.randint(1, 3000), block_size=128, growth=r.choice([1.0, 512.0]),
            seed=r.randint(0, 1000),
        )  # fmt: skip
        p = case.build(device=DEVICE)
        mask = rf.create_block_mask(p.mask, case.B, case.Hq, case.seq_len, case.seq_len)
        first = attend(p, mask, backend="hopper")
        for _ in range(30):
            with torch.no_grad():
                out, lse = rf.flex_attention(
                    p.q, p.k, p.v, block_mask=mask, enable_gqa=True, return_lse=True,
                    backend="hopper",
                )  # fmt: skip
            assert torch.equal(out, first.out) and torch.equal(lse, first.lse), case
        second = attend(p, mask, backend="hopper")
        same = lambda x: x._replace(dq=x.out, dk=x.out, dv=x.out)  # added up in any order
        assert_same_bits(same(first), same(second))
        done += 34
    print(f"{done} launches")


def main() -> None:
    torch.set_num_threads(1)  # there are many such processes
    faulthandler.dump_traceback_later(300, exit=True)
    patches: dict[str, Any] = {"_FEW": 0.0}  # the backward of few tiles is also this kernel's here
    if FORWARD_ONLY in sys.argv:
        patches["backward"] = no_backward
    with mock.patch.multiple(hopper_kernel, **patches):
        chosen_cases()


def chosen_cases() -> None:
    if sys.argv[1] == "launches":
        launches(*map(int, sys.argv[2:]))
        return
    if sys.argv[1] == "few":
        share, chosen = "few", [few()]
    else:
        share, of = sys.argv[1], int(sys.argv[2])
        if int(share) % 2:
            hopper_softmax.LARGEST_SUM = gl.constexpr(8.0)
        chosen = list(groups())[int(share) :: of]
    failed = count = 0
    started = time.monotonic()
    for number, group in enumerate(chosen):
        for case, strategy in group:
            count += 1
            try:
                check(case, strategy)
            except Exception as error:
                failed += 1
                print(f"FAILED {case} {strategy}: {type(error).__name__} {error}"[:600], flush=True)
        seconds = time.monotonic() - started
        print(f"share {share}: {number + 1} of {len(chosen)} groups, {seconds:.0f} s", flush=True)
    print(f"share {share}: {count} cases, {failed} failed", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
