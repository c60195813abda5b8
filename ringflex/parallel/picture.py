"""A picture of a plan: the mask coloured by who holds the keys, the work, who sends to whom, and
what all ranks are predicted to do when."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringflex.masks.bounds import ALL, NONE, MaskBounds, Rectangles

if TYPE_CHECKING:
    from ringflex.parallel.plan import Plan

_BLUE, _SKY, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
_MANY = 16  # ranks beyond which rows are too thin for patterns
_CELLS = 128  # of the mask's picture, per side
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em }}
svg {{ max-width: 100%; height: auto }}
</style>
</head>
<body>
{svg}
<pre>{words}</pre>
</body>
</html>
"""


def plot_plan(plan: Plan, path: str) -> None:
    """Saves the picture to `path`; the ending chooses the format. An HTML page holds the picture as
    SVG, and the plan in words; it refers to nothing else."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install ringflex[plots]") from error
    ranks, plan = plan, plan.nodes or plan
    below = min(5.0, 1.6 + 0.16 * ranks.world_size)
    figure = Figure(figsize=(13, 4.6 + below), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 3, width_ratios=[1.25, 1, 1.1], height_ratios=[4.6, below], hspace=0.08
    )
    mask_axes, work_axes, sends_axes = (figure.add_subplot(grid[0, i]) for i in range(3))
    _draw_times(ranks, figure.add_subplot(grid[1, :]), figure)
    colours = _colours(plan.world_size)
    _draw_mask(plan, mask_axes, colours)
    who, strategy = "rank", plan.strategy
    if plan is not ranks:
        who, strategy = "node", f"{ranks.strategy}, between {plan.world_size} nodes {strategy}"
    _draw_work(plan, work_axes, colours, who)
    _draw_sends(plan, sends_axes, figure, who)
    figure.suptitle(
        f"{plan.rows.mask.name}: {plan.seq_len:,} tokens on {ranks.world_size} ranks, "
        f"{plan.layout.name} layout, {strategy}"
    )
    if not path.lower().endswith((".html", ".htm")):
        figure.savefig(path, dpi=130)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    Path(path).write_text(
        _PAGE.format(
            title=html.escape(plan.rows.mask.name),
            svg=svg[svg.index("<svg") :],
            words=html.escape(ranks.describe()),
        )
    )


def _colours(ranks: int) -> Any:
    """RGB `[ranks, 3]`: Okabe and Ito's colour-blind safe palette, a ramp beyond eight ranks."""
    names = ["0072B2", "E69F00", "009E73", "CC79A7", "56B4E9", "D55E00", "F0E442", "000000"]
    if ranks <= len(names):
        rgb = [[int(name[i : i + 2], 16) / 255 for i in (0, 2, 4)] for name in names[:ranks]]
        return np.array(rgb)
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 1, ranks))[:, :3]


