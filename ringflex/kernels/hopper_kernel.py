"""The kernel contract on Hopper GPUs (sm_90), in Gluon: what to launch, with what.

What these kernels do not serve goes to the portable Triton kernel, launch by launch:

- tensors whose strides or addresses TMA cannot take, or `tma=False`;
- `tiles` by hand, or `tune`, which are of that kernel;
- a backward with head dims above 128, or that must be deterministic (or `backward="two_pass"`), as
  this one adds up dQ in any order;
- a backward of fewer tiles of keys than half the multiprocessors, as its two passes fill them
  together; but not over several GPUs, in whose steps they would visit all queries, most of which
  see nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflex.kernels import triton_kernel
from ringflex.kernels.block_lists import BlockLists, key_lists, query_lists
from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Tile, Way
from ringflex.kernels.hopper_backward import hopper_backward_kernel
from ringflex.kernels.hopper_forward import hopper_forward_kernel
from ringflex.kernels.hopper_launch import (
    counters,
    described,
    described_flat,
    described_in_lines,
    has_lines,
    in_sections,
    l2_cache,
    multiprocessors,
    queue,
)
from ringflex.kernels.mod_tables import gradient_arguments
from ringflex.kernels.pieces import keys_in_pieces, tail_of
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_kernel import RowTerms, round_queries, sum_of_queries
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_math import ADD, unchanged
from ringflex.kernels.triton_merge import Merge
from ringflex.kernels.triton_mods import accumulators, kind_of, score_mod
from ringflex.kernels.triton_setup import Setup, alignment, describable, strided
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.traced_mod import TracedMod

__all__ = [
    "backward", "blocks_at_once", "forward", "has_separate_passes", "joins", "may_overlap",
    "row_terms",
]  # fmt: skip

may_overlap = True  # see `contract`
joins = True  # see `contract`
_STAYS = 128  # queries of a forward tile, keys of a backward tile
_GROUP = 64  # of them, to a warpgroup
_REGISTERS = (240, 24)  # per thread of the consumers and the producer
_LARGEST_BACKWARD_DIM = 128
_EVEN = 0.75  # mean work of rows over the longest's, from which on heads of a group stay together
_FEW, _MANY = 0.5, 10  # tiles of keys per multiprocessor
_FORWARD_LIFE, _BACKWARD_LIFE = 1e10, 3.5e10  # FLOP of a program: about 2 and 8 ms
_TABLES = 40  # a mask's tensors and their sizes, for which full shared memory has room
_KEPT = 0.75  # of the L2 cache, what programs may walk out of step


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
    setup = Setup.of(q, k, v, mask, options)
    inputs = (q, k, v, *(more or ()))
    if (
        _by_hand(options)
        or not setup.describable
        or alignment(*inputs)
        or (more and not all(map(describable, more)))
    ):
        triton_kernel.forward(
            q, k, v, mask, score, scale, before, after, options, stage, running, beside, more,
            behind,
        )  # fmt: skip
        return
    mod = score_mod(score, q.device, options)
    merge = Merge.of(before, after, stage, running)
    score_function = None if mod is None else mod.function()
    if mod is None and scale <= 0:  # the kernel takes a positive scale out of the maximum
        score_function = unchanged
    D, Dv, D_PAD, DV_PAD = _dims(setup)
    block_n = 128 if max(D, Dv) <= 128 else 64
    key = (
        "hopper forward", kind_of(mod), score_function, merge.key, stage, beside,
        behind and behind.times, more and tuple(x.stride() for x in more),
    )  # fmt: skip
    ready = setup.prepared.get(key)
    if ready is None:
        lists = query_lists(mask, q.device, stage)
        tiles_m, tiles_n = mask.block_size[0] // _STAYS, mask.block_size[1] // block_n
        heads = setup.batch * setup.heads
        stages = 4 if max(D, Dv) <= 64 else 2
        ahead = _ahead(setup, lists, alone=score_function is None and not merge.staged)
        per_block = _STAYS * mask.block_size[1] * 2 * (D + Dv)  # FLOP
        flops = float(lists.work.sum()) * heads * tiles_m * per_block
        programs = queue(
            heads * lists.places * tiles_m, flops, q.device, beside, _FORWARD_LIFE,
            way=behind,
        )  # fmt: skip
        lists, sections = in_sections(lists, tiles_m, heads, q.device, programs, backwards=True)
        ready = Prepared(
            hopper_forward_kernel,
            (programs.number, 1, 1),
            (
                *setup.query_lists(lists, stage), setup.mask_mod.tables,
                setup.lengths[0], *setup.lengths[2:], setup.heads, setup.group, lists.places,
                *setup.row_strides(lists), setup.kv_stride,
                setup.group, heads, sections, k.shape[2] if more else None,
            ),
            (
                setup.mask_mod.function, score_function, setup.has_partial(lists),
                setup.positions.kv_in_order, *merge.constants,
                block_n, tiles_m, tiles_n, D_PAD, Dv, DV_PAD, stages, ahead, *_REGISTERS,
            ),
            Tile(_STAYS, block_n, 4, stages),
        )  # fmt: skip
        setup.keep(key, ready)
    ready(
        described(q, _GROUP, D_PAD), described(k, block_n, D_PAD), described(v, block_n, DV_PAD),
        described(more[0], block_n, D_PAD) if more else None,
        described(more[1], block_n, DV_PAD) if more else None,
        *merge.arguments, counters(q.device, behind), () if mod is None else mod.arguments, scale,
    )  # fmt: skip


def _ahead(setup: Setup, lists: BlockLists, alone: bool) -> bool:
    """Whether a forward loads queries a tile ahead, and writes whole rows: 1.5 to 2 us less for a
    tile. In fp16 not where the main loop takes longer for it, as the assembler then orders it in
    another way; by measurement.

    alone: without a score mod, and without queries that begin in one step and end in another.
    """
    largest = max(setup.dims[0], setup.dims[2])
    if setup.dtype == torch.bfloat16:
        return alone and largest <= 128
    return alone and (largest <= 64 if setup.has_partial(lists) else 64 < largest <= 128)


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
) -> RowTerms:
    """See `contract`. Weights times the scale, of which dQ and dK need not be multiplied by it, if
    there is no score mod; in fp16, small ones would lose bits."""
    scaled = score is None and scale > 0 and dout.dtype == torch.bfloat16
    factor = scale if scaled and not apart else 1.0
    return triton_kernel.row_terms(
        dout, out, lse, dlse, q, mask, score, scale, options, apart, factor
    )


def blocks_at_once(q: Tensor, block_size: int) -> float:
    """See `contract`."""
    return multiprocessors(q.device) * _STAYS / block_size


def has_separate_passes(q: Tensor, v: Tensor, options: KernelOptions, beside: bool) -> bool:
    """See `contract`."""
    asked_for = options.deterministic or options.backward == "two_pass" or _by_hand(options)
    return (
        asked_for
        or max(q.shape[3], v.shape[3]) > _LARGEST_BACKWARD_DIM
        or (not beside and options.backward == "auto" and _has_few_tiles(v))
    )


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
    if has_separate_passes(q, v, options, g.beside):
        triton_kernel.backward(dout, q, k, v, terms, mask, score, scale, g, options)
        return
    assert g.dq is not None and g.dk is not None and g.dv is not None
    setup = Setup.of(q, k, v, mask, options)
    dout = dout if describable(dout) else dout.contiguous()
    tiles = setup.batch * setup.kv_heads * mask.kv_blocks * (mask.block_size[1] // _STAYS)
    many = terms.delta.numel() >= 2**31  # row terms, whose places are counted in 32 bits
    fit = setup.describable and describable(dout) and q.shape[3] % 4 == 0  # rows of dQ are fp32
    if many or not fit or alignment(q, k, v, dout):
        if g.running_q is not None:  # which is added to, as it may be by other calls meanwhile
            options = replace(options, backward="one_pass")
        terms = _without_factor(terms)
        triton_kernel.backward(dout, q, k, v, terms, mask, score, scale, g, options)
        return
    mod = score_mod(score, q.device, options)
    wanted = () if mod is None else mod.wanted([d is not None for d in g.dcaptures])
    pairs = [] if mod is None else accumulators(mod, wanted)
    dq = sum_of_queries(g)
    members = _heads_of_a_tile(setup, q.device, tiles if g.beside else None)
    stretches = _stretches(setup, q.device, g.beside)
    if stretches > 1:
        members = 1
    apart = members < setup.group or stretches > 1
    dk, dv = _sums_of_keys(g) if apart else (g.dk, g.dv)
    score_function = None if mod is None else mod.function()
    D, Dv, D_PAD, DV_PAD = _dims(setup)
    small = max(D, Dv) <= 64 and mod is None and len(setup.mask_mod.tables) <= _TABLES
    block_m = 128 if small else 64  # what registers and shared memory allow
    # Whether each group of consumers computes every other tile's dQ. That was slower where D_PAD
    # is 64, and has not been tried with score mods.
    in_turn = mod is None and D_PAD == 128 and has_lines(dq)
    by_tma = apart and has_lines(dk) and has_lines(dv) and not alignment(dk, dv)
    by_tma &= block_m * D_PAD >= 2 * _GROUP * _GROUP  # where room is left for that
    key = (
        "hopper backward", members, stretches, g.beside, g.behind and g.behind.times,
        kind_of(mod), score_function, dout.stride(), dk.dtype, dk.stride(), dv.stride(),
        tuple(wanted), alignment(dk, dv), terms.factor == 1, in_turn, by_tma,
    )  # fmt: skip
    ready = setup.prepared.get(key)
    if ready is None:
        lists = key_lists(mask, members, q.device, descending=True, stretches=stretches)
        units = setup.batch * setup.heads // members
        tiles_m, tiles_n = mask.block_size[0] // block_m, mask.block_size[1] // _STAYS
        if apart and stretches == 1 and not g.beside:
            tail = tail_of(lists, units * tiles_n, q.device)
            lists = lists if tail is None else keys_in_pieces(mask, lists, tail, q.device)
        programs = queue(
            units * lists.places * tiles_n, _backward_flops(setup, lists), q.device, g.beside,
            _BACKWARD_LIFE, way=g.behind,
        )  # fmt: skip
        lists, sections = in_sections(lists, tiles_n, units, q.device, programs, backwards=False)
        score_gradient = None
        if mod is not None:
            score_gradient = mod.gradient(wanted or [False] * len(mod.tables))
        ready = Prepared(
            hopper_backward_kernel,
            (programs.number, 1, 1),
            (
                *setup.key_lists(lists), setup.mask_mod.tables, *setup.lengths[1:],
                terms.delta.shape[2], setup.heads, setup.group, members, lists.places,
                *setup.row_strides(lists), *setup.order_strides(lists, setup.heads // members),
                mask.kv_blocks, setup.kv_stride, 1, units, sections,
            ),
            (
                setup.mask_mod.function, score_function, score_gradient, ADD.value,
                setup.has_partial(lists), setup.positions.kv_in_order, apart, by_tma,
                terms.factor != 1, block_m, tiles_m, tiles_n, D, D_PAD, Dv, DV_PAD, 2, *_REGISTERS,
            ),
            Tile(block_m, _STAYS, 4, 2),
        )  # fmt: skip
        setup.keep(key, ready)
    columns = 128 if in_turn else _GROUP  # what dQ leaves room for
    g.make_room()
    ready(
        described(q, block_m, D_PAD), described(k, _GROUP, D_PAD), described(v, _GROUP, DV_PAD),
        described(dout, block_m, DV_PAD), *(described_flat(x, block_m) for x in terms[:2]),
        _described_dq(dq, block_m, D_PAD, in_turn),
        described_in_lines(dk, min(D_PAD, columns)) if by_tma else strided(dk),
        described_in_lines(dv, min(DV_PAD, columns)) if by_tma else strided(dv),
        counters(q.device, g.behind), () if mod is None else mod.arguments,
        gradient_arguments(pairs), scale,
    )  # fmt: skip
    round_queries(g, dq)
    if dk is not g.dk:
        g.dk.copy_(dk)
        g.dv.copy_(dv)
    if mod is not None and any(wanted):
        sums = iter(total for total, _ in pairs)
        mod.add_to_captures([next(sums) if want else None for want in wanted], g.dcaptures)


def _described_dq(dq: Tensor, block_m: int, padded: int, in_turn: bool) -> TensorDescriptor:
    """What a group of consumers adds at once: dQ of a tile, or half of it."""
    if in_turn:
        return described_in_lines(dq, padded)
    return described(dq, block_m * padded // (2 * _GROUP), _GROUP)


def _has_few_tiles(v: Tensor) -> bool:
    """Whether a backward would leave half of the multiprocessors without a tile of keys; never when
    compiling."""
    tiles = v.shape[0] * v.shape[1] * -(-v.shape[2] // _STAYS)
    return v.device.type == "cuda" and tiles <= _FEW * multiprocessors(v.device)


def _heads_of_a_tile(setup: Setup, device: torch.device, beside: int | None) -> int:
    """Query heads that a tile of keys serves: its whole group, so that dK and dV are written once;
    or one, where rows are of unequal work, or where programs walk the same queries at the same
    time, and those of a group take more than half of the L2 cache. Kept on the mask.

    beside: tiles of whole groups, if other kernels' programs come between theirs: where these are
        few and long, they would not end at about the same time, so each serves a part of a group.
    """
    if beside is not None:
        enough = _MANY * multiprocessors(device)
        parts = (n for n in range(1, setup.group) if setup.group % n == 0 and beside * n > enough)
        members = setup.group // next(parts, setup.group)
        if members < setup.group:
            return members
    mask = setup.mask
    key = ("heads of a tile", setup.group, setup.dims, device)
    if key not in mask.cache:
        lists = key_lists(mask, setup.group, device, descending=True)
        walked = _walked(setup, device)
        apart = lists.begin_together and 2 * setup.group * walked > l2_cache(device)
        apart |= bool(lists.work.mean() < _EVEN * lists.work.max())
        mask.cache[key] = 1 if apart else setup.group
    heads: int = mask.cache[key]
    return heads


def _stretches(setup: Setup, device: torch.device, beside: bool) -> int:
    """Into how many stretches to part the queries, so that those of a head stay in the L2 cache:
    programs that begin at any time, beside other kernels, walk them out of step. Kept on the mask.
    """
    if not beside:
        return 1
    mask = setup.mask
    key = ("stretches", setup.group, setup.dims, device)
    if key not in mask.cache:
        cache, whole = l2_cache(device), mask.q_blocks * mask.block_size[0] * _per_query(setup)
        fits = _walked(setup, device) <= _KEPT * cache
        mask.cache[key] = 1 if fits else math.ceil(2 * whole / cache)
    stretches: int = mask.cache[key]
    return stretches


def _backward_flops(setup: Setup, lists: BlockLists) -> float:
    per_pair = 6 * setup.dims[0] + 4 * setup.dims[2]
    pairs = float(lists.work.sum()) * math.prod(setup.mask.block_size)  # of a head
    return pairs * setup.batch * setup.heads * per_pair


def _walked(setup: Setup, device: torch.device) -> float:
    """Bytes that a tile of keys reads of a head; the mean, by work."""
    work = key_lists(setup.mask, setup.group, device, descending=True).work
    blocks = float((work**2).sum() / max(1, work.sum()))
    return blocks * setup.mask.block_size[0] * _per_query(setup)


def _per_query(setup: Setup) -> int:
    """Bytes of q, dout, and dQ in fp32."""
    return 6 * setup.dims[0] + 2 * setup.dims[2]


def _sums_of_keys(g: Gradients) -> tuple[Tensor, Tensor]:
    """Where heads of a group, or stretches of queries, add dK and dV, in fp32: zeros."""
    assert g.dk is not None and g.dv is not None
    g.make_room()
    if g.dk.dtype == torch.float32:
        return g.dk.zero_(), g.dv.zero_()
    sizes = g.dk.numel(), g.dv.numel()
    dk, dv = torch.zeros(sum(sizes), dtype=torch.float32, device=g.dk.device).split(sizes)
    return dk.view(g.dk.shape), dv.view(g.dv.shape)


def _by_hand(options: KernelOptions) -> bool:
    return bool(options.tiles) or options.tune


def _without_factor(terms: RowTerms) -> RowTerms:
    if terms.factor == 1:
        return terms
    return RowTerms(terms.lse_log2 + math.log2(terms.factor), terms.delta)


def _dims(setup: Setup) -> tuple[int, int, int, int]:
    """D, Dv, and both padded: rows of shared memory are of 128 bytes at least."""
    D, D_PAD, Dv, DV_PAD = setup.dims
    return D, Dv, max(64, D_PAD), max(64, DV_PAD)
