"""Train a small byte-level transformer on the standard library's source, data x context parallel.

    python scripts/train.py                                              # one process
    torchrun --nproc-per-node 2 scripts/train.py                         # two share each sequence
    torchrun --nproc-per-node 4 scripts/train.py --dp 2 --batch-size 2   # 2 x 2
    torchrun --nproc-per-node 2 scripts/train.py --check --steps 50      # as one process would?
    torchrun --nproc-per-node 8 scripts/train.py --dtype bf16            # FSDP2, on GPUs

On GPUs weights are sharded over all ranks, and blocks compiled and recomputed in the backward; so
they are on CPUs with `--fsdp`, `--compile` (needs a C++ compiler) and `--checkpoint-activations`.

Writes `losses.json`, `loss.png` and a picture of each kind of layer's plan to `--out`.

Shapes:
    B  sequences of this data-parallel rank      S  tokens of a sequence      V  vocabulary
    L  slots of this rank's shard of a sequence, padding included
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ringflex as rf
from checkpoints import load_checkpoint, save_checkpoint
from data import IGNORE_LABEL, Batch, PackedDocuments, standard_library_documents
from model import Transformer
from ranks import Ranks, shard_weights, start, sum_over_ranks
from records import Run, Step, full, report_check, report_speed, weights_digest, write_outputs
from settings import Config, parse_config

CHECK_TIMEOUT = timedelta(hours=4)  # the other ranks wait while rank 0 trains alone


def masks_of(batch: Batch, config: Config) -> dict[str, rf.MaskMod]:
    """The masks of one batch, for both kinds of layers."""
    document = rf.document(batch.doc_ids)
    return {
        "local": rf.causal() & rf.sliding_window(config.window - 1) & document,
        "global": rf.causal() & document,
    }


def batches_with_plans(
    documents: PackedDocuments, config: Config, ranks: Ranks, first: int
) -> rf.PlanPrefetcher[Batch]:
    """The batches from step `first` on; the plans of both kinds of layers share one layout."""
    batches = (
        documents.batch(
            step=step,
            batch_size=config.batch_size,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
        )
        for step in range(first, config.steps)
    )
    model, batch = config.model, config.batch_size // ranks.dp_size
    return rf.PlanPrefetcher(
        batches,
        partial(masks_of, config=config),
        seq_len=config.seq_len,
        group=ranks.cp,
        B=batch,
        layout=config.layout,
        strategy=config.strategy,
        shape=rf.AttentionShape(
            batch=batch,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=config.compute_dtype,
        ),
    )


def traffic(plans: Mapping[str, rf.Plan], batch_size: int, config: Config) -> tuple[float, int]:
    """Share of remote K/V this rank skips, mean over layers; bytes it receives, all layers."""
    model = config.model
    stats = [plans[model.kind(layer)].stats for layer in range(model.layers)]
    received = [
        one.bytes_received(
            batch=batch_size,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            dtype=config.compute_dtype,
            backward=True,
        )
        for one in stats
    ]
    return sum(one.skipped for one in stats) / len(stats), sum(received)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    plans: Mapping[str, rf.Plan],
    config: Config,
    ranks: Ranks,
) -> dict[str, float]:
    """Forward, backward, update. The fields of `Step` that all ranks make together."""
    shared = plans["local"]  # any of them: a sequence lies the same way in all layers
    tokens = shared.shard(batch.tokens, dim=1).to(ranks.device)  # [B, L]
    labels = shared.shard(batch.labels, dim=1, fill=IGNORE_LABEL).to(ranks.device)  # [B, L]
    positions = shared.positions.to(ranks.device)  # [L]

    labelled = int((labels != IGNORE_LABEL).sum())
    totals = torch.tensor(  # float64 counts exactly up to 2**53
        [labelled, *traffic(plans, len(tokens), config)], dtype=torch.float64, device=ranks.device
    )
    dist.all_reduce(totals, group=ranks.everyone)
    labelled, skipped, received = totals.tolist()

    # FSDP casts the weights itself, and what they multiply follows.
    autocast = config.dtype == "bf16" and not config.fsdp
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens, positions, plans)  # [B, L, V]
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
    )
    loss = loss / labelled
    optimizer.zero_grad()
    loss.backward()
    loss = sum_over_ranks(loss, [] if config.fsdp else model.parameters(), ranks.everyone)
    grad_norm = full(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()

    size = dist.get_world_size(ranks.everyone)
    return {
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "skipped": skipped / size,
        "bytes_received": received / size,
    }


def train(config: Config, ranks: Ranks, documents: PackedDocuments, *, title: str) -> Run:
    """Train up to step `config.steps` on these ranks; global rank 0 shows the progress."""
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(config.seed)
    model = Transformer(config.model, config.execution)
    if config.fsdp:
        shard_weights(model, config, ranks)
    else:
        model.to(ranks.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    steps = load_checkpoint(config, ranks, model, optimizer) if config.resume else []
    plans: Mapping[str, rf.Plan] = {}

    first = len(steps)
    source = batches_with_plans(documents, config, ranks, first)
    with tqdm(
        enumerate(source, first), desc=title, unit="step", total=config.steps - first,
        disable=dist.get_rank() != 0,
    ) as progress:  # fmt: skip
        began = time.perf_counter()
        for number, (batch, plans) in progress:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (number + 1) / max(1, config.warmup))
            made = train_step(model, optimizer, batch, plans, config, ranks)
            ended = time.perf_counter()
            speed, began = config.batch_size * config.seq_len / (ended - began), ended
            step = Step(**made, plan_seconds=source.seconds, tokens_per_second=speed)
            if not math.isfinite(step.loss):
                raise FloatingPointError(f"loss={step.loss} at step {number}; lower lr={config.lr}")
            steps.append(step)
            progress.set_postfix_str(
                f"loss {step.loss:.4f}, {step.tokens_per_second:,.0f} tok/s, "
                f"K/V skipped {step.skipped:.0%}, received {step.bytes_received / 1e6:.1f} MB, "
                f"plan {step.plan_seconds * 1e3:.0f} ms",
                refresh=False,
            )
            if config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
                save_checkpoint(config, ranks, model, optimizer, steps)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_gpu else 0, device=ranks.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=ranks.everyone)
    return Run(
        steps=steps,
        plans=plans,
        weights_sha256=weights_digest(model),
        peak_gpu_bytes=int(peak) if on_gpu else None,
    )


def check(config: Config, ranks: Ranks, documents: PackedDocuments) -> bool:
    """Train on all ranks, then on rank 0 alone; on every rank, whether all losses agree."""
    alone = dist.new_group([0])
    # Waiting outlasts a whole run on one rank, which no collective of the training may.
    waiting = dist.new_group(backend="gloo", timeout=CHECK_TIMEOUT)
    many = train(config, ranks, documents, title=f"{dist.get_world_size()} ranks")
    passed = torch.zeros(1, dtype=torch.int64)
    if dist.get_rank() == 0:
        one_rank = Ranks(everyone=alone, cp=alone, dp_rank=0, dp_size=1, device=ranks.device)
        one = train(config.alone(), one_rank, documents, title="1 rank")
        write_outputs(config, ranks, many, one_rank=one.losses)
        report_speed(config, many)
        tolerance = 1e-5 if config.check_tolerance is None else config.check_tolerance
        passed[0] = report_check(one.losses, many.losses, tolerance=tolerance)
    dist.broadcast(passed, src=0, group=waiting)
    return bool(passed.item())


def main() -> int:
    config = parse_config(description=__doc__)
    source = PackedDocuments(standard_library_documents(), seq_len=config.seq_len, seed=config.seed)
    ranks = start(config)
    config = config.on(ranks.device)
    passed = True
    if config.check:
        passed = check(config, ranks, source)
    else:
        run = train(config, ranks, source, title="train")
        if dist.get_rank() == 0:
            write_outputs(config, ranks, run)
            report_speed(config, run)
    if dist.get_rank() == 0:
        print(f"wrote losses.json, loss.png and plan-*.png to {config.out}")
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
