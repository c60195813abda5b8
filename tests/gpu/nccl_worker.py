"""Run by torchrun, one process a GPU: attention over a sharded sequence equals the dense reference.

Prints the largest relative error of each case; exits with an error if one is too large.
"""

import itertools
import os

import torch
import torch.distributed as dist

import ringflex as rf
from ringflex.reference import reference_attention_with_gradients

S, B, HQ, HKV, D, DV = 1000, 2, 4, 2, 32, 16


def masks(device: torch.device) -> dict[str, rf.MaskMod]:
    ids = torch.sort(torch.randint(0, 6, (B, S), device=device), dim=1)[0]
    return {
        "causal": rf.causal(),
        "window": rf.causal() & rf.sliding_window(100),
        "documents": rf.causal() & rf.document(ids),
        "full": rf.full(),
    }


def relative_error(x: torch.Tensor, want: torch.Tensor) -> float:
    return ((x.double() - want.double()).abs().max() / want.double().abs().max()).item()


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    q, k, v, dout = make(B, HQ, S, D), make(B, HKV, S, D), make(B, HKV, S, DV), make(B, HQ, S, DV)
    slopes, sinks = make(HQ).requires_grad_(), make(HQ).requires_grad_()
    for (name, mask), dtype in itertools.product(
        masks(device).items(), (torch.float64, torch.bfloat16)
    ):
        tensors = [x.to(dtype) for x in (q, k, v, dout)]
        score = None if name == "full" else rf.alibi(slopes)
        exact = reference_attention_with_gradients(
            *(x.double() for x in tensors),
            mask_mod=mask,
            score_mod=score,
            sinks=sinks,
            captures=() if score is None else (slopes,),
        )
        for layout, strategy in itertools.product(
            ("contiguous", "zigzag", "striped"), ("ring", "direct", "all_gather")
        ):
            plan = rf.plan(mask, S, B=B, layout=layout, strategy=strategy, block_size=32)
            local = [plan.shard(x, 2).requires_grad_() for x in tensors[:3]]
            out = rf.flex_attention(
                *local, score_mod=score, block_mask=plan, enable_gqa=True, sinks=sinks
            )
            wanted = [*local, sinks] + ([] if score is None else [slopes])
            grads = torch.autograd.grad(out, wanted, plan.shard(tensors[3], 2))
            for shared in grads[3:]:
                dist.all_reduce(shared)
            results = [plan.unshard(x, 2) for x in (out, *grads[:3])] + list(grads[3:])
            expected = [exact.out, exact.dq, exact.dk, exact.dv, exact.dsinks, *exact.dcaptures]
            error = max(map(relative_error, results, expected))
            if dist.get_rank() == 0:
                print(f"{name} {dtype} {layout} {strategy}: {error:.1e}", flush=True)
            # bf16 rounds its results once, to 2**-9; gradients also inherit out's rounding.
            limit = 1e-9 if dtype == torch.float64 else 2**-6
            assert error < limit, (name, dtype, layout, strategy, error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
