"""Block-sparse flex attention in plain PyTorch: any device, any dtype, the readable one.

Forward, per row i of queries over the visible keys j (online softmax, Milakov and Gimelshein,
2018; partial results merged as in Rabe and Staats, "Self-attention does not need O(n^2) memory",
2021):

    s_ij = score_mod(scale * q_i . k_j),  lse_i = log sum_j exp(s_ij),
    out_i = sum_j exp(s_ij - lse_i) v_j

Backward (Dao et al., "FlashAttention", 2022, appendix B), with the global lse and
delta_i = dout_i . out_i - dlse_i:

    p_ij = exp(s_ij - lse_i),  ds_ij = p_ij (dout_i . v_j - delta_i),  dv_j = sum_i p_ij dout_i

and ds goes through the derivative of score_mod before dq = scale ds k, dk = scale ds^T q.

Only visible blocks are touched, in chunks of a few million scores (see `tiles`). Half precision
inputs are multiplied and accumulated in fp32, fp64 in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Way, compute_dtype
from ringflex.kernels.device_arrays import ready_for_current_stream
from ringflex.kernels.stages import Stage
from ringflex.kernels.tiles import Chunk, chunks_of
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.traced_mod import TracedMod

_SCORES_IN_FLIGHT = {"cpu": 1 << 20, "cuda": 1 << 26}
_ELEMENTS_KEPT = 1 << 26  # of a mask evaluated in partial blocks, one byte each

may_overlap = False  # see `contract`
joins = True  # see `contract`


class RowTerms(NamedTuple):
    """lse and `delta = dout . out - dlse`, `[B, Hq, q_len]`, in the compute dtype."""

    lse: Tensor
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
    stage: Stage | None = None,
    running: Partial | None = None,
    beside: bool = False,
    more: tuple[Tensor, Tensor] | None = None,
    behind: Way | None = None,
) -> None:
    """See `contract`."""
    if more is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), more, strict=True))
    if stage is not None:
        assert after.out is not None and (before is None or before.out is None)
        running = running or after.in_between()
        assert running.out is not None
        stage.begin(running.out, 0.0)
        stage.begin(running.lse, -torch.inf if before is None else before.lse)
        forward(q, k, v, mask, score, scale, running, running, options)
        stage.end(running.out, after.out)
        stage.end(running.lse, after.lse)
        return
    dtype = compute_dtype(q.dtype)
    assert after.out is not None
    # These are after's own tensors if they have the right dtypes.
    running_out, running_lse = after.out.to(dtype), after.lse.to(torch.float64)
    if before is None or before.out is None:
        running_out.zero_()
    elif before.out is not running_out:
        running_out.copy_(before.out)
    if before is None:
        running_lse.fill_(-torch.inf)
    elif before.lse is not running_lse:
        running_lse.copy_(before.lse)
    tiles = _Tiles(q, k, v, mask, score, scale)
    out, lse = tiles.query_blocks(running_out), tiles.query_blocks(running_lse)
    for chunk in tiles.chunks:
        s, _ = tiles.scores(
            chunk, tiles.read_queries(tiles.q, chunk), tiles.read_keys(tiles.k, chunk)
        )
        top = s.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0)
        p = s.sub_(top).exp_()
        total = p.sum(-1)
        part = tiles.by_query(p) @ tiles.read_keys(tiles.v, chunk)
        part = part.view(*p.shape[:-1], -1) / total.masked_fill(total == 0, 1)[..., None]
        merged = _merge(
            tiles.read_queries(out, chunk),
            tiles.read_queries(lse, chunk),
            part,
            total.log() + top.squeeze(-1),
        )
        for x, value in zip((out, lse), merged, strict=True):
            tiles.write_queries(x, chunk, value)
    tiles.store(running_out, out)
    tiles.store(running_lse, lse)
    if after.out is not running_out:
        after.out.copy_(running_out)
    if after.lse is not running_lse:
        after.lse.copy_(running_lse)


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
    """See `contract`."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = (delta - dlse).masked_fill(lse == -torch.inf, 0)  # dlse may be NaN there
    return RowTerms(lse, delta)


def blocks_at_once(q: Tensor, block_size: int) -> float:
    """See `contract`."""
    return 1.0


