"""What the launches for one mask and one kind of tensors have in common, worked out once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflex.kernels.block_lists import BlockLists, positions
from ringflex.kernels.contract import KernelOptions, Tile
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_mods import ScoreMod, mask_mod
from ringflex.kernels.triton_tiles import architecture, fit_blocks, tile_for
from ringflex.masks.block_mask import BlockMask

_KEPT = 64  # prepared launches
_LARGEST_TILE = 256  # tokens


class Setup:
    """For one mask, and q, k, v of one shape, dtype, layout and device. Kept on the mask."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: KernelOptions
    ) -> None:
        self._mask, self.options = weakref.ref(mask), options
        self.where = architecture(q.device)
        self.batch, self.heads, self.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        self.group = self.heads // self.kv_heads
        self.dtype = q.dtype
        self.mask_mod = mask_mod(mask, q.device)
        self.positions = positions(mask, q.device)
        self.kv_stride = mask.kv_blocks if mask.kv_starts.shape[0] > 1 else 0
        self.lengths = (q.shape[2], k.shape[2], mask.q_limit, mask.kv_limit)
        D, Dv = q.shape[3], v.shape[3]
        self.dims = (D, padded_dim(D), Dv, padded_dim(Dv))
        self.describable = self._descriptors_serve() and all(map(describable, (q, k, v)))
        self.far_apart = any(nearby(x) is not x for x in (q, k, v))
        self.prepared: dict[Any, Prepared] = {}

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: KernelOptions) -> Setup:
        """The setup for these tensors, from the mask's cache if there is one."""
        key = (
            q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.device,
            options, torch.get_float32_matmul_precision(),
        )  # fmt: skip
        found = mask.cache.get(key)
        if found is None:
            found = mask.cache[key] = cls(q, k, v, mask, options)
        return found

    @property
    def mask(self) -> BlockMask:
        """By a weak reference: the mask keeps this, and would outlive its last use in a cycle."""
        mask = self._mask()
        assert mask is not None
        return mask

    def _descriptors_serve(self) -> bool:
        new = self.where.name == "cuda" and self.where.capability >= (9, 0)
        return self.options.tma and (new or self.where.name == "interpreter")

    @property
    def precision(self) -> str:
        """Of fp32 products, as `torch.set_float32_matmul_precision` has it."""
        return _PRECISION[torch.get_float32_matmul_precision()]

    @property
    def scores_visited(self) -> int:
        """Upper bound of the scores that the kernels compute."""
        repeats = self.batch if self.mask.B == 1 else 1
        repeats *= self.heads if self.mask.H == 1 else 1
        return self.mask.visible_blocks * math.prod(self.mask.block_size) * repeats

    def prepare(
        self,
        key: Any,
        kernel: str,
        score: ScoreMod | None,
        prepare: Callable[[Tile], Prepared],
        arguments: Callable[[Tile], tuple[Any, ...]] | None,
    ) -> Prepared:
        """A kernel for `key`, kept in `prepared`, with the user's tile, the table's, or the
        fastest if asked to measure.

        Args:
            kernel: "forward", "key" or "query".
            arguments: what to call it with; None if it must not be launched twice.
        """
        tile = self._tile_asked_for(kernel)
        if tile is None:
            dims = (self.dims[1], self.dims[3])
            kinds = (self.mask_mod.looks_up, score is not None)
            tile = tile_for(kernel, self.where, self.dtype, dims, self.mask.block_size, *kinds)
            if self.options.tune and arguments is not None:
                from ringflex.kernels.triton_tuning import fastest_tile

                run = lambda t: prepare(t)(*arguments(t))
                tile = fastest_tile(kernel, run, tile, self, score)
        return self.keep(key, prepare(tile))

    def keep(self, key: Any, prepared: Prepared) -> Prepared:
        """In `prepared`; the oldest goes when they are many."""
        if len(self.prepared) >= _KEPT:  # an annealed number in a mod is another mod every step
            self.prepared.pop(next(iter(self.prepared)))
        self.prepared[key] = prepared
        return prepared

    def _tile_asked_for(self, kernel: str) -> Tile | None:
        for name, tile in self.options.tiles:
            if name == kernel:
                return fit_blocks(tile, self.mask.block_size)
        return None

    def tiles(self, tile: Tile) -> tuple[int, int, int, int]:
        """Tokens per tile, and tiles per block of the mask."""
        m, n = self.mask.block_size
        return tile.block_m, tile.block_n, m // tile.block_m, n // tile.block_n

    def key_lists(self, lists: BlockLists) -> tuple[Tensor, ...]:
        return lists.rows, lists.runs, lists.order, self.positions.q, self.positions.kv

    def query_lists(self, lists: BlockLists, stage: Stage | None) -> tuple[Tensor, ...]:
        turns = lists.order if stage is None else stage.on(lists.order.device)
        return lists.rows, lists.runs, lists.order, turns, self.positions.q, self.positions.kv

    def has_partial(self, lists: BlockLists) -> bool:
        """Whether the loop over partial blocks is compiled. A mask that is more than its padding
        has it always, so that not every batch of documents compiles anew."""
        return lists.any_partial or self.mask_mod.function is not None

    def row_strides(self, lists: BlockLists) -> tuple[int, int]:
        """Rows between batch elements and heads, where the mask distinguishes them."""
        by_head = lists.blocks if self.mask.H > 1 else 0
        return lists.blocks * self.mask.H if self.mask.B > 1 else 0, by_head

    def order_strides(self, lists: BlockLists, units: int) -> tuple[int, int]:
        """The same of `lists.order`, for lists of keys: heads of a group have one order; or as
        many heads as make `units` of all."""
        apart = self.mask.H > 1
        per_batch = lists.blocks * (units if apart else 1)
        return per_batch if self.mask.B > 1 else 0, lists.blocks if apart else 0


