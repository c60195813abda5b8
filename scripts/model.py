"""A small decoder-only byte-level transformer whose attention runs across ranks.

Shapes:
    B  sequences of this rank      L  slots of this rank's shard of a sequence, padding included
    C  width of the model          V  vocabulary
    Hq, Hkv  heads of queries, of keys and values      D = C / Hq  head dim

Only attention mixes positions, so only attention knows that a sequence is sharded. Everything else
sees `[B, L, ...]` and works slot by slot; rotary embeddings take each slot's global position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringflex as rf


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a `Transformer`. `heads` must be a multiple of `kv_heads`, the head dim even."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} does not split into heads={self.heads} of an even size, as rotary "
                f"embeddings need; pass a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} do not share kv_heads={self.kv_heads} evenly; "
                "pass a number of kv_heads that divides heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Width inside SwiGLU: 8/3 of the model's (three matrices for two), rounded up to 32."""
        return math.ceil(self.dim * 8 / 3 / 32) * 32

    def kind(self, layer: int) -> str:
        """Which of the plans a layer attends by: local and global layers alternate."""
        return "global" if layer % 2 else "local"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a block computes what is not attention: this decides speed and memory, not results.

    Attention stays out of both. It is a fused kernel with collectives around it: nothing is gained
    by compiling it, and recomputing it would send all K/V once more. It keeps q, k, v, out and lse.

    compile: by torch.compile, a graph for each of the parts before and after attention.
    checkpoint_activations: recompute these parts in the backward instead of keeping what they made.
    """

    compile: bool = False
    checkpoint_activations: bool = False

    def wrap(self, part: Callable[..., Any]) -> Callable[..., Any]:
        if self.checkpoint_activations:
            part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        return torch.compile(part, fullgraph=True) if self.compile else part


def rotary_angles(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings (Su et al. 2021, eq. 34), fp32 `[L, D / 2]` each.

    Args:
        positions: int64 `[L]`, the global position of each slot.
        head_dim: `D`, even.
        base: the longest wavelength is almost `2 * pi * base` tokens.
    """
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    )
    angles = positions[:, None].double() * base**-exponents  # [L, D / 2]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair `(x[i], x[i + D / 2])` of `[B, H, L, D]` by its slot's angle, in x's dtype."""
    first, second = x.chunk(2, dim=-1)  # [B, H, L, D / 2] each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` (Zhang and Sennrich 2019, eq. 4) in fp32, returned in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """The weights of grouped-query attention with rotary embeddings, on both sides of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]` of x `[B, L, C]`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)  # of [B, Hq + 2 Hkv, L, D]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def join(self, mixed: Tensor) -> Tensor:
        """`[B, L, C]` of the heads' results `[B, Hq, L, D]`."""
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, eq. 6); gate and up are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then SwiGLU, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, execution: Execution) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, eps=1e-5)
        self.mlp = SwiGLU(config)
        self._before, self._after = execution.wrap(Block.before), execution.wrap(Block.after)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x), cos, sin)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.attention.join(mixed)
        return x + self.mlp(self.mlp_norm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: rf.Plan) -> Tensor:
        q, k, v = self._before(self, x, cos, sin)
        mixed = rf.flex_attention(q, k, v, block_mask=plan, enable_gqa=True)  # [B, Hq, L, D]
        return self._after(self, x, mixed)


class Transformer(nn.Module):
    """Bytes in, logits of the next byte out.

    Weights are drawn on the CPU from torch's global generator: after `torch.manual_seed(seed)` they
    are the same bits on every rank and on every kind of device.
    """

    def __init__(self, config: ModelConfig, execution: Execution | None = None) -> None:
        super().__init__()
        self.config = config
        execution = execution or Execution()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, execution) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.logits = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Draw matrices at the scale of their fan-in, and embeddings of size 1.

        Smaller weights (GPT-2's 0.02, at these widths) are turned over by a few steps of AdamW: the
        run then magnifies a rounding error tenfold every few steps, and two runs that differ only
        in how they round soon have different losses.
        """
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.logits.weight, std=0.02)  # the first loss is that of a uniform guess
        for block in self.blocks:
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    std = weight.shape[1] ** -0.5
                    if name in ("attention.out.weight", "mlp.down.weight"):
                        # 2 * layers of these add up in the residual stream; so it keeps its size.
                        std /= math.sqrt(2 * self.config.layers)
                    nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor, positions: Tensor, plans: Mapping[str, rf.Plan]) -> Tensor:
        """Logits of the byte after each slot.

        Args:
            tokens: int64 `[B, L]`, this rank's shard.
            positions: int64 `[L]`, the global position of each slot, on the tokens' device.
            plans: one plan for each kind of layer, "local" and "global", on one layout.

        Returns:
            fp32 `[B, L, V]`; a padding slot's are meaningless.
        """
        config = self.config
        cos, sin = rotary_angles(positions, head_dim=config.head_dim, base=config.rope_base)
        x = self.embedding(tokens)  # [B, L, C]
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, plans[config.kind(layer)])
        return self.logits(self.norm(x)).float()
