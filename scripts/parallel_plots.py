"""The pictures of bench_parallel.py: speed, bytes, memory, scaling.

    python scripts/parallel_plots.py benchmarks/results/parallel.json

draws those of a record that is there already, also of a run that was cut off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ORDER = ("causal", "window", "documents", "mixed", "full")
TITLES = {
    "causal": "causal",
    "window": "causal window 4,096",
    "documents": "documents, mean 3k",
    "mixed": "documents, mixed",
    "full": "full",
}
# Okabe and Ito's colours, distinct to the colour-blind; the markers differ too.
_STYLES = {
    "ringflex ring": ("#0072b2", "o"),
    "ringflex direct": ("#d55e00", "s"),
    "ringflex all_gather": ("#009e73", "^"),
    "ringflex hierarchical": ("#56b4e9", "d"),
    "ringflex auto": ("#0072b2", "*"),
    "torch flex, all-gather": ("#cc79a7", "D"),
    "torch context_parallel, allgather, cuDNN": ("#e69f00", "v"),
    "torch context_parallel, alltoall, cuDNN": ("#e69f00", "<"),
    "torch context_parallel, allgather, FA2": ("#56b4e9", ">"),
    "ring-flash-attn zigzag": ("#000000", "X"),
    "SDPA cuDNN, one GPU": ("#777777", "P"),
}
_SPARE = [("#0072b2", "P"), ("#d55e00", "X"), ("#009e73", "*"), ("#56b4e9", "p"), ("#999999", "h")]
_ONE = "ringflex, one GPU"


def plot_all(rows: Sequence[Row], output: Path) -> None:
    """`NAME-speed.png`, `NAME-bytes.png` and `NAME-memory.png` beside `NAME.json`, of the largest
    number of GPUs; `NAME-scaling.png` where several numbers were measured.
    """
    good = [r for r in rows if "error" not in r]
    if len({r["gpus"] for r in good if r.get("both_efficiency") is not None}) > 1:
        plot_scaling(good, output.with_name(f"{output.stem}-scaling.png"))
    most = max((r["gpus"] for r in good), default=1)
    good = [r for r in good if r["gpus"] in (most, 1)]
    plot_speed(good, most, output.with_name(f"{output.stem}-speed.png"))
    plot_bytes(good, most, output.with_name(f"{output.stem}-bytes.png"))
    plot_memory(good, most, output.with_name(f"{output.stem}-memory.png"))


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _masks(rows: Sequence[Row]) -> list[str]:
    return sorted({r["mask"] for r in rows}, key=ORDER.index)


def _by_length(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for r in rows:
        found.setdefault(r["tokens"], []).append(r)
    return found


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Each contender's colour and marker, in a fixed order."""
    names = {r["contender"] for r in rows}
    styles = {name: style for name, style in _STYLES.items() if name in names}
    spare = iter(_SPARE * 9)
    return styles | {n: next(spare) for n in sorted(names - styles.keys())}


def _lines(axis: Any, rows: Sequence[Row], key: str, unit: float = 1) -> None:
    """A line per contender over the lengths."""
    for name, (colour, marker) in _styles(rows).items():
        points = sorted(
            (r["tokens"], r[key] / unit)
            for r in rows
            if r["contender"] == name and r.get(key) is not None
        )
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, color=colour, marker=marker, label=name, linewidth=1.6, markersize=6,
                linestyle=":" if "alltoall" in name else "-",
            )  # fmt: skip
    lengths = sorted({r["tokens"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_tokens(n) for n in lengths])
    axis.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}"


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=columns,
            frameon=False,
        )  # fmt: skip


