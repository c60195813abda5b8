"""Train a small byte-level transformer on the standard library's source, data x context parallel.

    python scripts/train.py                                              # one process
    torchrun --nproc-per-node 2 scripts/train.py                         # two share each sequence
    torchrun --nproc-per-node 4 scripts/train.py --dp 2 --batch-size 2   # 2 x 2
    torchrun --nproc-per-node 2 scripts/train.py --check --steps 50      # as one process would?

Writes `losses.json`, `loss.png` and a picture of each kind of layer's plan to `--out`.

Shapes:
    B  sequences of this data-parallel rank      S  tokens of a sequence      V  vocabulary
    L  slots of this rank's shard of a sequence, padding included
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import ringflex as rf
from data import IGNORE_LABEL, VOCAB_SIZE, Batch, PackedDocuments, standard_library_documents
from model import ModelConfig, Transformer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CHECK_TIMEOUT = timedelta(hours=4)  # the other ranks wait while rank 0 trains alone


def option(default: Any, text: str, **about: Any) -> Any:
    """A field of `Config` that is an option of the command line as well."""
    return field(default=default, metadata={"help": text, "type": type(default), **about})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a run is. Each field is an option of the command line: `seq_len` is `--seq-len`."""

    steps: int = option(60, "optimizer steps, those before a resume included")
    seq_len: int = option(8192, "tokens of a sequence")
    batch_size: int = option(1, "sequences of a step, over all ranks")
    dp: int = option(1, "data-parallel size; the ranks of each part share its sequences")
    layers: int = option(4, "layers; by turns they see a window and the whole document")
    dim: int = option(128, "width of the model")
    heads: int = option(4, "query heads")
    kv_heads: int = option(2, "key and value heads")
    window: int = option(1024, "tokens that a local layer sees, the query's own included")
    lr: float = option(3e-3, "learning rate of AdamW")
    warmup: int = option(10, "steps over which the learning rate rises")
    weight_decay: float = option(0.1, "weight decay of AdamW")
    dtype: str = option("fp32", "of matmuls and attention", choices=("fp32", "bf16"))
    layout: str = option("auto", "layout of rf.plan")
    strategy: str = option("auto", "strategy of rf.plan")
    seed: int = option(0, "decides the weights and the order of the documents")
    out: str = option("runs/train", "folder to write to")
    checkpoint_every: int = option(0, "steps between checkpoints; 0 writes none")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    check: bool = option(False, "train again on rank 0 alone; exit 1 if a step's loss differs")
    check_tolerance: float | None = option(
        None, "relative difference that --check allows; 1e-5 unless --dtype bf16", type=float
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dp", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.check and (self.resume or self.checkpoint_every):
            raise ValueError("--check starts from step 0: drop --resume and --checkpoint-every")
        if self.check and self.dtype == "bf16" and self.check_tolerance is None:
            raise ValueError(
                "--check needs fp32: in bf16 every split of a sequence rounds differently; pass "
                "--dtype fp32, or the difference to allow as --check-tolerance"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def model(self) -> ModelConfig:
        sizes = {name: getattr(self, name) for name in ("dim", "layers", "heads", "kv_heads")}
        return ModelConfig(vocab_size=VOCAB_SIZE, **sizes)


# Settings that may change when a run resumes: its losses do not depend on them.
FREE_ON_RESUME = frozenset(
    {"steps", "dp", "layout", "strategy", "out", "checkpoint_every", "resume"}
    | {"check", "check_tolerance"}
)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who trains together: `everyone` sums gradients, the ranks of `cp` share each sequence."""

    everyone: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one optimizer step went.

    loss: nats per token of the global batch, before the update.
    skipped: share of remote K/V blocks that were not received, mean over layers and ranks.
    bytes_received: K/V and their gradients, of all layers, mean over ranks.
    plan_seconds: spent in `rf.plan` on this rank.
    tokens_per_second: of the global batch, with data and planning in the time.
    """

    loss: float
    skipped: float
    bytes_received: float
    plan_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: every step from step 0, the model, and the plans of the last batch."""

    steps: list[Step]
    model: Transformer
    plans: Mapping[str, rf.Plan]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


def make_plans(batch: Batch, config: Config, ranks: Ranks) -> dict[str, rf.Plan]:
    """The plans of one batch for both kinds of layers, on one layout."""
    document = rf.document(batch.doc_ids)
    masks = {
        "local": rf.causal() & rf.sliding_window(config.window - 1) & document,
        "global": rf.causal() & document,
    }
    return rf.plan(
        masks,
        seq_len=config.seq_len,
        group=ranks.cp,
        B=len(batch.tokens),
        layout=config.layout,
        strategy=config.strategy,
    )


def traffic(plans: Mapping[str, rf.Plan], batch_size: int, config: Config) -> tuple[float, int]:
    """Share of remote K/V this rank skips, mean over layers; bytes it receives, all layers."""
    model = config.model
    stats = [plans[model.kind(layer)].stats for layer in range(model.layers)]
    received = [
        one.bytes_received(
            batch=batch_size,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            dtype=config.compute_dtype,
            backward=True,
        )
        for one in stats
    ]
    return sum(one.skipped for one in stats) / len(stats), sum(received)


def sum_over_ranks(loss: Tensor, model: nn.Module, group: dist.ProcessGroup) -> Tensor:
    """Sum all gradients, and the loss with them, over the group in one collective.

    A sum and not DistributedDataParallel's mean: each rank's loss is divided by the global number
    of tokens already, so the sum over data- and context-parallel ranks is the single-process
    gradient itself, with no factor of the world size to put in and take out again. One flat buffer
    fixes the order of addition: a run repeats bit for bit.

    Returns:
        The loss of the global batch, `[1]`.
    """
    parameters = list(model.parameters())
    flat = torch.cat([loss.detach().reshape(1), *(p.grad.reshape(-1) for p in parameters)])
    dist.all_reduce(flat, group=group)
    total, *grads = flat.split([1, *(p.numel() for p in parameters)])
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.view_as(parameter)
    return total


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

    bf16 = config.compute_dtype == torch.bfloat16
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(tokens, positions, plans)  # [B, L, V]
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
    )
    loss = loss / labelled
    optimizer.zero_grad()
    loss.backward()
    loss = sum_over_ranks(loss, model, ranks.everyone)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    size = dist.get_world_size(ranks.everyone)
    return {"loss": loss.item(), "skipped": skipped / size, "bytes_received": received / size}


def train(config: Config, ranks: Ranks, documents: PackedDocuments, *, title: str) -> Run:
    """Train up to step `config.steps` on these ranks; global rank 0 shows the progress."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(ranks.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    steps = load_checkpoint(config, model, optimizer) if config.resume else []
    plans: Mapping[str, rf.Plan] = {}

    numbers = range(len(steps), config.steps)
    with tqdm(numbers, desc=title, unit="step", disable=dist.get_rank() != 0) as progress:
        for number in progress:
            began = time.perf_counter()
            batch = documents.batch(
                step=number,
                batch_size=config.batch_size,
                dp_rank=ranks.dp_rank,
                dp_size=ranks.dp_size,
            )
            planning = time.perf_counter()
            plans = make_plans(batch, config, ranks)
            plan_seconds = time.perf_counter() - planning
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (number + 1) / max(1, config.warmup))
            made = train_step(model, optimizer, batch, plans, config, ranks)
            speed = config.batch_size * config.seq_len / (time.perf_counter() - began)
            step = Step(**made, plan_seconds=plan_seconds, tokens_per_second=speed)
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
    return Run(steps=steps, model=model, plans=plans)


def check(config: Config, ranks: Ranks, documents: PackedDocuments) -> bool:
    """Train on all ranks, then on rank 0 alone; on every rank, whether all losses agree."""
    alone = dist.new_group([0])
    # Waiting outlasts a whole run on one rank, which no collective of the training may.
    waiting = dist.new_group(backend="gloo", timeout=CHECK_TIMEOUT)
    many = train(config, ranks, documents, title=f"{dist.get_world_size()} ranks")
    passed = torch.zeros(1, dtype=torch.int64)
    if dist.get_rank() == 0:
        one_rank = Ranks(everyone=alone, cp=alone, dp_rank=0, dp_size=1, device=ranks.device)
        one = train(replace(config, dp=1), one_rank, documents, title="1 rank")
        write_outputs(config, ranks, many, one_rank=one.losses)
        tolerance = 1e-5 if config.check_tolerance is None else config.check_tolerance
        passed[0] = report_check(one.losses, many.losses, tolerance=tolerance)
    dist.broadcast(passed, src=0, group=waiting)
    return bool(passed.item())


def relative_differences(one: Sequence[float], many: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(a) for a, b in zip(one, many, strict=True)]


def report_check(one: Sequence[float], many: Sequence[float], *, tolerance: float) -> bool:
    """Print how far two loss curves are apart; whether every step is within the tolerance."""
    differences = relative_differences(one, many)
    worst = max(range(len(one)), key=differences.__getitem__)
    passed = differences[worst] <= tolerance
    print(f"{'step':>6} {'1 rank':>12} {'all ranks':>12} {'relative difference':>20}")
    for step in sorted({*range(0, len(one), max(1, len(one) // 5)), len(one) - 1, worst}):
        print(f"{step:6} {one[step]:12.7f} {many[step]:12.7f} {differences[step]:20.2e}")
    print(
        f"check {'passed' if passed else 'FAILED'}: {len(one)} steps, largest relative difference "
        f"{differences[worst]:.2e} at step {worst}, tolerance {tolerance:.0e}"
    )
    return passed


def record(
    config: Config, ranks: Ranks, steps: Sequence[Step], model: nn.Module, **more: Any
) -> str:
    """What a run was and how it went, as JSON. Equal losses and digests are equal bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    content = {
        "config": asdict(config),
        "dp": ranks.dp_size,
        "cp": dist.get_world_size(ranks.cp),
        "weights_sha256": digest.hexdigest(),
        "steps": [asdict(step) for step in steps],
        "losses": [step.loss for step in steps],
        **more,
    }
    return json.dumps(content, indent=1)


def newest_checkpoint(out: str) -> Path | None:
    """The last complete checkpoint of a run: its metadata is written after all else."""
    complete = sorted(Path(out).glob("checkpoints/step-*/.metadata"))
    return complete[-1].parent if complete else None


def save_checkpoint(
    config: Config,
    ranks: Ranks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Step],
) -> None:
    """Write weights, optimizer state and the steps so far; every rank must call."""
    folder = Path(config.out, "checkpoints", f"step-{len(steps):08d}")
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(record(config, ranks, steps, model))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load_checkpoint(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Step]:
    """Read the newest checkpoint into model and optimizer; the steps that lie behind it."""
    folder = newest_checkpoint(config.out)
    if folder is None:
        raise ValueError(f"no complete checkpoint in out={config.out}; drop --resume or fix --out")
    saved = json.loads((folder / "losses.json").read_text())
    for name, value in asdict(config).items():
        if name not in FREE_ON_RESUME and saved["config"][name] != value:
            raise ValueError(
                f"{name}={value}, but {folder} was trained with {name}={saved['config'][name]}; "
                "resume with the same settings, or train anew in another --out"
            )
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return [Step(**step) for step in saved["steps"]]


def write_outputs(
    config: Config, ranks: Ranks, run: Run, *, one_rank: Sequence[float] | None = None
) -> None:
    """Write the record, the loss plot and the plans' pictures; with `one_rank`, a check's."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    more = {} if one_rank is None else {"one_rank_losses": one_rank}
    (out / "losses.json").write_text(record(config, ranks, run.steps, run.model, **more))
    name = f"dp {ranks.dp_size} x cp {dist.get_world_size(ranks.cp)}"
    curves: dict[str, Sequence[float]] = {name: run.losses}
    if one_rank is not None:
        curves["1 rank"] = one_rank
    plot_losses(out / "loss.png", curves)
    for kind, plan in run.plans.items():
        plan.plot(str(out / f"plan-{kind}.png"))


def plot_losses(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw losses by step; below two curves, their relative difference."""
    figure, axes = plt.subplots(len(curves), sharex=True, squeeze=False, layout="constrained")
    top, bottom = axes[0, 0], axes[-1, 0]
    for style, (name, losses) in zip(("-", ":"), curves.items(), strict=False):
        top.plot(losses, style, linewidth=2, label=name)
    top.set(title="Training loss", ylabel="nats per byte")
    top.legend()
    if len(curves) == 2:
        many, one = curves.values()
        bottom.plot(relative_differences(one, many), ".")
        bottom.set(ylabel="relative difference")
    bottom.set(xlabel="step")
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for item in fields(Config):
        flag, about = f"--{item.name.replace('_', '-')}", dict(item.metadata)
        if about["type"] is bool:
            parser.add_argument(flag, action="store_true", help=about["help"])
            continue
        if item.default is not None:
            about["help"] += f" (default {item.default})"
        parser.add_argument(flag, default=item.default, **about)
    return Config(**vars(parser.parse_args(arguments)))


def start(config: Config) -> Ranks:
    """Join the ranks that torchrun started, or be the only one: NCCL on GPUs, gloo on CPUs."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size % config.dp:
        raise ValueError(f"dp={config.dp} does not divide the {world_size} ranks of this job")
    if config.check and world_size == 1:
        raise ValueError("--check compares with one rank: run it by torchrun on 2 ranks or more")
    if config.checkpoint_every and not config.resume and newest_checkpoint(config.out):
        raise ValueError(
            f"{newest_checkpoint(config.out)} is from an earlier run; pass --resume to go on from "
            "it, or another --out"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    no_launcher: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
        **({} if "RANK" in os.environ else no_launcher),
    )
    shape = (config.dp, world_size // config.dp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp"))
    return Ranks(
        everyone=dist.group.WORLD,
        cp=mesh["cp"].get_group(),
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=config.dp,
        device=device,
    )


def main() -> int:
    config = parse_config()
    source = PackedDocuments(standard_library_documents(), seq_len=config.seq_len, seed=config.seed)
    ranks = start(config)
    passed = True
    if config.check:
        passed = check(config, ranks, source)
    else:
        run = train(config, ranks, source, title="train")
        if dist.get_rank() == 0:
            write_outputs(config, ranks, run)
    if dist.get_rank() == 0:
        print(f"wrote losses.json, loss.png and plan-*.png to {config.out}")
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