_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def padded_dim(D: int) -> int:
    """Powers of two, at least 16, which matrix products want."""
    return max(16, 1 << (D - 1).bit_length())


def strided(x: Tensor) -> tuple[Any, ...]:
    """A tensor as kernels take it without a descriptor."""
    return (x, *x.stride())


def encoded_rows(x: Tensor) -> tuple[Any, ...]:
    """`x [B, H, S]` for `row_places`: Triton would compile anew for strides that are 1 or a
    multiple of 16; as `2 n + 3`, none is."""
    b, h, s = x.stride()
    return x, 2 * b + 3, 2 * h + 3, 2 * s + 3


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can say how `x [B, H, S, D]` lies in memory."""
    *outer, last = x.stride()
    size = x.element_size()
    regular = all(s > 0 and s * size % 16 == 0 for s in outer)
    return last == 1 and regular and x.shape[3] * size >= 16


def alignment(*tensors: Tensor) -> int:
    """A bit for each tensor: 1 if it does not begin at a multiple of 16 bytes, as descriptors want
    and Triton compiles for."""
    bits = 0
    for i, x in enumerate(tensors):
        if x.data_ptr() & 15:
            bits |= 1 << i
    return bits


def nearby(x: Tensor) -> Tensor:
    """`x [B, H, S, D]`, or a copy if a tile of it spans 2^31 elements: kernels count them in 32
    bits within a tile, in 64 bits up to it."""
    span = _LARGEST_TILE * x.stride(2) + x.shape[3] * x.stride(3)
    return x if span < 2**31 else x.contiguous()


def shares(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors begin at the same place in memory."""
    return x.data_ptr() == y.data_ptr()


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A `describable`, aligned tensor by descriptor, read in tiles of `rows` x `columns`."""
    descriptor = object.__new__(TensorDescriptor)  # its checks are those, and cost a launch's time
    descriptor.base, descriptor.shape, descriptor.strides = x, list(x.shape), list(x.stride())
    descriptor.block_shape = [1] * (x.ndim - 2) + [rows, columns]
    descriptor.padding = "zero"
    return descriptor
