"""The only user of torch.distributed: agreement, needs, and point-to-point exchange."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringflex.masks.runs import Array
from ringflex.parallel import timeline
from ringflex.parallel.groups import plan_backend, transfer_group
from ringflex.parallel.lanes import on
from ringflex.parallel.watch import has_nccl, watch

_RECORD = 512  # bytes that each rank contributes to an agreement
_DIGEST = 16
_HEAD = 1 + 8 + _DIGEST  # error flag, count, digest; the rest is text


class Agreement:
    """One process group, by which ranks agree on what they are about to do.

    Attributes:
        rank, size: within the group.
        device: where the group's tensors must live: the current GPU for NCCL, else the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.on_gpu = has_nccl(group)

    @property
    def device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if self.on_gpu
            else torch.device("cpu")
        )

    def agree(
        self, what: str, digest: bytes, error: BaseException | None = None, count: int = 0
    ) -> list[int]:
        """Every rank must come here with the same `digest` and no error.

        Args:
            what: the choice in words, for the message; a few hundred characters.
            digest: at most 16 bytes.
            error: what this rank found wrong; it is raised here, and the others hear of it.
            count: any number that the ranks should tell each other.

        Returns:
            Every rank's `count`.

        Raises:
            ValueError: another rank found something wrong, or ranks came with different digests.
            RuntimeError: a rank did not come, or died.
        """
        text = (what if error is None else _in_words(error)).encode()[: _RECORD - _HEAD]
        head = bytes([error is not None]) + count.to_bytes(8, "little")
        record = head + digest.ljust(_DIGEST, b"\0") + text
        mine = torch.frombuffer(bytearray(record.ljust(_RECORD, b"\0")), dtype=torch.uint8)
        try:
            records = [bytes(r.tolist()) for r in self.all_gather(mine.to(self.device))]
        except RuntimeError as problem:
            raise RuntimeError(
                f"rank {self.rank}: another rank did not come to agree on {what}: {problem}"
            ) from problem
        if error is not None:
            raise error

        def said(rank: int) -> str:
            return records[rank][_HEAD:].rstrip(b"\0").decode(errors="replace")

        refusing = [r for r in range(self.size) if records[r][0]]
        if refusing:
            raise ValueError(f"rank {refusing[0]} refused: {said(refusing[0])}")
        digests = [r[_HEAD - _DIGEST : _HEAD] for r in records]
        other = next((r for r in range(self.size) if digests[r] != digests[0]), None)
        if other is not None:
            raise ValueError(
                f"ranks disagree; all ranks of the group must pass the same.\n"
                f"rank 0: {said(0)}\nrank {other}: {said(other)}"
                + ("\n(the values of captured tensors differ)" if said(0) == said(other) else "")
            )
        return [int.from_bytes(r[1:9], "little") for r in records]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and dtype."""
        out = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(out, x.contiguous(), group=self.group)
        return out

    def all_gather_rows(self, rows: Array, counts: list[int]) -> list[Array]:
        """The int64 rows `[counts[r], n]` of every rank r, in one collective."""
        padded = np.zeros((max(1, *counts), rows.shape[1]), dtype=np.int64)
        padded[: rows.shape[0]] = rows
        parts = self.all_gather(torch.from_numpy(padded).to(self.device))
        return [part.cpu().numpy()[:n] for part, n in zip(parts, counts, strict=True)]


def _in_words(error: BaseException) -> str:
    ours = isinstance(error, (TypeError, ValueError, NotImplementedError))
    return str(error) if ours else f"{type(error).__name__}: {error}"


class PlanAgreement(Agreement):
    """Agreement over gloo, on the CPU, apart from all that the program does with the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.on_gpu = False
        self._backend = plan_backend(group)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        out = [torch.empty_like(x) for _ in range(self.size)]
        self._backend.allgather([out], [x.contiguous()]).wait()
        return out


