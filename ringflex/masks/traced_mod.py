"""A traced mod: an aten graph, its captured tensors, and its evaluation over index tensors.

A mod is written for one element: its indices are 0-dim tensors. Because every recorded operation
works on scalars, the same graph evaluates over whole tiles by broadcasting: that is what the eager
kernel, the block-mask builder and (lowered) the fused kernels do with it.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ringflex.masks.captures import fingerprint, narrowest
from ringflex.modes import without_autocast

INDEX_NAMES = ("b", "h", "q_idx", "kv_idx")
INDEX = torch.ops.aten.index.Tensor
_HALF = (torch.float16, torch.bfloat16)
Line = tuple[Any, str, int]  # an operation, and where the user wrote it: file, line


@dataclass(frozen=True, eq=False)
class TracedMod:
    """A mod as data: an aten graph, its captured tensors, and which inputs it uses.

    Attributes:
        name: the function's name, for messages.
        module: the graph; its inputs are the mod's arguments, then the captured tensors.
        captures: the captured tensors themselves (identity kept, so that gradients reach them).
        uses: names of the arguments that the result depends on.
        varying: the operations that depend on an argument; the others are computed once.
        scalar: every varying operation works on scalars element by element, so the graph
            broadcasts.
        approximate_tanh: tanh was written as attention-gym's `approx::tanh`: a kernel may use the
            hardware's approximation.
        lines: the operations as they were called, and where the user wrote them.
        cache: what kernels made of the graph.
    """

    name: str
    module: fx.GraphModule
    captures: tuple[Tensor, ...]
    uses: frozenset[str]
    varying: frozenset[fx.Node]
    scalar: bool
    approximate_tanh: bool = False
    lines: tuple[Line, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def evaluate(
        self,
        b: Tensor,
        h: Tensor,
        q_idx: Tensor,
        kv_idx: Tensor,
        score: Tensor | None = None,
        captures: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The mod over whole tensors of indices; differentiable in `score` and the captures.

        Args:
            b, h, q_idx, kv_idx: int64, rank >= 1, broadcastable to one another (and to `score`).
            score: the scores, for a score mod.
            captures: stand-ins for `self.captures` (another device, or leaves of a gradient).

        Returns:
            A tensor that broadcasts to the common shape of the inputs.
        """
        inputs = [b, h, q_idx, kv_idx] if score is None else [score, b, h, q_idx, kv_idx]
        inputs += self.captures if captures is None else captures
        with without_autocast():
            return self._run(*inputs) if self.scalar else self._map(*inputs)

    def _map(self, *inputs: Tensor) -> Tensor:
        """The graph for one element after the other, in effect."""
        arguments = len(inputs) - len(self.captures)
        shape = torch.broadcast_shapes(*(x.shape for x in inputs[:arguments]))
        flat = [x.expand(shape).reshape(-1) for x in inputs[:arguments]]
        in_dims = (0,) * arguments + (None,) * len(self.captures)
        mapped = torch.vmap(self._run, in_dims=in_dims)
        return mapped(*flat, *inputs[arguments:]).reshape(shape)

    def _run(self, *inputs: Tensor) -> Tensor:
        """The graph's operations in order, over tensors of elements or (in vmap) one element."""
        values: dict[fx.Node, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                x, dtype = inputs[len(values)], node.meta["val"].dtype
                # Products of vectors promote no types: what is read in fp32 is halved for them.
                values[node] = x.to(dtype) if dtype in _HALF and not self.scalar else x
            elif node.op == "call_function":
                values[node] = self._operate(node, values)
            else:
                result: Tensor = values[node.args[0]]
                return result
        raise AssertionError("a graph ends with its output")

    def _operate(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        varies = node in self.varying and self.scalar

        def value(arg: fx.Node) -> Any:
            x = values[arg]
            # Type promotion treats 0-dim tensors apart; the mod was written for equals.
            return x.reshape(1) if varies and isinstance(x, Tensor) and x.ndim == 0 else x

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if node.target is INDEX:
            table, indices = args  # type: ignore[misc]
            found = _read(table, indices) if self.scalar else INDEX(table, indices)  # type: ignore
            # Integers may be kept in few bits; half precision may be read in fp32, and stays so.
            return found if found.is_floating_point() else found.to(node.meta["val"].dtype)
        if varies and node.target is torch.ops.aten.div.Tensor:
            args = _divided_exactly(args[0], args[1], node.meta["val"].dtype)
        if "device" in kwargs:  # a constant made inside the mod lives where the indices live
            kwargs = {**kwargs, "device": next(iter(values.values())).device}
        assert callable(node.target)
        result = node.target(*args, **kwargs)
        traced = node.meta.get("val")
        if varies and isinstance(traced, Tensor) and result.dtype != traced.dtype:
            result = result.to(traced.dtype)
        return result

    def to(self, device: torch.device) -> TracedMod:
        """The same mod with its captured tensors (detached) on `device`."""
        if all(c.device == device for c in self.captures):
            return self
        return replace(self, captures=tuple(c.detach().to(device) for c in self.captures))

    def frozen(self) -> TracedMod:
        """The same mod over copies of its captured tensors: later changes do not reach it. Integers
        that are only looked up, as document ids, are kept in as few bits as hold them."""
        kept = []
        for node, capture in self._captured():
            dtype = capture.dtype
            if dtype in (torch.int64, torch.int32) and self._looks_up(node):
                dtype = narrowest(capture, (torch.int16, torch.int32))
            kept.append(capture.detach().to(dtype, copy=True))
        return replace(self, captures=tuple(kept), cache={})

    def _captured(self) -> list[tuple[fx.Node, Tensor]]:
        inputs = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        nodes = inputs[len(inputs) - len(self.captures) :]
        return list(zip(nodes, self.captures, strict=True))

    def _looks_up(self, table: fx.Node) -> bool:
        """Whether a captured tensor is read by varying indices, and used for nothing else."""
        return all(
            user.target is INDEX and user in self.varying and table not in user.args[1]  # type: ignore[operator]
            for user in table.users
        )

    def digest(self) -> bytes:
        """16 bytes that are equal for equal graphs over equal captured values."""
        state = hashlib.blake2b(digest_size=16)
        state.update(self.module.code.encode())
        for node, capture in self._captured():
            value = capture.detach().cpu().contiguous()
            # What it means, and how it is kept.
            state.update(f"{node.meta['val'].dtype}{value.dtype}{tuple(value.shape)}".encode())
            fingerprint(value.reshape(-1).view(torch.uint8), state.update)
        return state.digest()


def _divided_exactly(x: Any, y: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """On GPUs, torch multiplies by a number's reciprocal, which may round to another integer."""
    if isinstance(x, Tensor) and x.device.type != "cpu" and not isinstance(y, Tensor):
        y = torch.full((1,), y, dtype=dtype, device=x.device)
    return x, y


def _read(table: Tensor, indices: Sequence[Tensor]) -> Tensor:
    if None in indices or not (table.requires_grad and table.device.type == "cpu"):
        return INDEX(table, indices)
    # On a CPU the gradient of index() adds in parallel, in any order; that of index_select() is
    # serial, so the same inputs give the same bits.
    linear: Tensor | int = 0
    for size, index in zip(table.shape, indices, strict=False):
        linear = linear * size + torch.where(index < 0, index + size, index)
    assert isinstance(linear, Tensor)
    rows = table.flatten(0, len(indices) - 1).index_select(0, linear.reshape(-1))
    return rows.reshape((*linear.shape, *table.shape[len(indices) :]))


def user_line(mod: TracedMod, node: fx.Node) -> str:
    """Where the user wrote an operation of the mod, for messages; empty if that is not known."""
    alike = [n for n in node.graph.nodes if n.target is node.target]
    lines = [line for line in mod.lines if line[0] is node.target]
    at = alike.index(node)
    if at >= len(lines) or not lines[at][1]:
        return ""
    return place_of(lines[at])


def place_of(line: Line) -> str:
    """Where that is, and what stands there."""
    _, filename, lineno = line
    return f" ({filename}:{lineno}: {linecache.getline(filename, lineno).strip()})"
