"""Checkpoints of scripts/train.py: sharded on any number of ranks, read on any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ranks import Ranks
from records import Step, record, weights_digest
from settings import FREE_ON_RESUME, Config


def save_checkpoint(
    config: Config,
    ranks: Ranks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Step],
) -> None:
    """Write weights, optimizer state and the steps so far; every rank must call."""
    folder = Path(config.out, "checkpoints", f"step-{len(steps):08d}")
    digest = weights_digest(model)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(record(config, ranks, steps, digest))
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.save(state, checkpoint_id=folder, process_group=ranks.everyone)


def load_checkpoint(
    config: Config, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Step]:
    """Read the newest checkpoint into model and optimizer; the steps that lie behind it."""
    folder = config.newest_checkpoint
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
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder, process_group=ranks.everyone)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return [Step(**step) for step in saved["steps"]]
