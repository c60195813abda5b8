"""A pool of gloo rank processes that serves every multi-rank test of a session.

A rank costs an import of torch and a rendezvous. The pool pays that once, keeps its ranks waiting,
and has the first `world_size` of them call a test's function:

    def sum_of_ranks(group):
        x = torch.tensor(dist.get_rank(group))
        dist.all_reduce(x, group=group)
        return x

    def test_sum(pool):
        assert pool.run(sum_of_ranks, 4) == [torch.tensor(6)] * 4

The function is pickled by name, so it stands at the top level of a module; its arguments and its
value are pickled by content, tensors included, so nothing is shared between processes. A function
may also make groups of its own with `dist.new_group` or a DeviceMesh at world_size = pool size.

Ranks that may have been left inside a collective are never used again: after a timeout, a death,
or an error on only some of the ranks, the next case starts fresh ones.
"""

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

START_SECONDS = 120.0  # to start all ranks, on a machine that is busy with other things
COLLECTIVE_SECONDS = 120.0  # gloo's own bound, for a rank whose pool was killed without notice
STOP_SECONDS = 5.0  # for a rank to leave by itself; then it is killed
OUTPUT_CHARS = 6000  # how much of a failed rank's output an error shows
# The last is what tracing a mod imports, which takes longer than torch itself.
PRELOADED = ["torch.distributed", "ringflex", "torch._inductor.config"]
POOL_FRAMES = re.compile(r'  File ".*rank_pool.py", line \d+ in _answer\n(  File .*\n)*')


class RankFailure(AssertionError):
    """A case did not end as it should on every rank.

    errors: what each failed rank raised, by rank. A rank that gave no answer has a TimeoutError, a
        rank that died a ChildProcessError.
    """

    def __init__(self, message: str, errors: dict[int, BaseException]):
        super().__init__(message)
        self.errors = errors


class RemoteError(Exception):
    """Stands for an exception or traceback that exists only as text in this process."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended on one rank."""

    value: Any = None
    error: BaseException | None = None
    report: str = ""  # the traceback, or what became of the rank
    answered: bool = True  # False: the rank died, or had to be killed


class RankPool:
    """`size` gloo ranks, started at the first use and again whenever they cannot be trusted.

    Args:
        size: ranks to start; a case runs on the first 1 to `size` of them.
        grace: seconds that the other ranks get to end once one has raised or died, and that all
            get to meet at a barrier after a case in which every one raised.
    """

    def __init__(self, size: int = 8, *, grace: float = 10.0):
        self.size = size
        self.grace = grace
        self._ranks: _Ranks | None = None

    def run(
        self,
        fn: Callable[..., T],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        **kwargs: Any,
    ) -> list[T]:
        """Call `fn(group, *args, **kwargs)` on each rank and return the values in rank order.

        `group` is the process group of the first `world_size` ranks; `timeout` is in seconds.
        torch is seeded alike on every rank.

        Raises:
            RankFailure: a rank raised, died, or did not answer in time; with every traceback.
        """
        __tracebackhide__ = True
        outcomes = self._call(fn, world_size, args, kwargs, timeout)
        errors = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if errors:
            headline = f"{len(errors)} of {world_size} ranks failed in {_plain(fn).__qualname__}"
            raise RankFailure(_describe(headline, outcomes), errors)
        return [outcome.value for outcome in outcomes]

    def errors(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        **kwargs: Any,
    ) -> list[BaseException]:
        """Call `fn` like `run`, where every rank must raise, and return the exceptions.

        Raises:
            RankFailure: a rank returned, died, or did not answer in time.
        """
        __tracebackhide__ = True
        outcomes = self._call(fn, world_size, args, kwargs, timeout)
        errors = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if len(errors) < world_size or not all(outcome.answered for outcome in outcomes):
            headline = f"not every one of {world_size} ranks raised in {_plain(fn).__qualname__}"
            raise RankFailure(_describe(headline, outcomes), errors)
        for rank, error in errors.items():
            error.__cause__ = RemoteError(outcomes[rank].report)
        return list(errors.values())

    def stop(self) -> None:
        """End the ranks, if any run. A later case starts fresh ones."""
        if self._ranks is not None:
            self._ranks.stop()
            self._ranks = None

    def kill(self) -> None:
        """Like `stop`, for ranks that may be busy or stuck."""
        if self._ranks is not None:
            self._ranks.terminate()
            self._ranks.remove_files()
            self._ranks = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _call(
        self, fn: Callable[..., Any], world_size: int, args: tuple, kwargs: dict, timeout: float
    ) -> list[Outcome]:
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size} of a pool of {self.size} ranks")
        request = _pack(fn, world_size, args, kwargs)
        if self._ranks is not None and not self._ranks.alive():
            self.kill()
        try:
            if self._ranks is None:
                self._ranks = _Ranks(self.size)
                self._ranks.await_start()
            outcomes = self._ranks.call(request, world_size, timeout=timeout, grace=self.grace)
            raised = sum(outcome.error is not None for outcome in outcomes)
            healthy = raised == 0 or (
                raised == world_size
                and all(outcome.answered for outcome in outcomes)
                and self._in_step(world_size)
            )
        except BaseException:  # such as pytest's own timeout: the ranks are still at work
            self.kill()
            raise
        if not healthy:
            self.kill()
        return outcomes

    def _in_step(self, world_size: int) -> bool:
        """Whether ranks that all raised had begun the same collectives."""
        assert self._ranks is not None
        request = _pack(_barrier, world_size, (self.grace,), {})
        outcomes = self._ranks.call(request, world_size, timeout=2 * self.grace, grace=0.0)
        return all(outcome.error is None for outcome in outcomes)


