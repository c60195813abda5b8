"""Mistakes as data, and what every rank must say of one.

A mistake is the arguments that it replaces, by name. It is made by all ranks, who must each say
what is wrong, or by one alone, whom the others must hear of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ringflex as rf

W, S = 3, 100  # ranks and tokens
OFFENDER = 1  # the rank that makes a mistake alone
SECONDS = 30  # for a case; a hang is a failure, not a wait

DOCUMENTS = torch.arange(S) // 9
OTHER_DOCUMENTS = DOCUMENTS.clone()
OTHER_DOCUMENTS[57] = 99


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """change: from the good arguments to the ones that differ. error, text: what the rank that
    makes it must say by itself; a text of "" is a mistake only beside other ranks that do not."""

    change: Callable[[], dict[str, Any]]
    error: type[Exception] = ValueError
    text: str = ""


def good_plan_arguments() -> dict[str, Any]:
    return {
        "mask_mod": rf.document(DOCUMENTS),
        "seq_len": S,
        "B": 2,
        "H": 4,
        "layout": "contiguous",
        "strategy": "ring",
        "block_size": 16,
    }


def check_refusal(errors: list[BaseException], mistake: Mistake, ranks: list[int]) -> None:
    """The ranks that made the mistake say what is wrong, the others who said so."""
    for rank, error in enumerate(errors):
        if rank in ranks:
            assert type(error) is mistake.error, error
            assert mistake.text in str(error)
        else:
            assert type(error) is ValueError, error
            assert str(error).startswith(f"rank {ranks[0]} refused: ")
            assert mistake.text in str(error)


def check_disagreement(errors: list[BaseException]) -> None:
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert type(error) is ValueError, error
        first, *said = str(error).splitlines()
        assert first == "ranks disagree; all ranks of the group must pass the same."
        assert said[0].startswith("rank 0: ")
        assert said[1].startswith(f"rank {OFFENDER}: ")
        # The reader must be able to tell the two apart.
        assert said[0].split(": ", 1)[1] != said[1].split(": ", 1)[1] or "differ" in said[2]