class Communicator(Agreement):
    """One process group, seen by one rank: agreement on calls, and exchanges.

    Attributes:
        bytes_sent, bytes_received: K/V and gradient payload so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.bytes_sent = self.bytes_received = 0
        self._transfers = group

    def prepare(self) -> Agreement:
        """Makes ready for exchanges; all ranks of the group come here together.

        Returns:
            The same ranks' way to agree on plans, which no call of attention uses.
        """
        if self.on_gpu and self.size > 1:
            self._transfers = transfer_group(self.group)
        return PlanAgreement(self.group) if self.size > 1 else self

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        *,
        name: str = "tensors",
        step: int = 0,
    ) -> Exchange:
        """Starts sending and receiving contiguous tensors, by peer rank within the group.

        On a GPU, after all that the current stream has been given; what it is given from now on
        runs at the same time.

        Args:
            name, step: what is sent, at which step of a plan; for messages and timelines.
        """
        group = self._transfers
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=p) for p, x in sends]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=p) for p, x in receives]
        self.bytes_sent += sum(x.nbytes for _, x in sends)
        self.bytes_received += sum(x.nbytes for _, x in receives)
        exchange = Exchange(self, sends, receives, name, step)
        if ops:
            exchange.start(ops)
        return exchange


# Cycles: a few microseconds, longer than it takes from one stream's event to another's kernel.
_HEAD_START = 15_000


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Where what follows a transfer waits for it."""
    return torch.cuda.Stream(device, priority=-2)


class Exchange:
    """Transfers under way; keeps their buffers alive until `wait`."""

    def __init__(
        self,
        comm: Communicator,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        name: str,
        step: int,
    ) -> None:
        self.comm, self.name, self.step = comm, name, step
        self.what = f"rank {comm.rank}, step {step}: {name}"
        self.works: list[Any] = []
        self.buffers = [x for _, x in (*sends, *receives)]
        self.peers = [f"to rank {p}" for p, _ in sends] + [f"from rank {p}" for p, _ in receives]
        self.span: timeline.Open | None = None

    def __str__(self) -> str:
        return f"{self.what} {', '.join(dict.fromkeys(self.peers))}"

    def start(self, ops: Sequence[dist.P2POp]) -> None:
        """They are under way. On a GPU the current stream pauses for a moment.

        That lets NCCL's kernel have its multiprocessors before the next kernel takes them all: one
        rank's would wait for the end of that, and the others' would keep theirs busy waiting.
        """
        self.span = timeline.begin("transfer", self.name, self.step)
        self.works = dist.batch_isend_irecv(list(ops))
        if not self.comm.on_gpu:
            return
        side = _side_stream(torch.cuda.current_device())
        with on(side):
            for work in self.works:
                work.wait()
            if self.span is not None:
                self.span.end()
        watch(self.works, side.record_event(), str(self), self.comm.group)
        torch.cuda._sleep(_HEAD_START)

    def wait(self) -> None:
        """The buffers are ready for the current stream (GPU) or the program (CPU).

        Raises:
            RuntimeError: a transfer failed or timed out; names it and the peer.
        """
        for i, work in enumerate(self.works):
            try:
                work.wait()
            except RuntimeError as error:
                one_each = len(self.works) == len(self.peers)  # gloo; NCCL has one for all
                where = f"{self.what} {self.peers[i]}" if one_each else str(self)
                raise RuntimeError(f"{where} failed: {error}") from error
        if self.span is not None and not self.comm.on_gpu:
            self.span.end()
        self.works, self.buffers = [], []


def communicator(group: Any) -> Communicator | None:
    """The communicator of a ProcessGroup, a 1-D DeviceMesh, or None: the world, if there is one.

    Raises:
        TypeError: something else. ValueError: a mesh of several dimensions, or a group without
            this rank.
    """
    if group is None:
        if not dist.is_initialized():
            return None
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a 1-D DeviceMesh, got {group.ndim} dimensions "
                f"{group.mesh_dim_names}; pass one of them, e.g. mesh['cp']"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not a member of the group; only members may call plan()")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}"
        )
    return Communicator(group)
