"""Mods as the Triton kernels take them: generated functions and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.contract import KernelOptions
from ringflex.kernels.lowering import lower_gradient, lower_mask, lower_score, tanh_is_added
from ringflex.kernels.mod_tables import TableSpec, table_arguments
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.captures import narrowest
from ringflex.masks.pointwise import PointwiseMod, derivative, pointwise
from ringflex.masks.traced_mod import TracedMod


class Mod(NamedTuple):
    """A generated function (None: there is nothing to ask) and its `tables` argument.

    looks_up: whether a table has more than one element.
    """

    function: Any
    tables: tuple[Any, ...]
    looks_up: bool


def mask_mod(mask: BlockMask, device: torch.device) -> Mod:
    """The mask of a BlockMask on a device; kept on the traced mask.

    Its captured tensors are those of the time when the block mask was built. Integers of 64 bits
    that fit in 32 are in_32_bits: comparisons of document ids cost half.
    """
    key, cache = ("triton", device), mask.mask.cache
    if key not in cache:
        body = pointwise(mask.mask)
        host = mask.mask.to(torch.device("cpu"))
        tables = [in_32_bits(t).to(device) for t in body.tables(host.captures)]
        specs = [TableSpec.of(t) for t in tables]
        lowered = lower_mask(body, specs)
        function = None if lowered.trivial else lowered.function
        looks_up = any(t.numel() > 1 for t in tables)
        cache[key] = Mod(function, table_arguments(tables, specs), looks_up)
    return cache[key]


def in_32_bits(table: Tensor) -> Tensor:
    """Integers of 64 bits in 32 where they fit; so are those of 16: one kernel serves both."""
    if table.dtype == torch.int16:
        return table.to(torch.int32)
    return table.to(narrowest(table, (torch.int32,))) if table.dtype == torch.int64 else table


class ScoreMod:
    """A traced score mod on a device: its tables now, and its functions."""

    def __init__(self, score: TracedMod, device: torch.device, *, approximate_tanh: bool) -> None:
        self.score, self.cache = score, score.cache
        if "pointwise" not in self.cache:
            self.cache["pointwise"] = pointwise(score)
        self.body: PointwiseMod = self.cache["pointwise"]
        with torch.no_grad():
            self.tables = [t.to(device) for t in self.body.tables(score.captures)]
        self.specs = tuple(TableSpec.of(t) for t in self.tables)
        if "tanh" not in self.cache:
            self.cache["tanh"] = "level_tanh" if tanh_is_added(self.body) else "accurate_tanh"
        nvidia = device.type == "cuda" and torch.version.hip is None
        approximate = nvidia and (approximate_tanh or score.approximate_tanh)
        self.tanh: str = "fast_tanh" if approximate else self.cache["tanh"]
        self.arguments = table_arguments(self.tables, self.specs)

    def function(self) -> Any:
        """`score(score, b, h, q_idx, kv_idx, tables)`."""
        key = ("score", self.specs, self.tanh)
        if key not in self.cache:
            self.cache[key] = lower_score(self.body, self.specs, tanh=self.tanh).function
        return self.cache[key]

    def gradient(self, wanted: Sequence[bool]) -> Any:
        """`gradient(score, grad, b, h, q_idx, kv_idx, tables, into, HOW, Q_AXIS)`."""
        key = ("gradient", tuple(wanted), self.specs, self.tanh)
        if key not in self.cache:
            gradient = derivative(self.body, wanted)
            self.cache[key] = lower_gradient(gradient, self.specs, tanh=self.tanh).function
        return self.cache[key]

    def wanted(self, captures_wanted: Sequence[bool]) -> tuple[bool, ...]:
        """Which tables want a gradient, for these captured tensors to get theirs."""
        key = ("wanted", tuple(captures_wanted))
        if key not in self.cache:
            leaves = [
                c.detach().requires_grad_(want)
                for c, want in zip(self.score.captures, captures_wanted, strict=True)
            ]
            with torch.enable_grad():
                self.cache[key] = tuple(t.requires_grad for t in self.body.tables(leaves))
        return self.cache[key]  # type: ignore[no-any-return]

    def add_to_captures(
        self, dtables: Sequence[Tensor | None], dcaptures: Sequence[Tensor | None]
    ) -> None:
        """From the gradients of tables to those of the captured tensors, which are added to (in
        their precision: half precision stays out of the sums)."""
        leaves = [
            c.detach() if into is None else c.detach().to(into.dtype).requires_grad_()
            for c, into in zip(self.score.captures, dcaptures, strict=True)
        ]
        with torch.enable_grad():
            tables = self.body.tables(leaves)
        reached = [(t, d) for t, d in zip(tables, dtables, strict=True) if d is not None]
        reached = [(t, d.to(t)) for t, d in reached if t.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not reached:
            return
        results, upstream = zip(*reached, strict=True)
        grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True)
        targets = [d for d in dcaptures if d is not None]
        for target, grad in zip(targets, grads, strict=True):
            if grad is not None:
                target.add_(grad)


def score_mod(
    score: TracedMod | None, device: torch.device, options: KernelOptions
) -> ScoreMod | None:
    """A `ScoreMod` of a traced mod, from its cache if nothing in it changes; None for None."""
    if score is None:
        return None
    key = ("on device", device, options.approximate_tanh)
    mod: ScoreMod | None = score.cache.get(key)
    if mod is None:
        mod = ScoreMod(score, device, approximate_tanh=options.approximate_tanh)
        if not (score.captures or mod.tables):
            score.cache[key] = mod
    return mod


def kind_of(mod: ScoreMod | None) -> Any:
    """What Triton specialises on in a mod's tables."""
    if mod is None:
        return None
    return tuple((t.dtype, t.shape, t.stride(), t.data_ptr() & 15) for t in mod.tables)


def accumulators(mod: ScoreMod, wanted: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
    """For each table that wants a gradient: zeros like it, fp32, and one number aside."""
    found = []
    for table, want in zip(mod.tables, wanted, strict=True):
        if want:
            zeros = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
            found.append((zeros, torch.zeros(1, dtype=torch.int32, device=table.device)))
    return found
