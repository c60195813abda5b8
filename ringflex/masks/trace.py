"""Python function -> aten graph with its captured tensors, and its evaluation over index tensors.

A mod is written for one element: its indices are 0-dim tensors. `make_fx` records the aten
operations on them. Because every recorded operation works on scalars, the same graph evaluates over
whole tiles by broadcasting: that is what the eager kernel, the block-mask builder and (lowered)
the fused kernels do with it.
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ringflex.autocast import without_autocast
from ringflex.masks.captures import fingerprint, narrowest

INDEX_NAMES = ("b", "h", "q_idx", "kv_idx")
_INDEX = torch.ops.aten.index.Tensor


_LEAVING = (
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.__contains__,
)  # fmt: skip
_Line = tuple[Any, str, int]  # an operation, and where the user wrote it: file, line


class IndexByTensor(TorchFunctionMode):
    """Records `table[q_idx, kv_idx]` as an aten index; plain indexing would ask for `.item()`.

    Refuses what would leave the trace unseen: values taken out of tensors, which would become
    numbers of the graph, and tensor subclasses, whose operations may mean something else.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for subclass in types:
            if subclass not in (Tensor, torch.nn.Parameter, FakeTensor):
                raise TypeError(
                    f"a captured tensor must be a plain torch.Tensor, got {subclass.__name__} "
                    f"(of a DTensor, capture `.full_tensor()` or `.to_local()`)"
                )
        if func in _LEAVING:
            raise RuntimeError(f"{func.__name__} takes a value out of a tracing tensor")
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        table, key = args
        key = key if isinstance(key, tuple) else (key,)
        indices: list[Tensor | None] = []
        dim = 0
        for item in key:
            if isinstance(item, int) and not isinstance(item, bool):
                table = table.select(dim, item)
                continue
            if isinstance(item, Tensor) and item.dtype == torch.uint8:
                raise TypeError("an index of uint8 means a mask to torch; write `table[i.long()]`")
            if isinstance(item, Tensor) and item.dtype != torch.bool:
                indices.append(item)
            elif item == slice(None):
                indices.append(None)
            else:
                return func(*args, **(kwargs or {}))
            dim += 1
        if all(index is None for index in indices):
            return table
        return _INDEX(table, indices)


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
    lines: tuple[_Line, ...] = ()
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
                values[node] = inputs[len(values)]
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
        if node.target is _INDEX:
            table, indices = args  # type: ignore[misc]
            found = _read(table, indices) if self.scalar else _INDEX(table, indices)  # type: ignore
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
            user.target is _INDEX and user in self.varying and table not in user.args[1]  # type: ignore[operator]
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
        return _INDEX(table, indices)
    # On a CPU the gradient of index() adds in parallel, in any order; that of index_select() is
    # serial, so the same inputs give the same bits.
    linear: Tensor | int = 0
    for size, index in zip(table.shape, indices, strict=False):
        linear = linear * size + torch.where(index < 0, index + size, index)
    assert isinstance(linear, Tensor)
    rows = table.flatten(0, len(indices) - 1).index_select(0, linear.reshape(-1))
    return rows.reshape(*linear.shape, *table.shape[len(indices) :])


def trace_mask(mask_mod: Callable[..., Tensor]) -> TracedMod:
    """Traces `mask_mod(b, h, q_idx, kv_idx) -> bool`.

    Raises:
        TypeError: not a function of four indices, or it does not return a boolean scalar tensor.
        ValueError: it branches on the value of a tensor.
    """
    example = [torch.zeros((), dtype=torch.int64) for _ in INDEX_NAMES]
    return _trace(mask_mod, "mask_mod", INDEX_NAMES, example, (torch.bool,))


