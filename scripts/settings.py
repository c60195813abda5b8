"""The settings of scripts/train.py, each an option of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from data import VOCAB_SIZE
from model import Execution, ModelConfig


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
    fsdp: bool | None = option(
        None, "shard weights and optimizer over all ranks by FSDP2 (default: on GPUs)", type=bool
    )
    compile: bool | None = option(
        None, "torch.compile the blocks around attention (default: on GPUs)", type=bool
    )
    checkpoint_activations: bool | None = option(
        None, "recompute the blocks around attention backward (default: on GPUs)", type=bool
    )
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

    @property
    def newest_checkpoint(self) -> Path | None:
        """The last complete checkpoint in `out`: its metadata is written after all else."""
        complete = sorted(Path(self.out).glob("checkpoints/step-*/.metadata"))
        return complete[-1].parent if complete else None

    @property
    def execution(self) -> Execution:
        return Execution(
            compile=bool(self.compile), checkpoint_activations=bool(self.checkpoint_activations)
        )

    def on(self, device: torch.device) -> Config:
        """This with the defaults that depend on the device filled in."""
        chosen: dict[str, Any] = {
            name: device.type == "cuda"
            for name in ("fsdp", "compile", "checkpoint_activations")
            if getattr(self, name) is None
        }
        return replace(self, **chosen)

    def alone(self) -> Config:
        """The same training on one rank, as plainly as can be: what `--check` compares with."""
        # In bf16 FSDP decides what is rounded: all weights, where autocast rounds those of matmuls.
        sharded = self.fsdp and self.dtype == "bf16"
        return replace(self, dp=1, fsdp=sharded, compile=False, checkpoint_activations=False)


# Settings that may change when a run resumes: its losses depend on them by rounding alone.
FREE_ON_RESUME = frozenset(
    {"steps", "dp", "layout", "strategy", "out", "checkpoint_every", "resume"}
    | {"check", "check_tolerance", "fsdp", "compile", "checkpoint_activations"}
)


def parse_config(
    arguments: Sequence[str] | None = None, *, description: str | None = None
) -> Config:
    """The settings that a command line gives, by default this process's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for item in fields(Config):
        flag, about = f"--{item.name.replace('_', '-')}", dict(item.metadata)
        if about["type"] is bool:
            both_ways = item.default is None
            action = argparse.BooleanOptionalAction if both_ways else "store_true"
            parser.add_argument(flag, action=action, default=item.default, help=about["help"])
            continue
        if item.default is not None:
            about["help"] += f" (default {item.default})"
        parser.add_argument(flag, default=item.default, **about)
    return Config(**vars(parser.parse_args(arguments)))
