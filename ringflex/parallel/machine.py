"""What plans are made for: the rates of GPUs and links, and the shape of attention. Pure."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

FORWARD, BACKWARD = 4, 10  # floating-point operations a visible pair, head and head dim


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and what links them.

    The defaults are for Hopper GPUs: the rates of their kernels (an H200; causal, 65,536 tokens,
    head dim 128, bf16), NVLink as NCCL's point-to-point transfers use it, and 400 Gb/s of network a
    GPU.

    Attributes:
        forward, backward: FLOP/s of a kernel, at 4 D and 10 D a pair and head.
        launch: seconds that a kernel takes beside its work: its first and last programs, and what
            is done between kernels.
        gpus_per_node: that `near` links.
        near, far: bytes/s each way of one GPU, within a node and between nodes.
        latency: seconds before a transfer's first byte.
        hidden: share of its own time by which a transfer slows the kernel that it runs beside.
        at_once: tokens of K/V that a step of "direct" may bring to a rank within its node, however
            few it holds itself, as every step costs time; between nodes, as many as come there in
            the same time.
        one_pass: whether the backward kernel computes dQ together with dK and dV.
    """

    forward: float = 680e12
    backward: float = 555e12
    launch: float = 40e-6
    gpus_per_node: int = 8
    near: float = 200e9
    far: float = 45e9
    latency: float = 20e-6
    hidden: float = 0.5
    at_once: int = 65536
    one_pass: bool = True

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """What `scripts/calibrate.py` wrote: the fields under "machine" of a JSON file.

        Raises:
            ValueError: the file holds something else, or a rate that cannot be.
        """
        written = json.loads(Path(path).read_text())
        fields = written.get("machine") if isinstance(written, dict) else None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not fields.keys() <= set(names):
            raise ValueError(f'{path}: wanted {{"machine": {{...}}}} with some of {names}')
        return cls(**fields)

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "at_once"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an int, got {value!r}")
        for name in ("forward", "backward", "near", "far", "gpus_per_node"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("launch", "latency", "hidden", "at_once"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The tensors of an attention layer, but for the sequence."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    v_head_dim: int | None = None  # as head_dim
    dtype: torch.dtype = torch.bfloat16
    gradient_dtype: torch.dtype = torch.float32  # in which dK/dV travel

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} of K/V")

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of queries and keys, and of values."""
        return self.head_dim, self.v_head_dim or self.head_dim

    def share(self, gpus: int) -> AttentionShape:
        """Of each GPU of a node, if heads are dealt to them.

        Raises:
            ValueError: heads are not multiples of the GPUs.
        """
        if self.heads % gpus or self.kv_heads % gpus:
            raise ValueError(
                f"strategy='ulysses' deals heads to the {gpus} GPUs of a node; {self.heads} and "
                f"{self.kv_heads} of K/V are not multiples"
            )
        heads, kv_heads = self.heads // gpus, self.kv_heads // gpus
        return dataclasses.replace(self, heads=heads, kv_heads=kv_heads)

    def block_costs(self, machine: Machine, block_size: int) -> tuple[float, float, float]:
        """Seconds, forward and backward together, of one visible block over all heads, and of the
        K/V block's way to another rank and its gradient's home: within a node, and between."""
        D, Dv = self.dims
        rates = FORWARD / machine.forward + BACKWARD / machine.backward
        computed = block_size**2 * self.heads * (D + Dv) / 2 * rates
        moved = block_size * self.kv_heads * (D + Dv)
        moved *= 2 * self.dtype.itemsize + self.gradient_dtype.itemsize
        return computed, moved / machine.near, moved / machine.far