def trace_score(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> TracedMod:
    """Traces `score_mod(score, b, h, q_idx, kv_idx) -> score` for scores of `dtype`.

    Raises:
        TypeError: not a function of a score and four indices, or it does not return a
            floating-point scalar tensor.
        ValueError: it branches on the value of a tensor.
    """
    example = [torch.zeros((), dtype=dtype)]
    example += [torch.zeros((), dtype=torch.int64) for _ in INDEX_NAMES]
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return _trace(score_mod, "score_mod", ("score", *INDEX_NAMES), example, floats)


def _trace(
    fn: Callable[..., Tensor],
    kind: str,
    names: tuple[str, ...],
    example: list[Tensor],
    dtypes: tuple[torch.dtype, ...],
) -> TracedMod:
    name = str(getattr(fn, "name", None) or getattr(fn, "__name__", type(fn).__name__))
    _check_callable(fn, kind, names, name)

    def positional(*args: Tensor) -> Tensor:
        result = fn(*args)
        _check_result(result, kind, name, dtypes)
        return result

    watch = _Watch(positional.__code__)
    try:
        with IndexByTensor(), torch.no_grad(), without_autocast(), watch:
            module = make_fx(positional)(*example)
    except RuntimeError as error:
        if "out of a tracing tensor" not in str(error) and "item()" not in str(error):
            raise
        raise ValueError(_branch_message(fn, kind, name, error)) from error
    approximate = _replace_approximations(module)
    _free_constants(module)
    _make_functional(module, kind, name)
    _drop_reshapes(module)
    _merge_nested_reads(module)
    captures = _lift_captures(module)
    uses, varying, scalar = _dependence(module.graph, names)
    lines = tuple(watch.lines)
    return TracedMod(name, module, captures, uses, varying, scalar, approximate, lines)


class _Watch(TorchDispatchMode):
    """Notes each aten operation and the user's line that it comes from; refuses values taken out
    of tensors by an operation's arguments, as in `torch.full((), captured)`."""

    def __init__(self, outermost: CodeType) -> None:
        super().__init__()
        self.outermost, self.lines = outermost, list[_Line]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("an argument takes a value out of a tracing tensor")
        self.lines.append((func, *self._users_line(sys._getframe(1))))
        return func(*args, **(kwargs or {}))

    def _users_line(self, frame: FrameType | None) -> tuple[str, int]:
        while frame is not None and frame.f_code is not self.outermost:
            filename = frame.f_code.co_filename
            if filename != __file__ and "/torch/" not in filename:
                return filename, frame.f_lineno
            frame = frame.f_back
        return "", 0


def user_line(mod: TracedMod, node: fx.Node) -> str:
    """Where the user wrote an operation of the mod, for messages; empty if that is not known."""
    alike = [n for n in node.graph.nodes if n.target is node.target]
    lines = [line for line in mod.lines if line[0] is node.target]
    at = alike.index(node)
    if at >= len(lines) or not lines[at][1]:
        return ""
    _, filename, lineno = lines[at]
    return f" ({filename}:{lineno}: {linecache.getline(filename, lineno).strip()})"


def _check_callable(fn: Any, kind: str, names: tuple[str, ...], name: str) -> None:
    wanted = f"{kind}({', '.join(names)})"
    if not callable(fn):
        raise TypeError(f"{kind} must be a function {wanted}, got {type(fn).__name__}: {fn!r:.80}")
    try:
        inspect.signature(fn).bind(*names)
    except TypeError as error:
        raise TypeError(
            f"{kind} '{name}' must be callable as {wanted}; its signature is "
            f"{name}{inspect.signature(fn)}: {error}"
        ) from None
    except ValueError:  # builtins have no signature; calling them will tell
        return


def _check_result(result: Any, kind: str, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if kind == "mask_mod":
        wanted = "a boolean tensor, e.g. `return (q_idx >= kv_idx) & (q_idx - kv_idx < 128)`"
    else:
        wanted = "the score as a floating-point tensor, e.g. `return score + bias[h]`"
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{kind} '{name}' must return {wanted}; got {type(result).__name__} {result!r:.60}"
        )
    if result.dtype not in dtypes:
        raise TypeError(f"{kind} '{name}' must return {wanted}; got dtype {result.dtype}")
    if result.ndim != 0:
        raise TypeError(
            f"{kind} '{name}' is called for one element and must return one value; "
            f"got shape {tuple(result.shape)}"
        )


def _branch_message(fn: Any, kind: str, name: str, error: BaseException) -> str:
    where = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        in_library = "/torch/" in frame.filename or frame.filename == __file__
        if not in_library:
            where = f" ({frame.filename}:{frame.lineno}: {frame.line})"
            break
    return (
        f"{kind} '{name}' turns a tensor into a Python value{where}: `if`, `and`, `or`, `not`, "
        f"`int()`, `.item()`, numpy and chained comparisons cannot be traced. Write it with "
        f"tensors: `a & b` for `a and b`, `a | b` for `a or b`, `~a` for `not a`, "
        f"`(low <= x) & (x < high)` for `low <= x < high`, and `torch.where(condition, x, y)` "
        f"for `x if condition else y`."
    )


def _lift_captures(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Turns the constants that tracing stored on the module into inputs after the indices."""
    graph = module.graph
    captures: list[Tensor] = []
    inputs: list[fx.Node] = []
    names: set[str] = set()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        names.add(str(node.target))
        tensor = getattr(module, str(node.target))
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"a captured tensor must be a plain torch.Tensor, got {type(tensor).__name__} "
                f"(of a DTensor, capture `.full_tensor()` or `.to_local()`)"
            )
        known = next((i for i, c in enumerate(captures) if c is tensor), None)
        if known is None:
            known = len(captures)
            captures.append(tensor)
            with graph.inserting_after(last):
                last = graph.placeholder(f"capture{known}")
            last.meta["val"] = tensor
            inputs.append(last)
        node.replace_all_uses_with(inputs[known])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    for name in names:  # the graph alone keeps no tensor alive
        delattr(module, name)
    return tuple(captures)


def _merge_nested_reads(module: fx.GraphModule) -> None:
    """`table[b][q_idx]` reads `table[b, q_idx]`: one scalar read instead of a row."""
    for node in module.graph.nodes:
        if node.target is not _INDEX or None in node.args[1]:
            continue
        row = node.args[0]
        if row.target is _INDEX and all(i is not None and _is_scalar(i) for i in row.args[1]):
            node.args = (row.args[0], [*row.args[1], *node.args[1]])


def _replace_approximations(module: fx.GraphModule) -> bool:
    """attention-gym's `approx::tanh` is tanh, with a permission; was there one?"""
    found = False
    for node in module.graph.nodes:
        if str(node.target).startswith("approx.tanh"):
            node.target = torch.ops.aten.tanh.default
            found = True
    return found


def _free_constants(module: fx.GraphModule) -> None:
    """`b.new_ones(())`, as torch's `and_masks` begins with, is a number and depends on nothing."""
    aten = torch.ops.aten
    values: dict[Any, int] = {
        aten.new_ones: 1, aten.ones_like: 1, aten.new_zeros: 0, aten.zeros_like: 0
    }  # fmt: skip
    for node in module.graph.nodes:
        value = values.get(getattr(node.target, "overloadpacket", None))
        result = node.meta.get("val")
        if value is not None and isinstance(result, Tensor):
            node.target = aten.full.default
            node.args = (list(result.shape), value)
            node.kwargs = {"dtype": result.dtype, "device": result.device}


def _make_functional(module: fx.GraphModule, kind: str, name: str) -> None:
    """`score += x` becomes `score + x`: evaluation must not write into its inputs."""
    for node in module.graph.nodes:
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            continue
        packet = getattr(torch.ops.aten, node.target.overloadpacket.__name__.rstrip("_"), None)
        functional = getattr(packet, node.target._overloadname, None)
        if functional is None or functional._schema.is_mutable:
            raise ValueError(
                f"{kind} '{name}' writes into a tensor ({node.target}); write it without, e.g. "
                "with torch.where"
            )
        node.target = functional


def _drop_reshapes(module: fx.GraphModule) -> None:
    """`x.view(())` and the like of one element are that element."""
    aten = torch.ops.aten
    shaping = (aten.view, aten.reshape, aten._unsafe_view, aten.squeeze, aten.expand, aten.permute)
    for node in list(module.graph.nodes):
        same = getattr(node.target, "overloadpacket", None) in shaping
        if same and _is_scalar(node) and _is_scalar(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def _is_elementwise(node: fx.Node) -> bool:
    """Whether an operation on scalars is the same on tiles, element by element. (A sum or a softmax
    of one element is not.)"""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


_ELEMENTWISE = (  # that torch does not mark as pointwise
    torch.ops.aten.index, torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.alias,
    torch.ops.aten.detach, torch.ops.aten.lift_fresh_copy, torch.ops.aten.masked_fill,
    torch.ops.aten.rsub, torch.ops.aten.where, torch.ops.aten.floor_divide, torch.ops.aten.fill,
    torch.ops.aten.full_like, torch.ops.aten.__and__, torch.ops.aten.__or__,
)  # fmt: skip


def _dependence(
    graph: fx.Graph, names: tuple[str, ...]
) -> tuple[frozenset[str], frozenset[fx.Node], bool]:
    reads: dict[fx.Node, frozenset[str]] = {}
    scalar = True
    for node in graph.nodes:
        if node.op == "placeholder":
            reads[node] = frozenset(names[len(reads) : len(reads) + 1])
        else:
            reads[node] = frozenset[str]().union(*(reads[n] for n in node.all_input_nodes))
            if node.op == "call_function" and reads[node]:
                scalar &= _is_scalar(node) and _is_elementwise(node)
    output = next(node for node in graph.nodes if node.op == "output")
    varying = frozenset(n for n, r in reads.items() if r and n.op == "call_function")
    return reads[output], varying, scalar