class _Ranks:
    """One generation of rank processes, seen from the test's process."""

    def __init__(self, size: int):
        forkserver = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forkserver else "spawn")
        if forkserver:  # a fork of a process that has imported torch starts in milliseconds
            context.set_forkserver_preload(PRELOADED)
        self.directory = Path(tempfile.mkdtemp(prefix="ringflex-ranks-"))
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.connections: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, size, self.directory),
                name=f"rank{rank}",
                daemon=True,
            )
            self.connections.append(ours)
            self.processes.append(process)
            process.start()
            theirs.close()

    def await_start(self) -> None:
        outcomes = self._collect(len(self.processes), START_SECONDS, grace=0.0)
        errors = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if errors:
            raise RankFailure(_describe("the rank pool did not start", outcomes), errors)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def call(
        self, request: bytes, world_size: int, *, timeout: float, grace: float
    ) -> list[Outcome]:
        for connection in self.connections[:world_size]:
            with contextlib.suppress(OSError):  # the rank has died, which _collect finds
                connection.send_bytes(request)
        return self._collect(world_size, timeout, grace)

    def _collect(self, world_size: int, timeout: float, grace: float) -> list[Outcome]:
        """Every rank's answer. If one has none, all ranks are terminated."""
        outcomes: dict[int, Outcome] = {}
        lost: dict[int, BaseException] = {}
        deadline, reason = time.monotonic() + timeout, f"no answer within {timeout:g} s"
        while waiting := set(range(world_size)) - outcomes.keys() - lost.keys():
            handles: list[Any] = [self.connections[rank] for rank in waiting]
            handles += [self.processes[rank].sentinel for rank in waiting]
            ready = wait(handles, max(0.0, deadline - time.monotonic()))
            if not ready:
                lost |= {rank: TimeoutError(reason) for rank in waiting}
                break
            for rank in waiting:
                connection, process = self.connections[rank], self.processes[rank]
                if connection not in ready and process.sentinel not in ready:
                    continue
                try:
                    if not connection.poll():
                        raise EOFError
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    process.join(STOP_SECONDS)
                    lost[rank] = ChildProcessError(f"died with exit code {process.exitcode}")
                failed = rank in lost or outcomes[rank].error is not None
                if failed and time.monotonic() + grace < deadline:
                    deadline = time.monotonic() + grace
                    reason = f"still busy {grace:g} s after rank {rank} had failed"
        for rank, outcome in outcomes.items():
            if outcome.error is None:
                outcomes[rank] = replace(outcome, value=pickle.loads(outcome.value))
            else:
                outcomes[rank] = replace(outcome, report=outcome.report + self._output(rank))
        if lost:
            self.terminate()  # each rank writes where it was to its log
        for rank, error in lost.items():
            report = f"{error}\n{self._output(rank)}"
            outcomes[rank] = Outcome(error=error, report=report, answered=False)
        return [outcomes[rank] for rank in range(world_size)]

    def _output(self, rank: int) -> str:
        """What the rank printed during its last case, and where it was if it was terminated."""
        log = self.directory / f"rank{rank}.log"
        output = log.read_text(errors="replace") if log.exists() else ""
        return POOL_FRAMES.sub("", output)[-OUTPUT_CHARS:]

    def stop(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.terminate()
        self.remove_files()

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self.connections:
            connection.close()

    def remove_files(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _serve(connection: Connection, rank: int, size: int, directory: Path) -> None:
    """The life of a rank: join, then answer one request after another until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test's process
    log = os.open(directory / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)  # gloo writes to the descriptors, not to sys.stderr
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGTERM, file=log, chain=True)
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()  # the host's name need not resolve
    torch.set_num_threads(1)

    started = _outcome(_join, rank, size, directory)
    groups = started.value
    connection.send_bytes(pickle.dumps(replace(started, value=pickle.dumps(None))))
    with contextlib.suppress(EOFError):  # the test's process has gone
        while request := connection.recv_bytes():
            os.ftruncate(log, 0)
            connection.send_bytes(pickle.dumps(_outcome(_answer, request, groups)))
    dist.destroy_process_group()


def _join(rank: int, size: int, directory: Path) -> dict[int, dist.ProcessGroup]:
    """The groups of the first n ranks, for every n."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        world_size=size,
        rank=rank,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    return {n: dist.new_group(range(n)) for n in range(1, size + 1)}


def _answer(request: bytes, groups: dict[int, dist.ProcessGroup]) -> bytes:
    world_size, path, module, file, call = pickle.loads(request)
    sys.path[:] = path
    _import(module, file)
    fn, args, kwargs = pickle.loads(call)
    torch.manual_seed(0)
    return pickle.dumps(fn(groups[world_size], *args, **kwargs))


def _outcome(fn: Callable[..., Any], *args: Any) -> Outcome:
    """Call `fn`; whatever it raises becomes an outcome that can be pickled."""
    try:
        return Outcome(value=fn(*args))
    except BaseException as error:
        inner = error.__traceback__.tb_next if error.__traceback__ else None
        report = "".join(traceback.format_exception(type(error), error, inner))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RemoteError(f"{type(error).__qualname__}: {error}")
        return Outcome(error=error, report=report)


def _pack(fn: Callable[..., Any], world_size: int, args: tuple, kwargs: dict) -> bytes:
    try:
        call = pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{_plain(fn)!r} or its arguments cannot be sent to other processes: {error}; "
            "define functions at the top level of a module and build closures inside them"
        ) from error
    module = _plain(fn).__module__
    file = getattr(sys.modules[module], "__file__", None)
    return pickle.dumps((world_size, sys.path, module, file, call))


def _import(module: str, file: str | None) -> None:
    """Import a module by the name that the test's process has for it: pytest makes some up."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(module)
        return
    package, _, _ = module.rpartition(".")
    while package:  # unpickling imports the packages of a name first
        sys.modules.setdefault(package, ModuleType(package))
        package, _, _ = package.rpartition(".")
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[module])
    except BaseException:
        del sys.modules[module]
        raise


def _barrier(group: dist.ProcessGroup, seconds: float) -> None:
    dist.monitored_barrier(group, timeout=timedelta(seconds=seconds))


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _describe(headline: str, outcomes: Sequence[Outcome]) -> str:
    """The headline, then each different ending with its ranks: what was raised comes first."""

    def order(rank: int) -> tuple[bool, bool]:
        return outcomes[rank].error is None, not outcomes[rank].answered

    ranks: dict[str, list[str]] = {}
    for rank in sorted(range(len(outcomes)), key=order):
        ranks.setdefault(outcomes[rank].report or "returned", []).append(str(rank))
    parts = [
        f"--- rank{'s' if len(who) > 1 else ''} {', '.join(who)}: {report.rstrip()}"
        for report, who in ranks.items()
    ]
    return "\n".join([headline, *parts])