def has_separate_passes(q: Tensor, v: Tensor, options: KernelOptions, beside: bool) -> bool:
    """See `contract`."""
    return False


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
    dtype, g = compute_dtype(q.dtype), gradients
    assert g.dq is not None and g.dk is not None and g.dv is not None
    if g.stage is not None:
        assert g.running_q is not None
        g.stage.begin(g.running_q, 0.0)
    targets = (g.dq if g.running_q is None else g.running_q, g.dk, g.dv)
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (g.dk, g.dv))
    dq = torch.zeros_like(g.dq, dtype=dtype) if g.running_q is None else g.running_q
    tiles = _Tiles(q, k, v, mask, score, scale)
    dout_, lse_, delta_, dq_ = (tiles.query_blocks(x) for x in (dout, *terms, dq))
    dk_, dv_ = tiles.key_blocks(dk), tiles.key_blocks(dv)
    for chunk in tiles.chunks:
        q_c, k_c = tiles.read_queries(tiles.q, chunk), tiles.read_keys(tiles.k, chunk)
        dout_c = tiles.by_query(tiles.read_queries(dout_, chunk))
        lse_c = tiles.read_queries(lse_, chunk)
        s, pull_back = tiles.scores(chunk, q_c, k_c, gradients.dcaptures)
        # A row that sees nothing has lse = -inf; exp(s - inf) = 0 for all its scores.
        p = s.sub_(lse_c.masked_fill(lse_c == -torch.inf, torch.inf)[..., None]).exp_()
        ds = (dout_c @ tiles.read_keys(tiles.v, chunk).mT).view_as(p)
        ds = ds.sub_(tiles.read_queries(delta_, chunk)[..., None]).mul_(p)
        tiles.add_keys(dv_, chunk, tiles.by_query(p).mT @ dout_c)
        ds = tiles.by_query(pull_back(ds)).mul_(scale)
        dq_c = tiles.read_queries(dq_, chunk)
        tiles.write_queries(dq_, chunk, dq_c + (ds @ k_c).view_as(dq_c))
        tiles.add_keys(dk_, chunk, ds.mT @ tiles.by_query(q_c))
    for target, x, blocks in zip(targets, (dq, dk, dv), (dq_, dk_, dv_), strict=True):
        tiles.store(x, blocks)
        if target is not x:
            target.copy_(x)
    if g.stage is not None and g.running_q is not None:
        g.stage.end(g.running_q, g.dq)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges two partial results of the same queries; two empty ones stay empty."""
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    finite = total.masked_fill(total == -torch.inf, 0)
    mine, theirs = ((x - finite).exp().to(out.dtype) for x in (lse, part_lse))
    return out * mine[..., None] + part * theirs[..., None], total


_PullBack = Callable[[Tensor], Tensor]


def _identity(ds: Tensor) -> Tensor:
    return ds


@contextmanager
def _repeatable(captures: Sequence[Tensor]) -> Iterator[None]:
    """On a CPU, gradients of indexed rows are otherwise added in parallel, in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if any(c.device.type == "cpu" for c in captures):
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _hide(s: Tensor, hidden: Tensor | None) -> Tensor:
    """A copy of `s` with -inf where hidden (what a mod returned may be its own tensor)."""
    return s.clone() if hidden is None else s.masked_fill(hidden, -torch.inf)


def _pad(x: Tensor, length: int) -> Tensor:
    """Zeros after the tokens of `x [B, H, tokens, ...]` up to `length`."""
    missing = length - x.shape[2]
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing)) if missing else x


