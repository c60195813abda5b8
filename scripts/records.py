"""What a run of scripts/train.py leaves behind: its record, its pictures, a check's verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ringflex as rf
from ranks import Ranks
from settings import Config

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one optimizer step went.

    loss: nats per token of the global batch, before the update.
    grad_norm: of the gradient of `loss` in all weights, before it is clipped.
    skipped: share of remote K/V blocks that were not received, mean over layers and ranks.
    bytes_received: K/V and their gradients, of all layers, mean over ranks.
    plan_seconds: that the training thread spent on this step's plans, on this rank.
    tokens_per_second: of the global batch, with data and planning in the time.
    """

    loss: float
    grad_norm: float
    skipped: float
    bytes_received: float
    plan_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    steps: every one from step 0.
    plans: of the last batch, by kind of layer.
    weights_sha256: `weights_digest` of the trained model.
    peak_gpu_bytes: the most that tensors took on any of the GPUs; None on CPUs.
    """

    steps: list[Step]
    plans: Mapping[str, rf.Plan]
    weights_sha256: str
    peak_gpu_bytes: int | None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


def full(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered by all its ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, whichever way they are sharded; every rank must call."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(full(parameter.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


def record(
    config: Config, ranks: Ranks, steps: Sequence[Step], weights_sha256: str, **more: Any
) -> str:
    """What a run was and how it went, as JSON. Equal losses and digests are equal bits."""
    content = {
        "config": asdict(config),
        "dp": ranks.dp_size,
        "cp": dist.get_world_size(ranks.cp),
        "weights_sha256": weights_sha256,
        **more,
        "steps": [asdict(step) for step in steps],
        "losses": [step.loss for step in steps],
    }
    return json.dumps(content, indent=1)


def speed(config: Config, run: Run) -> dict[str, float | int | None]:
    """Medians over the steps, which leave out warming up and compiling, and the peak of memory.

    Returns:
        tokens_per_second: of the global batch.
        planning_share: of a step's time, spent on plans by this rank's training thread.
        peak_gpu_bytes: as in `Run`.
    """
    tokens = config.batch_size * config.seq_len
    return {
        "tokens_per_second": median(step.tokens_per_second for step in run.steps),
        "planning_share": median(
            step.plan_seconds * step.tokens_per_second / tokens for step in run.steps
        ),
        "peak_gpu_bytes": run.peak_gpu_bytes,
    }


def report_speed(config: Config, run: Run) -> None:
    """Print `speed` in words."""
    found = speed(config, run)
    line = (
        f"median step: {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['planning_share']:.1%} of its time on plans"
    )
    if run.peak_gpu_bytes is not None:
        line += f"; peak memory of a GPU {run.peak_gpu_bytes / 2**30:.2f} GiB"
    print(line)


def write_outputs(
    config: Config, ranks: Ranks, run: Run, *, one_rank: Sequence[float] | None = None
) -> None:
    """Write the record, the loss plot and the plans' pictures; with `one_rank`, a check's."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {"speed": speed(config, run)}
    if one_rank is not None:
        more["one_rank_losses"] = one_rank
    text = record(config, ranks, run.steps, run.weights_sha256, **more)
    (out / "losses.json").write_text(text)
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
