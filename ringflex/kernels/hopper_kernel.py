"""The kernel contract on Hopper GPUs (sm_90), in Gluon: what to launch, with what.

What these kernels do not serve goes to the portable Triton kernel, launch by launch; `serves_*`
tell which.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language import bfloat16 as gl_bfloat16
from triton.experimental.gluon.language import float16 as gl_float16
from triton.experimental.gluon.language import float32 as gl_float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflex.kernels import triton_kernel
from ringflex.kernels.block_lists import BlockLists, key_lists, query_lists
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile
from ringflex.kernels.hopper_backward import hopper_backward_kernel
from ringflex.kernels.hopper_forward import hopper_forward_kernel
from ringflex.kernels.mod_tables import gradient_arguments
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_kernel import RowTerms, row_terms
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_math import ADD, unchanged
from ringflex.kernels.triton_mods import accumulators
from ringflex.kernels.triton_setup import Setup, alignment, encoded_rows, strided
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.trace import TracedMod

__all__ = ["backward", "forward", "has_separate_passes", "row_terms"]

_QUERIES, _KEYS = 128, 128  # of a tile that stays
_COUNTERS = 2048  # launches that may be under way at once
_GLUON = {torch.float16: gl_float16, torch.bfloat16: gl_bfloat16}
_DTYPES = _GLUON | {torch.float32: gl_float32}
_ROWS_LAYOUT = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


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
) -> None:
    """See `contract`."""
    setup = Setup.of(q, k, v, mask, options)
    block_n = BN64 if max(setup.dims) <= 64 else 64 if max(setup.dims) > 128 else 128
    served = serves_forward(setup) and not alignment(q, k, v)
    if not served:
        triton_kernel.forward(
            q, k, v, mask, score, scale, before, after, options, stage, running
        )
        return
    mod = triton_kernel._score_mod(score, q, options)
    out, lse = after
    assert out is not None
    first_lse = lse if before is None else before.lse
    merge_first = stage is not None and before is not None
    if stage is not None:  # merges with what is running, or, where a query begins, with first_lse
        assert running is not None and (before is None or before.out is None)
        before = running
    merge_out, merge_lse = before is not None and before.out is not None, before is not None
    before_out = out if before is None or before.out is None else before.out
    before_lse = lse if before is None else before.lse
    in_place = merge_out and before_out is out and before_lse is lse
    score_function = None if mod is None else mod.function()
    if mod is None and scale <= 0:  # the kernel takes a positive scale out of the maximum
        score_function = unchanged
    key = (
        "hopper forward", triton_kernel._kind(mod), score_function, out.dtype, out.stride(),
        before_out.stride(), before_lse.stride(), lse.dtype, before_lse.dtype, merge_out, merge_lse,
        in_place, alignment(out, lse, before_out, before_lse, first_lse), stage is not None,
        merge_first, first_lse.stride(),
    )  # fmt: skip
    ready = setup.prepared.get(key)
    D, _, DV, _ = setup.dims
    D_PAD, DV_PAD = _padded(D), _padded(DV)
    if ready is None:
        lists = query_lists(mask, q.device)
        tiles_m, tiles_n = mask.block_size[0] // _QUERIES, mask.block_size[1] // block_n
        total_heads = setup.batch * setup.heads
        stages = ST64 if max(D_PAD, DV_PAD) == 64 else 2
        ready = Prepared(
            hopper_forward_kernel,
            (min(total_heads * lists.blocks * tiles_m, (2 if MAXR else 1)*_multiprocessors(q.device)), 1, 1),
            (
                *setup.query_lists(lists, stage), setup.mask_mod.tables,
                setup.lengths[0], *setup.lengths[2:], setup.heads, setup.group, lists.blocks,
                *setup.row_strides(lists), setup.kv_stride,
                setup.group, total_heads, _leading(lists, tiles_m, total_heads, q.device),
            ),
            (
                setup.mask_mod.function, score_function, setup.has_partial(lists),
                setup.positions.kv_in_order, merge_out, merge_lse, in_place,
                stage is not None, merge_first,
                block_n, tiles_m, tiles_n, D_PAD, DV, DV_PAD, stages, PINGPONG, *REGISTERS,
            ),
            Tile(_QUERIES, block_n, 4, stages),
        )  # fmt: skip
        setup.keep(key, ready)
    ready(
        _described(q, _QUERIES // 2, D_PAD), _described(k, block_n, D_PAD),
        _described(v, block_n, DV_PAD),
        strided(out), encoded_rows(lse), strided(before_out), encoded_rows(before_lse),
        encoded_rows(first_lse), _counters(q.device), () if mod is None else mod.arguments, scale,
    )  # fmt: skip


PINGPONG = True
REGISTERS = (240, 24)
AHEAD = 0
BN64 = 128
MAXR = None
ST64 = 4
ATOMIC = 0


def has_separate_passes(options: KernelOptions) -> bool:
    """See `contract`."""
    return options.deterministic or options.backward == "two_pass"


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
    g = gradients
    setup = Setup.of(q, k, v, mask, options)
    dout = dout if _is_describable(dout) else dout.contiguous()
    served = not has_separate_passes(options) and g.dq is not None and g.dk is not None
    if not served or not serves_backward(setup) or alignment(q, k, v, dout):
        triton_kernel.backward(dout, q, k, v, terms, mask, score, scale, g, options)
        return
    assert g.dq is not None and g.dk is not None and g.dv is not None
    mod = triton_kernel._score_mod(score, q, options)
    wanted = () if mod is None else mod.wanted([d is not None for d in g.dcaptures])
    pairs = [] if mod is None else accumulators(mod, wanted)
    dq = g.running_q
    if dq is not None and g.stage is not None:
        g.stage.begin(dq, 0.0)
    else:
        fits = g.dq.dtype == torch.float32
        dq = g.dq.zero_() if fits else torch.zeros_like(g.dq, dtype=torch.float32)
    score_function = None if mod is None else mod.function()
    key = (
        "hopper backward", triton_kernel._kind(mod), score_function, dout.stride(), g.dk.dtype,
        g.dk.stride(), g.dv.stride(), tuple(wanted), alignment(g.dk, g.dv),
    )  # fmt: skip
    D, _, DV, _ = setup.dims
    D_PAD, DV_PAD = _padded(D), _padded(DV)
    block_m = 128 if max(D_PAD, DV_PAD) == 64 else 64
    ready = setup.prepared.get(key)
    if ready is None:
        lists = key_lists(mask, setup.group, q.device, descending=True)
        apart = mask.H > 1
        order_stride_h = lists.blocks if apart else 0
        order_stride_b = lists.blocks * (setup.kv_heads if apart else 1) if mask.B > 1 else 0
        tiles_m, tiles_n = mask.block_size[0] // block_m, mask.block_size[1] // _KEYS
        total_heads = setup.batch * setup.kv_heads
        score_gradient = None
        if mod is not None:
            score_gradient = mod.gradient(wanted or [False] * len(mod.tables))
        ready = Prepared(
            hopper_backward_kernel,
            (min(total_heads * lists.blocks * tiles_n, _multiprocessors(q.device)), 1, 1),
            (
                *setup.key_lists(lists), setup.mask_mod.tables,
                *setup.lengths, terms.delta.shape[2], setup.kv_heads, setup.group,
                lists.blocks, *setup.row_strides(lists), order_stride_b, order_stride_h,
                setup.kv_stride, 1, total_heads,
                _leading(lists, tiles_n, total_heads, q.device),
            ),
            (
                setup.mask_mod.function, score_function, score_gradient, ADD.value,
                setup.has_partial(lists), setup.positions.kv_in_order,
                block_m, tiles_m, tiles_n, D, D_PAD, DV, DV_PAD, 2, AHEAD, ATOMIC, *REGISTERS,
            ),
            Tile(block_m, _KEYS, 4, 2),
        )  # fmt: skip
        setup.keep(key, ready)
    half = _KEYS // 2
    ready(
        _described(q, block_m, D_PAD), _described(k, half, D_PAD), _described(v, half, DV_PAD),
        _described(dout, block_m, DV_PAD), *(_described_rows(x, block_m) for x in terms),
        _described(dq, block_m, D_PAD // 2), strided(dq), strided(g.dk), strided(g.dv), _counters(q.device),
        () if mod is None else mod.arguments, gradient_arguments(pairs), scale,
    )  # fmt: skip
    if g.stage is not None:
        g.stage.end(dq, g.dq)
    elif dq is not g.dq:
        g.dq.copy_(dq)
    if mod is not None and any(wanted):
        sums = iter(total for total, _ in pairs)
        mod.add_to_captures([next(sums) if want else None for want in wanted], g.dcaptures)


def serves_backward(setup: Setup) -> bool:
    """Whether the Hopper kernel computes this backward."""
    D, _, DV, _ = setup.dims
    m, n = setup.mask.block_size
    return (
        setup.dtype in _GLUON and setup.describable and max(D, DV) <= 128
        and m % 128 == 0 and n % _KEYS == 0
    )  # fmt: skip


def serves_forward(setup: Setup) -> bool:
    """Whether the Hopper kernel computes this forward."""
    D, _, DV, _ = setup.dims
    block_n = 64 if max(D, DV) > 128 else 128
    m, n = setup.mask.block_size
    return (
        setup.dtype in _GLUON and setup.describable and m % _QUERIES == 0 and n % block_n == 0
    )  # fmt: skip


def _padded(D: int) -> int:
    """At least one row of 128 bytes."""
    return max(64, 1 << (D - 1).bit_length())


def _leading(lists: BlockLists, tiles: int, heads: int, device: torch.device) -> int:
    """How many of a head's tiles come head by head; see `hopper_common.head_and_place`. Those that
    remain for the end are as much work as the longest tile is for all multiprocessors.

    Args:
        tiles: per block. heads: in all.
    """
    remaining = np.cumsum(lists.work[::-1])[::-1] * tiles * heads
    enough = remaining >= lists.work.max(initial=0) * _multiprocessors(device)
    return int(np.count_nonzero(enough)) * tiles


def _is_describable(x: Tensor) -> bool:
    return x.stride(3) == 1 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> NVMMASharedLayout:
    return NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """As `triton_setup.described`, for Gluon."""
    return _descriptor(x, [1, 1, rows, columns], _layout(rows, columns, x.dtype))


def _described_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """Row terms, flat."""
    return _descriptor(x.view(-1), [rows], _ROWS_LAYOUT)


def _descriptor(x: Tensor, block: list[int], layout: NVMMASharedLayout) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)  # its checks cost a launch's time
    descriptor.base, descriptor.shape, descriptor.strides = x, list(x.shape), list(x.stride())
    descriptor.block_shape, descriptor.layout, descriptor.padding = block, layout, "zero"
    return descriptor


class _Counters:
    """A ring of pairs of zeros, which every launch leaves as it found them."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.zeros(_COUNTERS, 4, dtype=torch.int32, device=device)
        self.pairs = [self.pool[i] for i in range(_COUNTERS)]
        self.next = 0


_rings: dict[torch.device, _Counters] = {}


def _counters(device: torch.device) -> Tensor:
    ring = _rings.get(device)
    if ring is None:
        ring = _rings[device] = _Counters(device)
    ring.next = (ring.next + 1) % _COUNTERS
    return ring.pairs[ring.next]
