"""The kernel contract in portable Triton: what to launch, with what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflex.kernels.block_lists import BlockLists, key_lists, positions, query_lists
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile, compute_dtype
from ringflex.kernels.lowering import gradient_arguments
from ringflex.kernels.triton_backward import key_kernel, query_kernel, row_terms_kernel
from ringflex.kernels.triton_forward import forward_kernel
from ringflex.kernels.triton_launch import launch
from ringflex.kernels.triton_math import ADD, FIXED, LARGEST, unchanged
from ringflex.kernels.triton_mods import NOTHING, Mod, ScoreMod, accumulators, mask_mod
from ringflex.kernels.triton_tiles import Architecture, architecture, fit_blocks, tile_for
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.trace import TracedMod

__all__ = ["backward", "compute_dtype", "forward", "row_terms"]


class RowTerms(NamedTuple):
    """`[B, Hq, padded length]`, fp32: lse in base 2 (inf where nothing is seen), and delta."""

    lse_log2: Tensor
    delta: Tensor


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
) -> None:
    """See `contract`."""
    call = _Call(q, k, v, mask, score, scale, options)
    lists = query_lists(mask, q.device)
    assert after.out is not None
    in_place = before is not None and before.out is after.out and before.lse is after.lse
    merge_out = before is not None and before.out is not None
    before_lse = after.lse if before is None else before.lse
    before_out = before.out if before is not None and before.out is not None else after.out

    def run(tile: Tile) -> None:
        tma = call.tma(q, k, v)
        launch(
            forward_kernel,
            q.shape[0] * q.shape[1] * lists.blocks * (mask.block_size[0] // tile.block_m),
            (
                call.tensor(q, tile.block_m, tma),
                call.tensor(k, tile.block_n, tma),
                call.tensor(v, tile.block_n, tma),
                strided(after.out),
                strided(after.lse),
                strided(before_out),
                strided(before_lse),
                *call.lists(lists),
                call.mask_mod.tables,
                call.score_tables,
                scale,
                *call.lengths,
                q.shape[1],
                call.group,
                lists.blocks,
                *call.row_strides(lists),
                call.kv_stride,
            ),
            (
                call.mask_mod.function,
                # The kernel takes the scale out of the maximum, which wants it to be positive.
                unchanged if score is None and scale <= 0 else call.score_function,
                lists.any_partial or call.mask_mod.function is not None,
                call.positions.kv_in_order,
                merge_out,
                before is not None,
                in_place,
                *call.tiles(tile),
                *call.dims,
                tma,
                call.precision,
                tile.num_stages,
            ),
            tile,
        )

    run(call.tile("forward", run))


def row_terms(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    mask: BlockMask,
    options: KernelOptions,
) -> RowTerms:
    """See `contract`."""
    B, H, q_len, DV = out.shape
    padded = mask.q_blocks * mask.block_size[0]
    terms = RowTerms(*(torch.empty(B, H, padded, device=out.device) for _ in range(2)))
    rows = 64 if DV <= 128 else 32
    launch(
        row_terms_kernel,
        (triton.cdiv(padded, rows), B * H),
        (
            strided(out),
            strided(dout),
            strided(lse),
            strided(lse if dlse is None else dlse),
            *terms,
            q_len,
            padded,
            H,
        ),
        (dlse is not None, rows, DV, padded_dim(DV)),
        Tile(rows, rows, 4, 1),
    )
    return terms


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
    call = _Call(q, k, v, mask, score, scale, options)
    wanted: tuple[bool, ...] = ()
    if call.score is not None:
        wanted = call.score.wanted(gradients.dcaptures)
    one_pass = options.backward == "one_pass"
    if one_pass:
        assert not options.deterministic
        pairs = accumulators(call.score, wanted) if call.score is not None else []
        _one_pass(call, dout, terms, gradients, wanted, pairs)
        _collect(call, wanted, [p[0] for p in pairs], gradients)
        return
    _keys(call, dout, terms, gradients, None, None, ())
    if not any(wanted):
        _queries(call, dout, terms, gradients, (), (), ADD.value)
        return
    assert call.score is not None
    if not options.deterministic:
        pairs = accumulators(call.score, wanted)
        _queries(call, dout, terms, gradients, wanted, pairs, ADD.value)
        _collect(call, wanted, [p[0] for p in pairs], gradients)
        return
    # Integers add up to the same sum in any order. First find how large the addends are.
    pairs = accumulators(call.score, wanted)
    scratch = Gradients(
        dq=torch.empty_like(gradients.dq), dk=gradients.dk, dv=gradients.dv,
        dcaptures=gradients.dcaptures, add_q=False, add_kv=False,
    )  # fmt: skip
    _queries(call, dout, terms, scratch, wanted, pairs, LARGEST.value)
    largest = torch.stack([aside.view(torch.float32)[0] for _, aside in pairs])
    factors = _fixed_point(largest, call.scores_visited)
    fixed = [
        (torch.zeros_like(total, dtype=torch.int64), factors[i : i + 1])
        for i, (total, _) in enumerate(pairs)
    ]
    _queries(call, dout, terms, gradients, wanted, fixed, FIXED.value)
    sums = [(total.double() / factor).float() for total, factor in fixed]
    _collect(call, wanted, sums, gradients)


def _fixed_point(largest: Tensor, addends: int) -> Tensor:
    """Powers of two, fp64, such that `addends` numbers up to `largest` fit in 62 bits together.

    Each addend is rounded to 2^-(62 - log2(addends)) of the largest: with 16k x 16k scores of 32
    heads, 2^-29.
    """
    _, exponent = torch.frexp(largest)
    bits = 61 - math.ceil(math.log2(max(2, addends))) - exponent
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), bits)


def _keys(
    call: _Call,
    dout: Tensor,
    terms: RowTerms,
    gradients: Gradients,
    dq: Tensor | None,
    score_grad: Any,
    into: tuple[Any, ...],
) -> None:
    """dK and dV; with `dq`, an fp32 accumulator, the one-pass form."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    lists = key_lists(mask, call.group, q.device)
    heads_apart = mask.H > 1
    kv_heads = k.shape[1]
    order_stride_h = lists.blocks if heads_apart else 0
    order_stride_b = (lists.blocks * (kv_heads if heads_apart else 1)) if mask.B > 1 else 0
    if score_grad is None and call.score is not None:
        score_grad = call.score.gradient([False] * len(call.score.tables))

    def run(tile: Tile) -> None:
        tma = call.tma(q, k, v, dout, *([] if dq is None else [dq]))
        rows = [_row_descriptor(x, tile.block_m) if tma else x for x in terms]
        target: Any = gradients.dk
        if dq is not None:
            target = dq
        launch(
            key_kernel,
            q.shape[0] * kv_heads * lists.blocks * (mask.block_size[1] // tile.block_n),
            (
                call.tensor(q, tile.block_m, tma),
                call.tensor(k, tile.block_n, tma),
                call.tensor(v, tile.block_n, tma),
                call.tensor(dout, tile.block_m, tma),
                *rows,
                call.tensor(target, tile.block_m, tma and dq is not None),
                strided(gradients.dk),
                strided(gradients.dv),
                *call.lists(lists),
                call.mask_mod.tables,
                call.score_tables,
                into,
                call.scale,
                *call.lengths,
                terms.lse_log2.shape[2],
                kv_heads,
                call.group,
                lists.blocks,
                *call.row_strides(lists),
                order_stride_b,
                order_stride_h,
                call.kv_stride,
            ),
            (
                call.mask_mod.function,
                call.score_function,
                score_grad,
                ADD.value,
                lists.any_partial or call.mask_mod.function is not None,
                call.positions.kv_in_order,
                gradients.add_kv,
                dq is not None,
                *call.tiles(tile),
                *call.dims,
                tma,
                call.precision,
                tile.num_stages,
            ),
            tile,
        )

    run(call.tile("key", run if dq is None and not gradients.add_kv else None))


def _one_pass(
    call: _Call,
    dout: Tensor,
    terms: RowTerms,
    gradients: Gradients,
    wanted: Sequence[bool],
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> None:
    fits = gradients.dq.dtype == torch.float32
    dq = gradients.dq if fits else torch.empty_like(gradients.dq, dtype=torch.float32)
    if not gradients.add_q:
        dq.zero_()
    score_grad = None if call.score is None else call.score.gradient(wanted)
    _keys(call, dout, terms, gradients, dq, score_grad, gradient_arguments(pairs))
    if not fits:
        gradients.dq.copy_(dq)


def _queries(
    call: _Call,
    dout: Tensor,
    terms: RowTerms,
    gradients: Gradients,
    wanted: Sequence[bool],
    pairs: Sequence[tuple[Tensor, Tensor]],
    how: int,
) -> None:
    """dQ, and the gradients of tables by `how`."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    lists = query_lists(mask, q.device)
    score_grad = None
    if call.score is not None:
        score_grad = call.score.gradient(wanted or [False] * len(call.score.tables))

    def run(tile: Tile) -> None:
        tma = call.tma(q, k, v, dout)
        launch(
            query_kernel,
            q.shape[0] * q.shape[1] * lists.blocks * (mask.block_size[0] // tile.block_m),
            (
                call.tensor(q, tile.block_m, tma),
                call.tensor(k, tile.block_n, tma),
                call.tensor(v, tile.block_n, tma),
                call.tensor(dout, tile.block_m, tma),
                *terms,
                strided(gradients.dq),
                *call.lists(lists),
                call.mask_mod.tables,
                call.score_tables,
                gradient_arguments(pairs),
                call.scale,
                *call.lengths,
                terms.lse_log2.shape[2],
                q.shape[1],
                call.group,
                lists.blocks,
                *call.row_strides(lists),
                call.kv_stride,
            ),
            (
                call.mask_mod.function,
                call.score_function,
                score_grad,
                how,
                lists.any_partial or call.mask_mod.function is not None,
                call.positions.kv_in_order,
                gradients.add_q,
                *call.tiles(tile),
                *call.dims,
                tma,
                call.precision,
                tile.num_stages,
            ),
            tile,
        )

    run(call.tile("query", run if not pairs and not gradients.add_q else None))


def _collect(
    call: _Call, wanted: Sequence[bool], sums: Sequence[Tensor], gradients: Gradients
) -> None:
    if call.score is not None and any(wanted):
        remaining = iter(sums)
        dtables = [next(remaining) if want else None for want in wanted]
        call.score.add_to_captures(dtables, gradients.dcaptures)


class _Call:
    """What the launches of one call have in common."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        score: TracedMod | None,
        scale: float,
        options: KernelOptions,
    ) -> None:
        self.q, self.k, self.v, self.mask, self.scale = q, k, v, mask, scale
        self.options = options
        self.where: Architecture = architecture(q.device)
        self.group = q.shape[1] // k.shape[1]
        self.mask_mod: Mod = mask_mod(mask, q.device)
        self.score: ScoreMod | None = None
        self.score_function: Any = None
        self.score_tables: tuple[Any, ...] = NOTHING.tables
        if score is not None:
            self.score = ScoreMod(score, q.device, approximate_tanh=options.approximate_tanh)
            self.score_function = self.score.function()
            self.score_tables = self.score.arguments
        self.positions = positions(mask, q.device)
        self.kv_stride = mask.kv_blocks if mask.kv_starts.shape[0] > 1 else 0
        self.lengths = (q.shape[2], k.shape[2], mask.q_limit, mask.kv_limit)
        D, DV = q.shape[3], v.shape[3]
        self.dims = (D, padded_dim(D), DV, padded_dim(DV))
        self.precision = _PRECISION[torch.get_float32_matmul_precision()]

    @property
    def scores_visited(self) -> int:
        """Upper bound of the scores that the kernels compute."""
        B, H = self.q.shape[:2]
        repeats = (B if self.mask.B == 1 else 1) * (H if self.mask.H == 1 else 1)
        return self.mask.visible_blocks * math.prod(self.mask.block_size) * repeats

    def tile(self, kernel: str, run: Any) -> Tile:
        """The tile to use: the user's, the table's, or the fastest if asked to measure."""
        for name, tile in self.options.tiles:
            if name == kernel:
                return fit_blocks(tile, self.mask.block_size)
        dims = (self.dims[1], self.dims[3])
        default = tile_for(kernel, self.where, self.q.dtype, dims, self.mask.block_size)
        if self.options.tune and run is not None:
            from ringflex.kernels.triton_tuning import fastest_tile

            mods = (self.mask_mod.function is not None, self.score_function)
            return fastest_tile(kernel, run, default, self.q, self.v, self.mask, mods)
        return default

    def tiles(self, tile: Tile) -> tuple[int, int, int, int]:
        """Tokens per tile, and tiles per block of the mask."""
        m, n = self.mask.block_size
        return tile.block_m, tile.block_n, m // tile.block_m, n // tile.block_n

    def lists(self, lists: BlockLists) -> tuple[Tensor, ...]:
        return lists.rows, lists.runs, lists.order, self.positions.q, self.positions.kv

    def row_strides(self, lists: BlockLists) -> tuple[int, int]:
        """Rows between batch elements and heads, where the mask distinguishes them."""
        by_head = lists.blocks if self.mask.H > 1 else 0
        return lists.blocks * self.mask.H if self.mask.B > 1 else 0, by_head

    def tma(self, *tensors: Tensor) -> bool:
        """Whether all of these can be read by tensor descriptors."""
        new = self.where.name == "cuda" and self.where.capability >= (9, 0)
        emulated = self.where.name == "interpreter"
        return (new or emulated) and self.options.tma and all(map(describable, tensors))

    def tensor(self, x: Tensor, rows: int, tma: bool) -> Any:
        """A tensor as the kernels take it, read in tiles of `rows`."""
        if not tma:
            return strided(x)
        block = [1, 1, rows, padded_dim(x.shape[3])]
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def padded_dim(D: int) -> int:
    """Powers of two, at least 16, which matrix products want."""
    return max(16, triton.next_power_of_2(D))


def strided(x: Tensor) -> tuple[Any, ...]:
    return (x, *x.stride())


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can say where `x [B, H, S, D]` lies."""
    *outer, last = x.stride()
    size = x.element_size()
    return (
        last == 1
        and all(s > 0 and s * size % 16 == 0 for s in outer)
        and x.data_ptr() % 16 == 0
        and x.shape[3] * size >= 16
    )


def _row_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    x = x.flatten(0, 1)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows])
