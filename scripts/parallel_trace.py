"""One run of bench_parallel.py's first case, step by step: a trace for Perfetto, and its picture.

`ranks[r]` are rank r's spans: dicts of track, name, step, start and end in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallel_measure import Contender, Spec, World, inputs
from parallel_plots import pyplot
from ringflex.parallel.timeline import Timeline

_TRACKS = ("compute", "behind", "transfer")
_KINDS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#d55e00", "#999999")


def trace(world: World, spec: Spec, contender: Contender, title: str, path: Path) -> None:
    """Records the second forward + backward of a contender on every rank."""
    *leaves, dout = inputs(spec, world.device, contender)

    def once() -> None:
        torch.autograd.grad(contender.run(*leaves), leaves, dout)

    if contender.warm is not None:
        warm = contender.warm
        world.together(lambda: torch.autograd.grad(warm(*leaves), leaves, dout))
    once()
    world.align()
    world.head_start()
    with Timeline() as timeline:
        once()
    spans = [
        {"track": s.track, "name": s.name, "step": s.step, "start": s.start, "end": s.end}
        for s in timeline.spans()
    ]
    ranks = world.gather(spans)
    if world.rank == 0:
        write_trace(ranks, title, path)


def write_trace(ranks: Sequence[Sequence[dict[str, Any]]], title: str, path: Path) -> None:
    """A Chrome trace, for Perfetto (a process per rank, a thread per track), and a PNG of it."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append(_named("process_name", rank, 0, f"rank {rank}"))
        for thread, track in enumerate(_TRACKS):
            events.append(_named("thread_name", rank, thread, track))
        for s in spans:
            events.append(
                {
                    "name": s["name"], "cat": s["track"], "ph": "X", "pid": rank,
                    "tid": _TRACKS.index(s["track"]), "ts": s["start"] * 1e6,
                    "dur": (s["end"] - s["start"]) * 1e6, "args": {"step": s["step"]},
                }
            )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    plot_trace(ranks, title, path.with_suffix(".png"))


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def plot_trace(ranks: Sequence[Sequence[dict[str, Any]]], title: str, path: Path) -> None:
    """A row per rank and track; bars coloured by kind and labelled with their steps. Spans of one
    track that overlap share its row, one above the other."""
    plt = pyplot()
    from matplotlib.patches import Patch

    tracks = [t for t in _TRACKS if t != "behind" or any(s["track"] == t for r in ranks for s in r)]
    kinds = list(dict.fromkeys(s["name"] for t in tracks for r in ranks for s in r
                               if s["track"] == t))  # fmt: skip
    colours = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(kinds)}
    figure, axis = plt.subplots(
        figsize=(12, 1.6 + 0.62 * len(ranks) * len(tracks)), layout="constrained"
    )
    end = max((s["end"] for r in ranks for s in r), default=1e-3) * 1e3
    labels: list[str] = []
    for rank, spans in enumerate(ranks):
        for track in tracks:
            row = len(labels)
            labels.append(f"rank {rank}, {track}")
            mine = [s for s in spans if s["track"] == track]
            lanes = _lanes(mine)
            height = 0.8 / (max(lanes, default=0) + 1)
            for s, lane in zip(mine, lanes, strict=True):
                start, width = s["start"] * 1e3, (s["end"] - s["start"]) * 1e3
                top = row - 0.4 + lane * height
                axis.barh(
                    top, width, height, start, align="edge", color=colours[s["name"]],
                    edgecolor="white", linewidth=0.5, hatch="///" if track == "transfer" else None,
                )  # fmt: skip
                if width > 0.008 * end:
                    axis.text(
                        start + width / 2, top + height / 2, str(s["step"]), ha="center",
                        va="center", fontsize=8 if height < 0.5 else 10,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                    )  # fmt: skip
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, end * 1.01)
    axis.set_xlabel("milliseconds (a number in a bar is the step of the plan)")
    axis.set_title(title)
    handles = []
    for kind, colour in colours.items():
        transfer = any(s["name"] == kind and s["track"] == "transfer" for r in ranks for s in r)
        handles.append(
            Patch(
                facecolor=colour, edgecolor="white", hatch="///" if transfer else None,
                label=kind + " (transfer)" * transfer,
            )
        )  # fmt: skip
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(4, len(kinds)), frameon=False
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lanes(spans: Sequence[dict[str, Any]]) -> list[int]:
    """For each span the first lane that is free when it starts; spans come by start."""
    free: list[float] = []
    lanes = []
    for s in spans:
        lane = next((i for i, end in enumerate(free) if end <= s["start"]), len(free))
        free[lane : lane + 1] = [s["end"]]
        lanes.append(lane)
    return lanes
