"""Which tiles the Triton kernels use: a small table, and a search that replaces it on demand.

The entries for sm_90 were measured (`scripts/bench_kernels.py --tiles`); those of other
architectures are chosen by shared memory and registers, and compiled by the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringflex.kernels.contract import Tile

_Table = dict[str, dict[int, Tile]]  # by kernel, and head dim rounded up

_SM90: _Table = {
    "forward": {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 2)},
    "key": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},
    "query": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)},
}
_SM90_WITH_LOOKUP: _Table = {
    **_SM90,
    "forward": {64: Tile(64, 128, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
}
_SM90_WITH_SCORE: _Table = {
    "forward": {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(128, 64, 8, 2)},
    "key": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 3), 256: Tile(64, 64, 8, 2)},
    "query": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
}
_SM100: _Table = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(128, 64, 8, 2)},
    "key": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    "query": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
}
_OTHER: _Table = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
    "key": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 1)},
    "query": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 1)},
}
_SINGLE: _Table = {  # IEEE products, without matrix units: what registers allow
    "forward": {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "key": {64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "query": {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}


class Architecture(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        name: "cuda", "hip" or "interpreter". capability: (9, 0) for Hopper, say.
        shared_memory: bytes per block.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int


def architecture(device: torch.device) -> Architecture:
    """Of a device; the interpreter has memory for every tile."""
    if device.type != "cuda":
        return Architecture("interpreter", (0, 0), 1 << 30)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Architecture("hip", (properties.major, properties.minor), 65_536)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Architecture("cuda", (properties.major, properties.minor), shared)


def tile_for(
    kernel: str,
    where: Architecture,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    block_size: tuple[int, int],
    with_lookup: bool,
    with_score: bool,
) -> Tile:
    """The table's tile, cut to the mask's blocks and the device's shared memory.

    Args:
        kernel: "forward", "key" or "query".
        head_dims: of q and k, and of v; rounded up to powers of two.
        block_size: of the mask, for queries and keys.
        with_lookup: whether the mask looks things up by query or key, as documents do.
        with_score: whether there is a score mod.
    """
    table = _table(where, dtype, with_lookup, with_score)
    tile = table[kernel][max(64, *head_dims)]
    tile = fit_blocks(tile, block_size)
    while _shared_bytes(kernel, tile, dtype.itemsize, head_dims) > where.shared_memory:
        if tile.num_stages > 1:
            tile = tile._replace(num_stages=tile.num_stages - 1)
        elif tile.block_n > 16:
            tile = tile._replace(block_n=tile.block_n // 2)
        elif tile.block_m > 16:
            tile = tile._replace(block_m=tile.block_m // 2)
        else:
            break
    return tile


def _table(where: Architecture, dtype: torch.dtype, with_lookup: bool, with_score: bool) -> _Table:
    if dtype == torch.float32 and where.name != "interpreter":
        return _SINGLE
    if where.name == "cuda" and where.capability[0] == 9:
        if with_score:
            return _SM90_WITH_SCORE
        return _SM90_WITH_LOOKUP if with_lookup else _SM90
    if where.name == "cuda" and where.capability[0] >= 10:
        return _SM100
    return _OTHER


def fit_blocks(tile: Tile, block_size: tuple[int, int]) -> Tile:
    """A tile that divides the mask's blocks: no larger than their largest power of two."""
    m, n = (min(t, b & -b) for t, b in zip(tile[:2], block_size, strict=True))
    return tile._replace(block_m=m, block_n=n)


def _shared_bytes(kernel: str, tile: Tile, size: int, head_dims: tuple[int, int]) -> int:
    """About how much shared memory a kernel takes: what stays, and what is in flight."""
    m, n, _, stages = tile
    both = sum(head_dims) * size
    if kernel == "key":
        return n * both + stages * m * both + m * n * size
    stays = m * head_dims[0] * size if kernel == "forward" else m * both
    return stays + stages * n * both


CANDIDATES = {  # of the search
    "forward": [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2),
        Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 3),
        Tile(64, 32, 4, 3), Tile(128, 128, 4, 3), Tile(64, 128, 4, 2),
    ],
    "key": [
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 3),
        Tile(64, 64, 8, 2), Tile(32, 64, 4, 2), Tile(128, 128, 8, 2), Tile(32, 64, 8, 2),
    ],
    "query": [
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2),
    ],
}  # fmt: skip
