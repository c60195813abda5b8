"""Real documents for training: the Python standard library's own source files, packed.

Shapes:
    B  sequences of a batch        S  tokens of a sequence

A token is a byte. Each epoch shuffles the documents by `(seed, epoch)` and lays them end to end;
the epochs form one endless stream, and sequence `n` is its bytes `[n * S, (n + 1) * S)`. Nothing is
dropped or padded: every byte of every document comes once an epoch. What a sequence holds of a
document is a document of its own: attention and labels both stop at the sequence's edge.
"""

from __future__ import annotations

import random
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
IGNORE_LABEL = -100  # what torch.nn.functional.cross_entropy skips

_NOT_LIBRARY_SOURCE = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of packed documents.

    tokens: int64 `[B, S]`, byte values.
    doc_ids: int64 `[B, S]`, which document of its sequence a token belongs to: 0, 1, 2, ...
    labels: int64 `[B, S]`, the next byte of the same document; `IGNORE_LABEL` at a document's end.
    """

    tokens: Tensor
    doc_ids: Tensor
    labels: Tensor


def standard_library_documents() -> list[bytes]:
    """The non-empty source files of this interpreter's standard library, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY_SOURCE.isdisjoint(path.relative_to(root).parts):
            documents.append(path.read_bytes())
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(
            f"no *.py files under {root}; run an interpreter whose standard library is installed "
            "as source, or pass documents of your own to PackedDocuments"
        )
    return documents


class PackedDocuments:
    """An endless stream of documents, cut into sequences that any rank can build by number.

    >>> packed = PackedDocuments([b"abc", b"de"], seq_len=4, seed=0)
    >>> packed.batch(step=0, batch_size=2).tokens.shape
    torch.Size([2, 4])

    Args:
        documents: non-empty byte strings.
        seq_len: tokens of a sequence, at least 2.
        seed: decides the order of the documents in every epoch.
    """

    def __init__(self, documents: Sequence[bytes], *, seq_len: int, seed: int) -> None:
        if not documents or not all(documents):
            raise ValueError(
                f"documents must be non-empty byte strings, and at least one; got {len(documents)} "
                f"of which {sum(not d for d in documents)} are empty; drop the empty ones"
            )
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len} leaves nothing to predict; pass 2 or more")
        self.seq_len = seq_len
        self.seed = seed
        self.epoch_tokens = sum(map(len, documents))
        self._documents = [
            torch.frombuffer(bytearray(document), dtype=torch.uint8) for document in documents
        ]
        self._order_of = lru_cache(maxsize=2)(self._shuffle)  # a sequence may span two epochs

    def batch(self, *, step: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """The share of one data-parallel rank in the global batch of `step`.

        The global batch depends on `step` and `batch_size` alone; `dp_size` only decides who builds
        which of its rows. So every factorisation of the ranks trains on the same data, and a run
        that resumes goes on where the other stopped.

        Args:
            step: optimizer step, from 0.
            batch_size: sequences of the global batch.
            dp_rank: whose rows to build, a contiguous `1 / dp_size` of the batch.
            dp_size: ranks that the batch is divided among.

        Returns:
            A `Batch` of `B = batch_size / dp_size` sequences.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; steps count from 0")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} is not in [0, dp_size={dp_size})")
        if batch_size < 1 or batch_size % dp_size:
            raise ValueError(
                f"batch_size={batch_size} sequences do not divide among dp_size={dp_size} ranks; "
                f"pass a positive multiple of {dp_size}"
            )
        rows = batch_size // dp_size
        first = step * batch_size + dp_rank * rows
        pairs = [self.sequence(first + row) for row in range(rows)]
        tokens = torch.stack([tokens for tokens, _ in pairs])  # [B, S]
        doc_ids = torch.stack([doc_ids for _, doc_ids in pairs])  # [B, S]

        labels = torch.full_like(tokens, IGNORE_LABEL)
        continues = doc_ids[:, 1:] == doc_ids[:, :-1]  # [B, S - 1]
        labels[:, :-1][continues] = tokens[:, 1:][continues]
        return Batch(tokens=tokens, doc_ids=doc_ids, labels=labels)

    def sequence(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index` of the stream: its tokens and doc_ids, int64 `[S]` each."""
        pieces: list[Tensor] = []
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            order, ends = self._order_of(epoch)
            place = bisect_right(ends, offset)  # the first document that ends beyond offset
            document = self._documents[order[place]]
            within = offset - (ends[place] - len(document))
            pieces.append(document[within : within + stop - start])
            start += len(pieces[-1])
        lengths = torch.tensor([len(piece) for piece in pieces])
        doc_ids = torch.repeat_interleave(torch.arange(len(pieces)), lengths)
        return torch.cat(pieces).long(), doc_ids

    def _shuffle(self, epoch: int) -> tuple[list[int], list[int]]:
        """The documents' order in an epoch, and the offset at which each ends."""
        order = list(range(len(self._documents)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)  # a str seeds alike on every machine
        return order, list(accumulate(len(self._documents[document]) for document in order))