class _Tiles:
    """Reads and writes the tiles of chunks. `G` query heads share a K/V head; `X` = `Hkv, G`, or
    `1, 1` where the items of the mask are single heads."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        score: TracedMod | None,
        scale: float,
    ) -> None:
        self.mask, self.score, self.scale = mask, score, scale
        self.dtype = compute_dtype(q.dtype)
        self.batch, self.heads = q.shape[:2]
        self.kv_heads = k.shape[1]
        self.groups = self.heads // self.kv_heads
        self.q, self.k, self.v = self.query_blocks(q), self.key_blocks(k), self.key_blocks(v)
        if ("mod", q.device) not in mask.cache:
            mask.cache["mod", q.device] = mask.mask.to(q.device)
        self.mod: TracedMod = mask.cache["mod", q.device]
        # Half-precision captures are read in fp32, so that their gradients are summed in fp32.
        self.captures = [
            c.detach().to(torch.promote_types(c.dtype, torch.float32))
            if c.is_floating_point()
            else c
            for c in (() if score is None else score.captures)
        ]
        self.chunks = chunks_of(
            mask,
            self.batch,
            self.heads,
            elements=_SCORES_IN_FLIGHT.get(q.device.type, _SCORES_IN_FLIGHT["cuda"]),
            device=q.device,
        )
        ready_for_current_stream(x for chunk in self.chunks for x in vars(chunk).values())

    def query_blocks(self, x: Tensor) -> Tensor:
        """`[B, Hq, q_len, ...]` -> `[B, Hkv, G, q blocks, bq, ...]`, a view unless padded."""
        x = _pad(x, self.mask.q_blocks * self.mask.block_size[0])
        return x.unflatten(2, (-1, self.mask.block_size[0])).unflatten(1, (-1, self.groups))

    def key_blocks(self, x: Tensor) -> Tensor:
        """`[B, Hkv, kv_len, ...]` -> `[B, Hkv, kv blocks, bk, ...]`, a view unless padded."""
        x = _pad(x, self.mask.kv_blocks * self.mask.block_size[1])
        return x.unflatten(2, (-1, self.mask.block_size[1]))

    def store(self, x: Tensor, blocks: Tensor) -> None:
        """Writes padded blocks back; blocks that are a view of `x` are there already."""
        if blocks.data_ptr() != x.data_ptr():
            blocks = blocks.flatten(1, 2) if blocks.ndim > x.ndim + 1 else blocks
            x.copy_(blocks.flatten(2, 3)[:, :, : x.shape[2]])

    def read_queries(self, x: Tensor, chunk: Chunk) -> Tensor:
        """`[R, X, bq, ...]` in the compute dtype, or in fp64 if `x` is."""
        if chunk.head is None:
            part = x[chunk.b, :, :, chunk.row]
        else:
            kv_head, member = chunk.head // self.groups, chunk.head % self.groups
            part = x[chunk.b, kv_head, member, chunk.row][:, None, None]
        return part.to(torch.promote_types(x.dtype, self.dtype))

    def write_queries(self, x: Tensor, chunk: Chunk, value: Tensor) -> None:
        if chunk.head is None:
            x[chunk.b, :, :, chunk.row] = value
        else:
            kv_head, member = chunk.head // self.groups, chunk.head % self.groups
            x[chunk.b, kv_head, member, chunk.row] = value[:, 0, 0]

    def by_query(self, x: Tensor) -> Tensor:
        """`[R, Hkv, G, bq, n]` -> `[R * Hkv, G * bq, n]`: a group's queries share their keys."""
        return x.flatten(2, 3).flatten(0, 1)

    def _key_index(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Batch element, K/V head and block, broadcast to `[R, Hkv or 1, L]`."""
        if chunk.head is None:
            heads = torch.arange(self.kv_heads, device=chunk.b.device)[None, :, None]
        else:
            heads = (chunk.head // self.groups)[:, None, None]
        return chunk.b[:, None, None], heads, chunk.blocks[:, None, :]

    def read_keys(self, x: Tensor, chunk: Chunk) -> Tensor:
        """`[R * Hkv, L * bk, ...]` in the compute dtype."""
        return x[self._key_index(chunk)].to(self.dtype).flatten(2, 3).flatten(0, 1)

    def add_keys(self, x: Tensor, chunk: Chunk, value: Tensor) -> None:
        """Adds `[R * Hkv, L * bk, n]`, in a fixed order also where items share K/V blocks."""
        b, head, block = self._key_index(chunk)
        index = ((b * self.kv_heads + head) * self.mask.kv_blocks + block).reshape(-1)
        rows = value.reshape(index.numel(), -1)
        if x.device.type == "cpu":
            x.view(-1, rows.shape[1]).index_add_(0, index, rows)
        else:  # index_add_ is atomic on a GPU; this sorts first
            x.view(-1, rows.shape[1]).index_put_((index,), rows, accumulate=True)

    def scores(
        self, chunk: Chunk, q: Tensor, k: Tensor, dcaptures: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, _PullBack]:
        """Scores `[R, X, bq, L * bk]`, -inf where masked, for the caller to overwrite; and the way
        back through score_mod."""
        shape = (*q.shape[:-1], k.shape[1])
        q = self.by_query(q)
        s = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=self.scale).view(shape)
        hidden = self._hidden(chunk)
        if self.score is None:
            return (s if hidden is None else s.masked_fill_(hidden, -torch.inf)), _identity
        b, h, q_idx, kv_idx = self._indices(chunk)
        q_idx = q_idx.clamp(max=self.mask.q_limit - 1)  # what is beyond is hidden
        kv_idx = kv_idx.clamp(max=self.mask.kv_limit - 1)
        if dcaptures is None:
            modified = self.score.evaluate(b, h, q_idx, kv_idx, s, self.captures)
            return _hide(modified.to(self.dtype).expand(shape), hidden), _identity
        leaf = s.requires_grad_()
        captures = [
            c if into is None else c.detach().requires_grad_()
            for c, into in zip(self.captures, dcaptures, strict=True)
        ]
        with torch.enable_grad():
            modified = self.score.evaluate(b, h, q_idx, kv_idx, leaf, captures)
            modified = modified.to(self.dtype).expand(shape)

        def pull_back(ds: Tensor) -> Tensor:
            wanted = [c for c in captures if c.requires_grad]
            grads: Sequence[Tensor | None] = [None] * (1 + len(wanted))
            if modified.requires_grad:
                with _repeatable(wanted):
                    grads = torch.autograd.grad(modified, [leaf, *wanted], ds, allow_unused=True)
            into = [d for d in dcaptures if d is not None]
            for total, grad in zip(into, grads[1:], strict=True):
                if grad is not None:
                    total.add_(grad)
            result = torch.zeros_like(ds) if grads[0] is None else grads[0]
            return result if hidden is None else result.masked_fill(hidden, 0)

        return _hide(modified.detach(), hidden), pull_back

    def _indices(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, and global q_idx and kv_idx, to broadcast to `[R, X, bq, L * bk]`."""
        device = chunk.b.device
        if chunk.head is None:
            h = torch.arange(self.heads, device=device).view(1, -1, self.groups, 1, 1)
        else:
            h = chunk.head.view(-1, 1, 1, 1, 1)
        bq, bk = (torch.arange(size, device=device) for size in self.mask.block_size)
        q_idx = (chunk.q_start[:, None] + bq)[:, None, None, :, None]
        kv_idx = (chunk.kv_start[:, :, None] + bk).flatten(1)[:, None, None, None, :]
        return chunk.b.view(-1, 1, 1, 1, 1), h, q_idx, kv_idx

    def _hidden(self, chunk: Chunk) -> Tensor | None:
        """What the mask and the padding hide of a chunk's scores; None if nothing.

        Kept on the block mask while that takes little memory: the backward, and the other layers
        that use the mask, then need not ask the mod again.
        """
        mask, key = self.mask, ("hidden", chunk)
        if key in mask.cache:
            kept: Tensor | None = mask.cache[key]
            return kept
        if not chunk.partial and chunk.counts is None:
            return None
        b, h, q_idx, kv_idx = self._indices(chunk)
        inside = None
        if chunk.partial:  # blocks that reach into padding are partial, too
            inside = (q_idx < mask.q_limit) & (kv_idx < mask.kv_limit)
            q_idx, kv_idx = q_idx.clamp(max=mask.q_limit - 1), kv_idx.clamp(max=mask.kv_limit - 1)
            inside = inside & self.mod.evaluate(b, h, q_idx, kv_idx)
        if chunk.counts is not None:
            slot = torch.arange(kv_idx.shape[-1], device=kv_idx.device)
            filled = slot < chunk.counts.view(-1, 1, 1, 1, 1) * mask.block_size[1]
            inside = filled if inside is None else inside & filled
        assert inside is not None
        hidden = ~inside
        if mask.partial.blocks * mask.block_size[0] * mask.block_size[1] <= _ELEMENTS_KEPT:
            mask.cache[key] = hidden
        return hidden
