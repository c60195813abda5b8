"""attention-gym's published mods, as they are, through the Triton kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringflex as rf
from attention_cases import DEVICE, deviation, largest
from ringflex.reference import reference_attention_with_gradients

gym_masks = pytest.importorskip("attn_gym.masks")
gym_mods = pytest.importorskip("attn_gym.mods")

B, H, S, D = 1, 2, 64, 16


def documents() -> Any:
    return torch.tensor([0, 10, 37, S], device=DEVICE, dtype=torch.int32)


MASKS: dict[str, Callable[[], Any]] = {
    "causal": lambda: gym_masks.causal_mask,
    "sliding window": lambda: gym_masks.generate_sliding_window(9),
    "dilated window": lambda: gym_masks.generate_dilated_sliding_window(12, 3),
    "global window": lambda: gym_masks.generate_global_sliding_window(
        8, torch.arange(S, device=DEVICE) % 30 == 0
    ),
    "prefix": lambda: gym_masks.generate_prefix_lm_mask(13),
    "documents": lambda: gym_masks.generate_doc_mask_mod(gym_masks.causal_mask, documents()),
    "natten": lambda: gym_masks.generate_natten(8, 8, 3, 3),
    "tiled natten": lambda: gym_masks.generate_tiled_natten(8, 8, 3, 3, 4, 4),
    "packed documents": lambda: gym_masks.generate_packed_causal_doc_mask_mod(documents()),
    "block diffusion": lambda: gym_masks.generate_block_diffusion_mask(S // 2, 8),
    "morton natten": lambda: gym_masks.generate_morton_natten(8, 8, 3, 3),
    "spatial head": lambda: gym_masks.generate_spatial_head_mask_mod(8, 4, 14, 1, True, 8),
    "temporal head": lambda: gym_masks.generate_temporal_head_mask_mod(8, 4, 14, 1),
    "sta": lambda: gym_masks.generate_sta_mask_mod_2d((8, 8), (6, 6), (2, 2)),
}


def learned(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()


def graphormer() -> tuple[Any, tuple[torch.Tensor, ...]]:
    bias = learned(H, 5)
    distances = torch.randint(0, 5, (B, S, S), generator=torch.Generator().manual_seed(1))
    distances = distances.to(DEVICE, torch.int32)
    return gym_mods.generate_graphormer_spatial_bias(bias, distances), (bias,)


def edges() -> tuple[Any, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    bias = learned(H, 3, 4)
    types = torch.randint(0, 4, (B, S, S, 3), generator=generator).to(DEVICE, torch.int32)
    lengths = torch.randint(0, 4, (B, S, S), generator=generator).to(DEVICE, torch.int32)
    return gym_mods.generate_graphormer_edge_bias(bias, types, lengths), (bias,)


def latent() -> tuple[Any, tuple[torch.Tensor, ...]]:
    q_rope, k_rope = learned(B, H, S, 8), learned(B, 1, S, 8)
    return gym_mods.generate_mla_rope_score_mod(q_rope, k_rope, H, 0.3), (q_rope, k_rope)


SCORES: dict[str, Callable[[], tuple[Any, tuple[torch.Tensor, ...]]]] = {
    "alibi": lambda: (gym_mods.generate_alibi_bias(H), ()),
    "softcap": lambda: (gym_mods.generate_tanh_softcap(5), ()),
    "softcap, approximate": lambda: (gym_mods.generate_tanh_softcap(5, approx=True), ()),
    "activation": lambda: (gym_mods.generate_activation_score_mod(), ()),
    "sandwich": lambda: (gym_mods.generate_sandwich_bias(H, S, device=DEVICE), ()),
    "graphormer": graphormer,
    "graphormer edges": edges,
    "latent attention": latent,
}


def check(mask_mod: Any, score_mod: Any, captures: tuple[torch.Tensor, ...], limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, H, S, D, generator=generator).to(DEVICE) for _ in range(4))
    exact = reference_attention_with_gradients(
        q.double(), k.double(), v.double(), dout.double(),
        mask_mod=mask_mod, score_mod=score_mod, captures=captures,
    )  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = mask_mod and rf.create_block_mask(mask_mod, B, H, S, S, BLOCK_SIZE=32)
    out = rf.flex_attention(*leaves, score_mod, mask, backend="triton")
    grads = torch.autograd.grad(out, [*leaves, *captures], dout)
    wanted = [exact.out, exact.dq, exact.dk, exact.dv, *exact.dcaptures]
    for x, want in zip((out, *grads), wanted, strict=True):
        assert deviation(x.detach(), want.cpu()) <= limit * largest(want)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    check(MASKS[name](), None, (), 1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str) -> None:
    score_mod, captures = SCORES[name]()
    # The hardware's tanh, where there is one: 5e-4 of a score of up to 5.
    limit = 2e-2 if "approximate" in name and DEVICE.type == "cuda" else 2e-5
    check(gym_masks.causal_mask, score_mod, captures, limit)
