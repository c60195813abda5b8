"""Draws the plan of a mask over packed documents: who holds what, who works how much, who sends.

    python scripts/plot_plan.py --seq-len 65536 --ranks 4 --window 16384 --layout zigzag

Needs no process group: the plans of all ranks are made in this process.
"""

from __future__ import annotations

import argparse

import torch

import ringflex as rf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--window", type=int, help="tokens to the left; default: no window")
    parser.add_argument("--documents", type=float, help="median length of documents, in tokens")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--out", default="plan.png")
    args = parser.parse_args()

    mask = rf.causal()
    if args.window is not None:
        mask = mask & rf.sliding_window(args.window)
    if args.documents is not None:
        generator = torch.Generator().manual_seed(0)
        median = torch.tensor(args.documents).log().item()
        lengths = torch.empty(args.seq_len).log_normal_(median, 1.0, generator=generator)
        ends = (lengths.long() + 1).cumsum(0)
        mask = mask & rf.document(torch.searchsorted(ends, torch.arange(args.seq_len), right=True))
    plans = rf.plan_all(mask, args.seq_len, args.ranks, layout=args.layout, strategy=args.strategy)
    for plan in plans:
        print(plan.describe(), end="\n\n")
    plans[0].plot(args.out)


if __name__ == "__main__":
    main()
