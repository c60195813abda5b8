"""ringflex: FlexAttention for many GPUs."""

from ringflex.attention import flex_attention
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.builder import create_block_mask
from ringflex.masks.mods import (
    MaskMod,
    alibi,
    causal,
    chunked,
    compose,
    dilated,
    document,
    document_from_lengths,
    full,
    prefix_lm,
    relative_position,
    sliding_window,
    softcap,
)
from ringflex.parallel.layout import Layout, make_layout
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.plan import Plan
from ringflex.parallel.planner import plan, plan_all
from ringflex.parallel.prefetch import PlanPrefetcher

__version__ = "0.1.0"

__all__ = [
    "AttentionShape",
    "BlockMask",
    "Layout",
    "Machine",
    "MaskMod",
    "Plan",
    "PlanPrefetcher",
    "alibi",
    "causal",
    "chunked",
    "compose",
    "create_block_mask",
    "dilated",
    "document",
    "document_from_lengths",
    "flex_attention",
    "full",
    "make_layout",
    "plan",
    "plan_all",
    "prefix_lm",
    "relative_position",
    "sliding_window",
    "softcap",
]