def plot_speed(rows: Sequence[Row], gpus: int, path: Path) -> None:
    """TFLOP/s per GPU over lengths: a column per mask, forward above, forward + backward below."""
    plt = pyplot()
    masks = _masks(rows) or ["causal"]
    size = (max(7.5, 2.7 * len(masks)), 7.2)
    figure, axes = plt.subplots(
        2, len(masks), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for (i, way), (j, mask) in (
        (a, b) for a in enumerate(("forward", "both")) for b in enumerate(masks)
    ):
        axis = axes[i][j]
        mine = [r for r in rows if r["mask"] == mask]
        if not mine:
            continue
        factor = 4 if way == "forward" else 14
        one = {
            r["tokens"]: factor * r["pairs"] * r["heads"] * r["dim"] / r[f"one_{way}"] / 1e9
            for r in mine
            if f"one_{way}" in r
        }
        if one:
            at = sorted(one)
            axis.plot(
                at, [one[n] for n in at], color="#333333", linestyle="--", marker="_", label=_ONE
            )
        _lines(axis, mine, f"{way}_tflops")
        axis.set_ylim(bottom=0)
        if i == 0:
            axis.set_title(TITLES[mask], fontsize=12)
        else:
            axis.set_xlabel("tokens")
        if j == 0:
            name = "forward" if way == "forward" else "forward + backward"
            axis.set_ylabel(f"{name}\nTFLOP/s per GPU")
    figure.suptitle(f"Attention over {gpus} GPUs: speed (higher is better)")
    _legend(figure, axes, columns=max(1, min(4, int(size[0] / 3.4))))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_bytes(rows: Sequence[Row], gpus: int, path: Path) -> None:
    """MiB received by the rank that receives most: bars by mask and strategy, for the length that
    most masks were measured at."""
    plt = pyplot()
    rows = [r for r in rows if r.get("bytes_received") is not None]
    most = max((len(_masks(of_length)) for of_length in _by_length(rows).values()), default=0)
    tokens = max(
        (n for n, some in _by_length(rows).items() if len(_masks(some)) == most), default=0
    )
    rows = [r for r in rows if r["tokens"] == tokens]
    masks, styles = _masks(rows), _styles(rows)
    figure, axis = plt.subplots(figsize=(max(6.5, 1.9 * len(masks)), 4.2), layout="constrained")
    width = 0.85 / max(1, len(styles))
    for n, (name, (colour, _)) in enumerate(styles.items()):
        found = {r["mask"]: r["bytes_received"] / 2**20 for r in rows if r["contender"] == name}
        at = [i + (n - (len(styles) - 1) / 2) * width for i, m in enumerate(masks) if m in found]
        bars = axis.bar(
            at, [found[m] for m in masks if m in found], width, color=colour, label=name
        )
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=9, padding=2)
    axis.set_xticks(range(len(masks)), [TITLES[m].replace(", ", ",\n") for m in masks])
    axis.set_ylabel("MiB received per rank\nforward + backward")
    axis.set_title(f"K/V and dK/dV moved, {tokens:,} tokens over\n{gpus} GPUs (lower is better)")
    axis.margins(y=0.12)
    if styles:
        axis.legend(frameon=False, ncols=min(3, len(styles)), loc="upper center",
                    bbox_to_anchor=(0.5, -0.2))  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_memory(rows: Sequence[Row], gpus: int, path: Path) -> None:
    """Peak memory beyond inputs, of the rank that needs most, per token of the whole sequence: flat
    where it grows with them. A panel per mask."""
    plt = pyplot()
    rows = [r for r in rows if r.get("peak") is not None and r["gpus"] == gpus]
    masks = _masks(rows) or ["causal"]
    size = (max(7.5, 2.7 * len(masks)), 4.6)
    figure, axes = plt.subplots(
        1, len(masks), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for j, mask in enumerate(masks):
        axis = axes[0][j]
        mine = [r for r in rows if r["mask"] == mask]
        if not mine:
            axis.text(0.5, 0.5, "not measured on CPUs", ha="center", transform=axis.transAxes)
            continue
        scaled = [{**r, "per_token": r["peak"] / r["tokens"]} for r in mine]
        _lines(axis, scaled, "per_token", 2**10)
        axis.set_ylim(bottom=0)
        axis.set_title(TITLES[mask], fontsize=12)
        axis.set_xlabel("tokens")
        if j == 0:
            axis.set_ylabel("KiB per token of the whole\nsequence, on each GPU")
    figure.suptitle(
        f"Peak memory of forward + backward, beyond inputs, over {gpus} GPUs (lower is better)"
    )
    _legend(figure, axes, columns=max(1, min(4, int(size[0] / 3.4))))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(rows: Sequence[Row], path: Path) -> None:
    """Efficiency of our fastest strategy over GPUs: a column per mask, forward above, forward +
    backward below; a line per length, and one of 8,192 tokens a GPU."""
    plt = pyplot()
    rows = [r for r in rows if r["contender"].startswith("ringflex") and "both_efficiency" in r]
    masks, gpus = _masks(rows), sorted({r["gpus"] for r in rows} | {1})
    figure, axes = plt.subplots(
        2, len(masks), figsize=(max(7.5, 2.7 * len(masks)), 7.2), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    lengths = [n for n, some in _by_length(rows).items() if len({r["gpus"] for r in some}) > 1]
    least = min(r[f"{way}_efficiency"] for r in rows for way in ("forward", "both"))
    colours = dict(zip(sorted(lengths), ("#0072b2", "#d55e00", "#009e73", "#cc79a7") * 9))
    for (i, way), (j, mask) in (
        (a, b) for a in enumerate(("forward", "both")) for b in enumerate(masks)
    ):
        axis, key = axes[i][j], f"{way}_efficiency"
        mine = [r for r in rows if r["mask"] == mask]
        for tokens, colour in colours.items():
            some = [r for r in mine if r["tokens"] == tokens]
            _best(axis, some, key, f"{_tokens(tokens)} tokens", color=colour, marker="o")
        some = [r for r in mine if r["tokens"] == 8192 * r["gpus"]]
        _best(axis, some, key, "8k tokens a GPU", color="#000000", marker="s", linestyle="--")
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(gpus, [str(n) for n in gpus])
        axis.minorticks_off()
        axis.set_ylim(min(0.7, least - 0.05), 1.15)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        if i == 0:
            axis.set_title(TITLES[mask], fontsize=12)
        else:
            axis.set_xlabel("GPUs")
        if j == 0:
            axis.set_ylabel("forward" if way == "forward" else "forward + backward")
    figure.suptitle("Efficiency against one GPU (1 is linear scaling)")
    _legend(figure, axes, columns=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _best(axis: Any, rows: Sequence[Row], key: str, label: str, **style: Any) -> None:
    """A line over GPUs, from 1 on one of them."""
    found = {1: 1.0}
    for r in rows:
        if r["gpus"] > 1:
            found[r["gpus"]] = max(found.get(r["gpus"], 0.0), r[key])
    if len(found) > 1:
        x, y = zip(*sorted(found.items()), strict=True)
        axis.plot(x, y, label=label, linewidth=1.6, markersize=6, **style)


if __name__ == "__main__":
    record = Path(sys.argv[1])
    plot_all(json.loads(record.read_text())["rows"], record)