def _draw_mask(plan: Plan, axes: Any, colours: Any) -> None:
    layout = plan.layout
    cells = min(_CELLS, layout.real_blocks)
    blocks = np.arange(cells + 1) * layout.real_blocks // cells
    edges = np.minimum(blocks * layout.block_size, plan.seq_len)
    y, x = (a.reshape(-1) for a in np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij"))
    zero = np.zeros_like(y)
    rectangles = Rectangles(zero, zero, edges[y], edges[y + 1] - 1, edges[x], edges[x + 1] - 1)
    code = MaskBounds(plan.rows.mask).classify(rectangles)
    ink = np.select([code == ALL, code == NONE], [1.0, 0.0], 0.55)[:, None]
    by_block = colours[layout.owner[: layout.real_blocks]]
    mixed = np.add.reduceat(by_block, blocks[:-1], axis=0) / np.diff(blocks)[:, None]
    image = (ink * mixed[x] + (1 - ink)).reshape(cells, cells, 3)
    axes.imshow(image, extent=(0, plan.seq_len, plan.seq_len, 0), interpolation="nearest")
    axes.set_title("who holds the keys that are seen\n(pale: partly seen)", fontsize=10)
    axes.set_xlabel("key position (tokens)")
    axes.set_ylabel("query position (tokens)")


def _draw_work(plan: Plan, axes: Any, colours: Any, who: str) -> None:
    work = np.array(plan.stats.work)
    axes.bar(np.arange(work.size), work, color=colours)
    axes.axhline(work.mean(), color="0.3", linestyle="--", linewidth=1, label="mean")
    axes.set_title(f"work: slowest {plan.stats.imbalance:.2f}x the mean", fontsize=10)
    axes.set_xlabel(who)
    axes.set_ylabel("visible blocks")
    axes.legend(loc="lower right", fontsize=8)
    _rank_ticks(axes.xaxis, work.size)


def _draw_sends(plan: Plan, axes: Any, figure: Any, who: str) -> None:
    W, layout = plan.world_size, plan.layout
    needs = plan.needs.dense().sum(axis=1)  # [reader, blocks]
    blocks = np.stack([needs[:, layout.owner == owner].sum(axis=1) for owner in range(W)], axis=1)
    np.fill_diagonal(blocks, 0)
    image = axes.imshow(blocks, cmap="cividis", vmin=0, vmax=max(1, blocks.max()))
    figure.colorbar(image, ax=axes, label="K/V blocks", shrink=0.8)
    if W <= 8:
        for reader, owner in np.ndindex(W, W):
            bright = blocks[reader, owner] > blocks.max() / 2
            text = "-" if reader == owner else str(blocks[reader, owner])
            axes.text(
                owner, reader, text, ha="center", va="center", fontsize=8,
                color="black" if bright else "white",
            )  # fmt: skip
    axes.set_title("remote K/V that queries see", fontsize=10)
    axes.set_xlabel(f"{who} that holds it")
    axes.set_ylabel(f"{who} that needs it")
    _rank_ticks(axes.xaxis, W)
    _rank_ticks(axes.yaxis, W)


def _draw_times(plan: Plan, axes: Any, figure: Any) -> None:
    """Of each rank a row: kernels above, transfers below."""
    found = plan.predict()
    hatch, edge = ("////", 0.3) if plan.world_size <= _MANY else (None, 0.0)
    kinds = {
        "compute, forward": _BLUE, "compute, backward": _SKY,
        "K/V under way": _ORANGE, "dK/dV under way": _GREEN, "heads under way": _PURPLE,
    }  # fmt: skip
    bars: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in kinds}
    for s in found.spans:
        kind = f"{s.name} under way"
        if s.track != "transfer":
            kind = f"compute, {s.name.split()[0]}"
        bars[kind].append((s.rank, s.start * 1e3, (s.end - s.start) * 1e3))
    for kind, colour in kinds.items():
        if kind.startswith("heads") and not bars[kind]:
            continue
        rank, start, width = np.array(bars[kind] or np.zeros((0, 3))).T
        above = kind.startswith("compute")
        axes.barh(
            rank + (-0.2 if above else 0.2), width, 0.4, start, color=colour, label=kind,
            edgecolor="white", linewidth=edge, hatch=None if above else hatch,
        )  # fmt: skip
    axes.axvline(found.forward * 1e3, color="0.3", linestyle="--", linewidth=1)
    axes.set_ylim(plan.world_size - 0.4, -0.6)
    axes.set_xlim(0, found.both * 1e3)
    axes.set_title(
        f"predicted for one layer of 32 heads, 8 of K/V, head dim 128, bf16, on Hopper GPUs: "
        f"forward {found.forward * 1e3:.3g} ms, both {found.both * 1e3:.3g} ms",
        fontsize=10,
    )
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("rank")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _rank_ticks(axes.yaxis, plan.world_size)


def _rank_ticks(axis: Any, ranks: int) -> None:
    axis.set_ticks(np.arange(0, ranks, max(1, ranks // 8)))
