"""Mods in which Triton's arithmetic, or a shortcut of ours, could differ from torch's."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention_cases import DEVICE
from kernels.random_scores import EXTENT


def arithmetic(device: torch.device = DEVICE) -> dict[str, Callable[..., Tensor]]:
    """Masks, with their captured tensors on a device."""
    at = torch.arange(EXTENT, device=device)
    ids, large, byte = at // 7, (at * 100_000_000).int(), at.to(torch.uint8)
    half, double = (at * 0.1).half(), at.double()
    endless = torch.where(at % 5 == 2, torch.inf, at - 7.0)
    number = lambda value: torch.full((), value)
    return {
        "floor": lambda b, h, q, k: (q - k) // 5 == -2,
        "floor of a negative divisor": lambda b, h, q, k: (q - k) // -5 == 1,
        "modulo": lambda b, h, q, k: (q - k) % 5 == 2,
        "modulo of a negative divisor": lambda b, h, q, k: (q - k) % -5 == -2,
        "varying divisor": lambda b, h, q, k: (q - 12) // (k - 11.5).sign().long() < 3,
        "fmod": lambda b, h, q, k: torch.fmod(q - k, 5) == -2,
        "trunc": lambda b, h, q, k: torch.div(q - k, 5, rounding_mode="trunc") == -2,
        "trunc of what is negative": lambda b, h, q, k: (
            torch.div(-1 - q, 5, rounding_mode="trunc") < 0
        ),
        "trunc by either sign": lambda b, h, q, k: (
            torch.div(q, (k - 11.5).sign().long(), rounding_mode="trunc") < 0
        ),
        "wide products": lambda b, h, q, k: (q * 7_000_000_019 + k * 3_000_000_007) % 11 < 4,
        "hash": lambda b, h, q, k: ((q * 2654435761 ^ k * 40503) >> 7) % 3 == 1,
        "narrow": lambda b, h, q, k: (q * 13).to(torch.int8) > k.to(torch.int8),
        "unsigned": lambda b, h, q, k: (q - k).to(torch.uint8) < 100,
        "int32 wraps": lambda b, h, q, k: q.int() * 100_000_000 < 0,
        "int32 wraps, then modulo": lambda b, h, q, k: (
            (q.int() * 1103515245 + k.int() * 12345) % 8 < 4
        ),
        "int32 wraps, then is widened": lambda b, h, q, k: (q.int() * 100_000_000).long() * 5 > 0,
        "int32 table wraps": lambda b, h, q, k: (large[q] * 3).long() > 2**30,
        "wide number": lambda b, h, q, k: ids[q] + (ids[k] < 2**40) > 2,
        "wide factor": lambda b, h, q, k: torch.add(k * 0, ids[q], alpha=3_000_000_000) > 5,
        "byte below a tensor": lambda b, h, q, k: byte[q] < number(300),
        "byte above a tensor": lambda b, h, q, k: byte[q] > number(-1),
        "half below a tensor": lambda b, h, q, k: half[q] < number(0.1),
        "half below a number": lambda b, h, q, k: half[q] <= 0.1,
        "sum of booleans": lambda b, h, q, k: ((q >= k) + (k < 4)).int() == 1,
        "product of booleans": lambda b, h, q, k: (q >= k) * (k < 4),
        "maximum of booleans": lambda b, h, q, k: torch.maximum(q > k, k > 3),
        "minimum of booleans": lambda b, h, q, k: torch.minimum(q > k, k > 3),
        "order of booleans": lambda b, h, q, k: (q > k) > (k > 3),
        "quotient to integer": lambda b, h, q, k: (q / 41 * 41).long() == q + (k > 9) * 0,
        "quotient of tensors": lambda b, h, q, k: (q / (k + 1)).long() == q // (k + 1),
        "products are rounded": lambda b, h, q, k: q * 0.1 - q * 0.1 < k * 0.0,
        "a product and a sum are rounded": lambda b, h, q, k: q * 0.1 + k * 0.7 < 2.1,
        "negative zero": lambda b, h, q, k: 1 / -(q * 0.1) + 1 / (k * -0.1) < -99,
        "root to integer": lambda b, h, q, k: (q * q).sqrt().long() == q + (k > 9),
        "float remainder": lambda b, h, q, k: (q * 0.5) % 1.5 == 0.5,
        "float remainder of 0.1": lambda b, h, q, k: (q * 1.0) % 0.1 < k * 0.004,
        "float remainder of infinity": lambda b, h, q, k: (q - k * 1.0) % float("inf") < 5,
        "float fmod": lambda b, h, q, k: torch.fmod(q - k * 1.0, 0.3) < 0.1,
        "float floor": lambda b, h, q, k: (q - k) / 2 // 3 == -2,
        "float floor of 0.1": lambda b, h, q, k: (q * 0.1) // 0.1 <= k,
        "float floor of infinity": lambda b, h, q, k: endless[q] // 2.0 == endless[k] // (k - 3.0),
        "double": lambda b, h, q, k: double[q] / 3.0 < double[k] * 0.3,
        "minimum with nan": lambda b, h, q, k: torch.minimum((q - 9.0).sqrt(), k + 0.5) < 3,
        "not": lambda b, h, q, k: ~(~q < k - 20),
        "where": lambda b, h, q, k: torch.where(h == 1, q > k, torch.where(b == 0, q < k, q == k)),
    }


def half_scores() -> dict[str, Callable[..., Tensor]]:
    """Scores with tables of half precision."""
    table = (torch.randn(EXTENT, 64, device=DEVICE) * 3).half()
    return {
        "a number beside half precision is not rounded": lambda s, b, h, q, k: (
            s + table[q, 0] * 1.1
        ),
        "a tiny number": lambda s, b, h, q, k: s + table[q, 0] * 1e-8 * 1e7,
        "a large divisor": lambda s, b, h, q, k: s + table[q, 0] / 70_000.0 * 1e4,
        "a sum is rounded once": lambda s, b, h, q, k: s + (table[q] * table[k]).sum(-1),
        "a mean is rounded once": lambda s, b, h, q, k: s + (table[q] * table[k]).mean(-1),
    }
