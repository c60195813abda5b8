"""The kernel contract in portable Triton: what to launch, with what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.block_lists import key_lists, query_lists
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile, Way
from ringflex.kernels.mod_tables import gradient_arguments
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_backward import key_kernel, query_kernel, row_terms_kernel
from ringflex.kernels.triton_forward import forward_kernel
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_math import ADD, FIXED, LARGEST, unchanged
from ringflex.kernels.triton_merge import Merge
from ringflex.kernels.triton_mods import ScoreMod, accumulators, kind_of, score_mod
from ringflex.kernels.triton_setup import (
    Setup,
    alignment,
    described,
    encoded_rows,
    nearby,
    padded_dim,
    shares,
    strided,
)
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.traced_mod import TracedMod

may_overlap = True  # see `contract`
joins = False  # see `contract`


class RowTerms(NamedTuple):
    """Of each query; `[B, Hq, padded length]`, fp32.

    Attributes:
        lse_log2: lse in base 2, less log2(factor); inf where nothing is seen.
        delta: see `contract`.
        factor: weights that are computed with lse_log2 are so many times p.
    """

    lse_log2: Tensor
    delta: Tensor
    factor: float = 1.0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    score: TracedMod | None,
    scale: float,
    before: Partial | None,
    after: Partial,
    options: KernelOptions,
    stage: Stage | None = None,
    running: Partial | None = None,
    beside: bool = False,
    more: tuple[Tensor, Tensor] | None = None,
    behind: Way | None = None,
) -> None:
    """See `contract`."""
    if more is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), more, strict=True))
    setup, q, k, v = _setup(q, k, v, mask, options)
    mod = score_mod(score, q.device, options)
    merge = Merge.of(before, after, stage, running)
    starts = alignment(q, k, v)
    tma = setup.describable and not starts
    D, D_PAD, DV, DV_PAD = setup.dims
    score_function = None if mod is None else mod.function()
    if mod is None and scale <= 0:  # the kernel takes a positive scale out of the maximum
        score_function = unchanged
    key = ("forward", kind_of(mod), score_function, starts, merge.key, stage)

    def arguments(tile: Tile) -> tuple[Any, ...]:
        return (
            described(q, tile.block_m, D_PAD) if tma else strided(q),
            described(k, tile.block_n, D_PAD) if tma else strided(k),
            described(v, tile.block_n, DV_PAD) if tma else strided(v),
            *merge.arguments, () if mod is None else mod.arguments, scale,
        )  # fmt: skip

    def prepare(tile: Tile) -> Prepared:
        lists = query_lists(mask, q.device, stage)
        return Prepared(
            forward_kernel,
            (setup.batch * setup.heads * lists.places * (mask.block_size[0] // tile.block_m), 1, 1),
            (
                *setup.query_lists(lists, stage), setup.mask_mod.tables, *setup.lengths,
                setup.heads, setup.group, lists.places, *setup.row_strides(lists), setup.kv_stride,
            ),
            (
                setup.mask_mod.function, score_function, setup.has_partial(lists),
                setup.positions.kv_in_order, *merge.constants,
                *setup.tiles(tile), *setup.dims, tma, setup.precision, tile.num_stages,
            ),
            tile,
        )  # fmt: skip

    ready = setup.prepared.get(key)
    if ready is None:
        alone = not (shares(merge.before_lse, merge.lse) or shares(merge.before_out, merge.out))
        repeatable = stage is None and (alone or not merge.with_lse)
        ready = setup.prepare(key, "forward", mod, prepare, arguments if repeatable else None)
    ready(*arguments(ready.tile))


def row_terms(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    mask: BlockMask,
    score: TracedMod | None,
    scale: float,
    options: KernelOptions,
    apart: bool,
    factor: float = 1.0,
) -> RowTerms:
    """See `contract`, and `RowTerms` for the factor."""
    dout = nearby(dout)
    B, H, q_len, DV = out.shape
    padded = mask.q_blocks * mask.block_size[0]
    lse_log2, delta = (_empty(B, H, padded, out.device) for _ in range(2))
    terms = RowTerms(lse_log2, delta, factor)
    dlse_or_lse = lse if dlse is None else dlse
    key = (
        "row terms", out.dtype, dout.dtype, out.shape, out.stride(), dout.stride(), dlse is None,
        dlse_or_lse.stride(), out.device, alignment(out, dout, lse, dlse_or_lse),
    )  # fmt: skip
    ready = mask.cache.get(key)
    if ready is None:
        rows = 64 if DV <= 128 else 32
        ready = mask.cache[key] = Prepared(
            row_terms_kernel,
            (B * H * -(-padded // rows), 1, 1),
            (q_len, padded, H),
            (dlse is not None, rows, DV, padded_dim(DV)),
            Tile(rows, rows, 4, 1),
        )
    ready(
        strided(out), strided(dout), encoded_rows(lse), encoded_rows(dlse_or_lse), *terms[:2],
        math.log2(factor),
    )  # fmt: skip
    return terms


def blocks_at_once(q: Tensor, block_size: int) -> float:
    """See `contract`."""
    return 1.0


def has_separate_passes(q: Tensor, v: Tensor, options: KernelOptions, beside: bool) -> bool:
    """See `contract`."""
    return options.backward != "one_pass"


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: RowTerms,
    mask: BlockMask,
    score: TracedMod | None,
    scale: float,
    gradients: Gradients,
    options: KernelOptions,
) -> None:
    """See `contract`."""
    setup, q, k, v = _setup(q, k, v, mask, options)
    mod = score_mod(score, q.device, options)
    call = _Backward(setup, mod, nearby(dout), q, k, v, terms, scale, gradients)
    wanted = () if mod is None else mod.wanted([d is not None for d in gradients.dcaptures])
    if options.backward == "one_pass":
        call.one_pass(wanted)
        return
    if gradients.dk is not None:
        call.keys()
    if gradients.dq is None:
        return
    if mod is None or not any(wanted):
        call.queries(gradients.dq)
    elif options.deterministic:
        call.queries_in_fixed_point(wanted)
    else:
        pairs = accumulators(mod, wanted)
        call.queries(gradients.dq, wanted, pairs)
        call.collect(wanted, [total for total, _ in pairs])


class _Backward:
    """The launches of one backward."""

    def __init__(
        self,
        setup: Setup,
        mod: ScoreMod | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        terms: RowTerms,
        scale: float,
        gradients: Gradients,
    ) -> None:
        self.setup, self.mod, self.terms, self.scale = setup, mod, terms, scale
        self.dout, self.q, self.k, self.v, self.gradients = dout, q, k, v, gradients
        regular = all(s > 0 and s * dout.element_size() % 16 == 0 for s in dout.stride()[:-1])
        g = gradients
        targets = [g.dq, g.running_q, g.dk, g.dv]
        starts = alignment(q, k, v, dout, *(q if x is None else x for x in targets))
        self.tma = setup.describable and dout.stride(3) == 1 and regular and not starts & 0b1111
        self.score_function = None if mod is None else mod.function()
        self.score_tables = () if mod is None else mod.arguments
        self.key = (
            kind_of(mod), self.score_function, dout.stride(), starts,
            *(None if x is None else x.dtype for x in targets),
        )  # fmt: skip

    def gradient_function(self, wanted: Sequence[bool]) -> Any:
        """The derivative of the score mod, which adds into the tables that are wanted."""
        if self.mod is None:
            return None
        return self.mod.gradient(wanted or [False] * len(self.mod.tables))

    def tensors(self, tile: Tile) -> tuple[Any, ...]:
        """q, k, v and dout as the kernels take them."""
        if not self.tma:
            return tuple(strided(x) for x in (self.q, self.k, self.v, self.dout))
        _, D_PAD, _, DV_PAD = self.setup.dims
        return (
            described(self.q, tile.block_m, D_PAD),
            described(self.k, tile.block_n, D_PAD),
            described(self.v, tile.block_n, DV_PAD),
            described(self.dout, tile.block_m, DV_PAD),
        )

    def keys(
        self,
        dq: Tensor | None = None,
        wanted: Sequence[bool] = (),
        pairs: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """dK and dV; with `dq`, zeros of fp32, also dQ and the gradients of tables (one pass)."""
        setup, g, mask = self.setup, self.gradients, self.setup.mask
        assert g.dk is not None and g.dv is not None
        dk, dv = g.dk, g.dv
        key = ("keys", *self.key, dq is not None, tuple(wanted))
        target = dk if dq is None else dq

        def rows_by_descriptor(tile: Tile) -> bool:
            return self.tma and tile.block_m >= 32  # 128 bytes, as shared memory is written

        def arguments(tile: Tile) -> tuple[Any, ...]:
            rows: tuple[Any, ...] = self.terms[:2]
            if rows_by_descriptor(tile):
                rows = tuple(described(x.flatten(0, 1), 1, tile.block_m) for x in rows)
            return (
                *self.tensors(tile), *rows, strided(target), strided(dk), strided(dv),
                self.score_tables, gradient_arguments(pairs), self.scale,
            )  # fmt: skip

        def prepare(tile: Tile) -> Prepared:
            lists = key_lists(mask, setup.group, self.q.device)
            tiles = lists.blocks * (mask.block_size[1] // tile.block_n)
            return Prepared(
                key_kernel,
                (setup.batch * setup.kv_heads * tiles, 1, 1),
                (
                    *setup.key_lists(lists), setup.mask_mod.tables, *setup.lengths,
                    self.terms.delta.shape[2], setup.kv_heads, setup.group, lists.blocks,
                    *setup.row_strides(lists), *setup.order_strides(lists, setup.kv_heads),
                    setup.kv_stride,
                ),
                (
                    setup.mask_mod.function, self.score_function, self.gradient_function(wanted),
                    ADD.value, setup.has_partial(lists), setup.positions.kv_in_order,
                    dq is not None, *setup.tiles(tile), *setup.dims,
                    self.tma, rows_by_descriptor(tile), setup.precision, tile.num_stages,
                ),
                tile,
            )  # fmt: skip

        ready = setup.prepared.get(key)
        if ready is None:
            repeatable = arguments if dq is None else None
            ready = setup.prepare(key, "key", self.mod, prepare, repeatable)
        ready(*arguments(ready.tile))

    def queries(
        self,
        dq: Tensor,
        wanted: Sequence[bool] = (),
        pairs: Sequence[tuple[Tensor, Tensor]] = (),
        how: int = ADD.value,
    ) -> None:
        """dQ, and the gradients of tables by `how`."""
        setup, mask, stage = self.setup, self.setup.mask, self.gradients.stage
        running = self.gradients.running_q
        running = dq if running is None else running
        key = ("queries", *self.key, tuple(wanted), stage is not None, how, running.dtype)

        def arguments(tile: Tile) -> tuple[Any, ...]:
            return (
                *self.tensors(tile), *self.terms[:2], strided(dq), strided(running),
                self.score_tables, gradient_arguments(pairs), self.scale,
            )  # fmt: skip

        def prepare(tile: Tile) -> Prepared:
            lists = query_lists(mask, self.q.device, stage)
            tiles = lists.places * (mask.block_size[0] // tile.block_m)
            return Prepared(
                query_kernel,
                (setup.batch * setup.heads * tiles, 1, 1),
                (
                    *setup.query_lists(lists, stage), setup.mask_mod.tables, *setup.lengths,
                    self.terms.delta.shape[2], setup.heads, setup.group, lists.places,
                    *setup.row_strides(lists), setup.kv_stride,
                ),
                (
                    setup.mask_mod.function, self.score_function, self.gradient_function(wanted),
                    how, setup.has_partial(lists), setup.positions.kv_in_order, stage is not None,
                    *setup.tiles(tile), *setup.dims, self.tma, setup.precision, tile.num_stages,
                ),
                tile,
            )  # fmt: skip

        ready = setup.prepared.get(key)
        if ready is None:
            repeatable = not pairs and stage is None
            ready = setup.prepare(
                key, "query", self.mod, prepare, arguments if repeatable else None
            )
        ready(*arguments(ready.tile))

    def one_pass(self, wanted: Sequence[bool]) -> None:
        """Everything by the key kernel, with atomic additions into dQ."""
        g = self.gradients
        dq = sum_of_queries(g)
        pairs = [] if self.mod is None else accumulators(self.mod, wanted)
        self.keys(dq, wanted, pairs)
        round_queries(g, dq)
        self.collect(wanted, [total for total, _ in pairs])

    def queries_in_fixed_point(self, wanted: Sequence[bool]) -> None:
        """dQ and the gradients of tables, as integers, which add up alike in any order.

        Each addend is rounded to 2^-(61 - log2(n)) of the largest, for n scores visited: 2^-28
        with 16k x 16k scores of 32 heads. The largest is found first, by a run of its own; if it
        is infinite or NaN, the gradient is NaN.
        """
        assert self.mod is not None
        pairs = accumulators(self.mod, wanted)
        g = self.gradients
        assert g.dq is not None
        self.queries(g.dq, wanted, pairs, LARGEST.value)
        largest = torch.stack([aside.view(torch.float32)[0] for _, aside in pairs])
        _, exponent = torch.frexp(largest)
        bits = 61 - math.ceil(math.log2(max(2, self.setup.scores_visited))) - exponent
        factors = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), bits)
        fixed = [
            (torch.zeros_like(total, dtype=torch.int64), factors[i : i + 1])
            for i, (total, _) in enumerate(pairs)
        ]
        self.queries(g.dq, wanted, fixed, FIXED.value)
        sums = [
            torch.where(finite, total.double() / factor, torch.nan).float()
            for (total, factor), finite in zip(fixed, largest.isfinite(), strict=True)
        ]
        self.collect(wanted, sums)

    def collect(self, wanted: Sequence[bool], sums: Sequence[Tensor]) -> None:
        """From the gradients of tables to those of captured tensors."""
        if self.mod is not None and any(wanted):
            remaining = iter(sums)
            dtables = [next(remaining) if want else None for want in wanted]
            self.mod.add_to_captures(dtables, self.gradients.dcaptures)


def sum_of_queries(g: Gradients) -> Tensor:
    """Where a backward in one pass adds dQ, in fp32."""
    assert g.dq is not None
    if g.running_q is not None:
        if g.stage is not None:
            g.stage.begin(g.running_q, 0.0)
        return g.running_q
    if g.dq.dtype == torch.float32:
        return g.dq.zero_()
    return torch.zeros_like(g.dq, dtype=torch.float32)


def round_queries(g: Gradients, total: Tensor) -> None:
    """From there to dQ."""
    assert g.dq is not None
    if g.stage is not None:
        g.stage.end(total, g.dq)
    elif g.running_q is None and total is not g.dq:
        g.dq.copy_(total)


def _setup(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: KernelOptions
) -> tuple[Setup, Tensor, Tensor, Tensor]:
    """And q, k, v as it serves them."""
    setup = Setup.of(q, k, v, mask, options)
    if setup.far_apart:
        q, k, v = (nearby(x) for x in (q, k, v))
        setup = Setup.of(q, k, v, mask, options)
    return setup, q, k, v


def _empty(B: int, H: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(B, H, length, dtype=torch.float32, device=device)
