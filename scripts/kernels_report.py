"""The table and the picture of bench_kernels.py, from its rows."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

MASKS = ("full", "causal", "window", "documents", "alibi", "softcap", "prefix")
OURS, PORTABLE, FLEX = "ringflex", "ringflex, portable", "torch flex"
FLEX_FA4 = "torch flex, FA4"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per case, with every contender's rates and ours as a ratio."""
    lines = [
        "| mask, tokens, heads, dim | ringflex, fwd / bwd | x torch flex | others | x memory |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(case_of(r) for r in rows):
        mine = {r["contender"]: r for r in rows if case_of(r) == case}
        ours, flex = mine.pop(OURS), mine.get(FLEX, {})
        rates = lambda r: (
            f"{r['forward_tflops']:.0f} / {r['backward_tflops']:.0f}" if "forward" in r else "-"
        )
        ratio = memory = "-"
        if "forward" in flex and "forward" in ours:
            ratio = " / ".join(f"{flex[w] / ours[w]:.2f}" for w in ("forward", "backward"))
            memory = f"{ours['peak'] / flex['peak']:.2f}"
        others = ", ".join(f"{name} {rates(r)}" for name, r in mine.items())
        lines.append(f"| {case} | {rates(ours)} | {ratio} | {others} | {memory} |")
    return "\n".join(lines)


def case_of(row: dict[str, Any]) -> str:
    return f"{row['mask']}, {row['tokens']:,}, {row['heads']}/{row['kv_heads']}, {row['dim']}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Our speed as a ratio to FlexAttention's, with FA4 where that was measured: a panel per
    direction and head dim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flex = FLEX_FA4 if any(r["contender"] == FLEX_FA4 for r in rows) else FLEX
    rows = [r for r in rows if r["contender"] in (OURS, flex)]
    dims = sorted({r["dim"] for r in rows})
    lengths = sorted({r["tokens"] for r in rows})
    figure, axes = plt.subplots(2, len(dims), figsize=(5.2 * len(dims), 7), squeeze=False)
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]  # distinct to the colour-blind
    for (i, way), (j, dim) in itertools.product(
        enumerate(("forward", "backward")), enumerate(dims)
    ):
        axis = axes[i][j]
        masks = [m for m in MASKS if any((r["mask"], r["dim"]) == (m, dim) for r in rows)]
        for n, tokens in enumerate(lengths):
            values = []
            for mask in masks:
                mine = [
                    r for r in rows
                    if (r["mask"], r["tokens"], r["dim"]) == (mask, tokens, dim) and way in r
                ]  # fmt: skip
                ratios = [
                    t[way] / o[way]
                    for o in mine
                    for t in mine
                    if o["contender"] == OURS and t["contender"] == flex
                    and o["kv_heads"] == t["kv_heads"]
                ]  # fmt: skip
                values.append(statistics.mean(ratios) if ratios else 0)
            width = 0.8 / len(lengths)
            at = [x + (n - (len(lengths) - 1) / 2) * width for x in range(len(masks))]
            axis.bar(at, values, width, label=f"{tokens:,} tokens", color=colours[n % 4])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(masks)), masks, rotation=30, ha="right")
        axis.set_title(f"{way}, head dim {dim}")
        axis.set_ylabel(f"speed, {flex} = 1")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
