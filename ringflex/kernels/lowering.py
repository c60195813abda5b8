"""aten graph of a mod -> one `@triton.jit` function.

The functions that are generated:

    mask(b, h, q_idx, kv_idx, tables) -> visible
    score(score, b, h, q_idx, kv_idx, tables) -> score
    gradient(score, grad, b, h, q_idx, kv_idx, tables, into, HOW, Q_AXIS) -> gradient of the score

`b` and `h` are scalars, `q_idx` and `kv_idx` tiles of one column and one row (either way round),
all int32; everything broadcasts. `tables` is a flat tuple: for each table its pointer, then the
sizes and strides that `table_arguments` encodes. `gradient` also adds into the gradients of tables.

A function depends on the graph and on `TableSpec`s only: not on the tables' contents, sizes or
strides. The same source gives the same function, which Triton then compiles once.
"""

from __future__ import annotations

import hashlib
import itertools
import linecache
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from ringflex.kernels import triton_math
from ringflex.kernels.scalar_rules import RULES, Unsupported
from ringflex.kernels.scalars import HALF, INT32, TRITON_NAMES, Emitter, Value, number, range_of
from ringflex.masks.pointwise import PointwiseMod, scatters
from ringflex.masks.trace import user_line

LARGEST_INDEX = 2**30  # positions in a sequence; sums and differences of two fit in 32 bits
LARGEST_BATCH = 2**20  # batch elements, heads
MOST_COMPONENTS = 256  # of a vector inside a mod

_aten = torch.ops.aten
_Array = np.ndarray[Any, np.dtype[Any]]  # of Values; no dimensions for a scalar


class TableSpec(NamedTuple):
    """What the generated code knows of a table.

    Attributes:
        dtype, ndim: of the table.
        unit: whether the last stride is 1.
        wide: whether offsets need 64 bits.
    """

    dtype: torch.dtype
    ndim: int
    unit: bool
    wide: bool

    @classmethod
    def of(cls, table: Tensor) -> TableSpec:
        reach = sum((n - 1) * s for n, s in zip(table.shape, table.stride(), strict=True))
        unit = table.ndim > 0 and table.stride(-1) == 1
        return cls(table.dtype, table.ndim, unit, reach > INT32[1])


@dataclass(frozen=True, eq=False)
class Lowered:
    """A generated function.

    Attributes:
        function: the `@triton.jit` function.
        source: its text.
        trivial: of a mask: True if everything is visible, whatever the indices.
        reads: whether it reads a table at a position (not only per batch element or head).
    """

    function: Any
    source: str
    trivial: bool
    reads: bool


def lower_mask(body: PointwiseMod, specs: Sequence[TableSpec]) -> Lowered:
    """The mask as a function.

    Raises:
        NotImplementedError: an operation outside the table; names it and the user's line.
    """
    writer = _Writer(body, specs, ["b", "h", "q_idx", "kv_idx"], "mask_mod")
    visible = writer.value_of(writer.output).item()
    visible = writer.emitter.cast(visible, torch.bool)
    result = visible.text
    if visible.is_number:
        result = "kv_idx >= 0" if visible.number else "kv_idx < 0"
    return writer.finish("mask", "b, h, q_idx, kv_idx, tables", result, trivial=visible.number)


def lower_score(
    body: PointwiseMod, specs: Sequence[TableSpec], *, tanh: str = "accurate_tanh"
) -> Lowered:
    """The score mod as a function of fp32 scores. Raises: as `lower_mask`.

    Args:
        tanh: which of `triton_math` to call.
    """
    arguments = ["score", "b", "h", "q_idx", "kv_idx"]
    writer = _Writer(body, specs, arguments, "score_mod", tanh)
    value = writer.emitter.cast(writer.value_of(writer.output).item(), torch.float32)
    result = writer.whole_tile(value, "score")
    return writer.finish("score", "score, b, h, q_idx, kv_idx, tables", result)


def lower_gradient(
    gradient: PointwiseMod, specs: Sequence[TableSpec], *, tanh: str = "accurate_tanh"
) -> Lowered:
    """The derivative of a score mod (`pointwise.derivative`). Raises: as `lower_mask`."""
    arguments = ["score", "b", "h", "q_idx", "kv_idx", "grad"]
    writer = _Writer(gradient, specs, arguments, "the derivative of score_mod", tanh)
    dscore, *dtables = writer.output
    position = 0
    for i, (node, wanted) in enumerate(zip(_wanted(gradient, dtables), gradient.scattered)):
        if wanted:
            for indices, added in scatters(node):
                writer.scatter(i, position, indices, added)
            position += 2 + max(0, specs[i].ndim - 1)
    value = number(0.0)
    if dscore is not None:
        value = writer.emitter.cast(writer.value_of(dscore).item(), torch.float32)
    signature = "score, grad, b, h, q_idx, kv_idx, tables, into, HOW, Q_AXIS"
    return writer.finish("gradient", signature, writer.whole_tile(value, "grad"))


def tanh_is_added(body: PointwiseMod) -> bool:
    """Whether every tanh of a score mod is only scaled by numbers and added up to the score."""
    return all(_is_added(node) for node in body.graph.nodes if node.target is _aten.tanh.default)


def _is_added(node: fx.Node) -> bool:
    for user in node.users:
        packet = getattr(user.target, "overloadpacket", user.target)
        by_number = (
            packet is _aten.mul and len(user.all_input_nodes) == 1 and user.args[0] != user.args[1]
        )
        if user.op != "output" and not (
            (by_number or packet in (_aten.add, _aten.sub, _aten.rsub)) and _is_added(user)
        ):
            return False
    return True


def _wanted(gradient: PointwiseMod, dtables: Sequence[Any]) -> list[Any]:
    remaining = iter(dtables)
    return [next(remaining) if wanted else None for wanted in gradient.scattered]


def table_arguments(tables: Sequence[Tensor], specs: Sequence[TableSpec]) -> tuple[Any, ...]:
    """The `tables` tuple of a launch.

    Triton compiles anew for an integer that is 1 or a multiple of 16; as `2 n + 3`, none is.
    """
    arguments: list[Any] = []
    for table, spec in zip(tables, specs, strict=True):
        arguments.append(table)
        arguments += [2 * size + 3 for size in table.shape]
        strides = table.stride()[:-1] if spec.unit else table.stride()
        arguments += [2 * stride + 3 for stride in strides]
    return tuple(arguments)


def gradient_arguments(gradients: Sequence[tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    """The `into` tuple: of each table that wants a gradient, a contiguous accumulator and what
    `scatter_add` calls `aside`."""
    arguments: list[Any] = []
    for accumulator, aside in gradients:
        arguments += [accumulator, aside]
        arguments += [2 * stride + 3 for stride in accumulator.stride()[:-1]]
    return tuple(arguments)


_BOUNDS = {
    "b": (0, LARGEST_BATCH - 1),
    "h": (0, LARGEST_BATCH - 1),
    "q_idx": (0, LARGEST_INDEX - 1),
    "kv_idx": (0, LARGEST_INDEX - 1),
}


class _Writer:
    """Writes one function: walks a graph whose values are arrays of scalars."""

    def __init__(
        self,
        body: PointwiseMod,
        specs: Sequence[TableSpec],
        arguments: list[str],
        kind: str,
        tanh: str = "accurate_tanh",
    ) -> None:
        self.body, self.specs, self.kind = body, specs, kind
        self.emitter = Emitter(tanh=tanh)
        self.values: dict[fx.Node, _Array] = {}
        self.tables: dict[fx.Node, int] = {n: i for i, n in enumerate(body.table_inputs)}
        self.first = [0, *itertools.accumulate(_width(spec) for spec in specs)]
        self.reads = False
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for node, name in zip(inputs, arguments):
            dtype = node.meta["val"].dtype
            value = Value(name, dtype, frozenset([name]), _BOUNDS.get(name))
            self.values[node] = _scalar(value)
        for node in body.graph.nodes:
            if node.target is _aten.detach.default and node.args[0] in self.tables:
                self.tables[node] = self.tables[node.args[0]]  # as autograd sees a table
            elif node.op == "call_function" and not _only_scattered(node):
                self.values[node] = self._operate(node)
        output = next(n for n in body.graph.nodes if n.op == "output")
        self.output: Any = output.args[0]

    def value_of(self, arg: Any) -> _Array:
        """A node, or a number, as an array of scalars."""
        if not isinstance(arg, fx.Node):
            return _scalar(number(arg))
        if arg in self.tables:  # a table without dimensions, read at every score
            self.values[arg] = self._read(self.tables[arg], [])
        return self.values[arg]

    def whole_tile(self, value: Value, like: str) -> str:
        """A result with the shape of the tile, also if it depends on one index only."""
        if value.depends & {"score", "grad"}:
            return value.text
        return f"tl.where({like} < 0, {value.text}, {value.text})"

    def finish(self, name: str, signature: str, result: str, *, trivial: Any = False) -> Lowered:
        lines = [*self.emitter.lines, f"return {result}"]
        source = "".join(f"    {line}\n" for line in lines)
        digest = hashlib.blake2b((signature + source).encode(), digest_size=6).hexdigest()
        source = f"def {name}_{digest}({signature}):\n{source}"
        return Lowered(_compile(source), source, trivial is True, self.reads)

    def scatter(self, table: int, first: int, indices: tuple[Any, ...], added: Any) -> None:
        """Adds `added` into the gradient of `table[indices]`."""
        spec = self.specs[table]
        values = self.value_of(added)
        for component, places in self._components(spec, table, list(indices)):
            offset, depends = "0", frozenset[str]()
            terms: list[Value] = []
            for dim, place in enumerate(places):
                last = dim == spec.ndim - 1
                stride = None if last else f"((into[{first + 2 + dim}] - 3) >> 1)"
                terms.append(self._scaled(place, stride, wide=spec.wide))
                depends |= place.depends
            if terms:
                offset = self._sum(terms).text
            value = self.emitter.cast(values[component], torch.float32)
            if value.is_number:
                if value.number == 0:
                    continue
                raise Unsupported("a gradient that is a number")
            by_q = bool(depends & {"q_idx", "score", "grad"})
            by_kv = bool(depends & {"kv_idx", "score", "grad"})
            self.emitter.lines.append(
                f"scatter_add(into[{first}], into[{first + 1}], {offset}, "
                f"{self.whole_tile(value, 'grad')}, HOW, {by_q}, {by_kv}, Q_AXIS)"
            )

    def _operate(self, node: fx.Node) -> _Array:
        packet = getattr(node.target, "overloadpacket", node.target)
        dtype = getattr(node.meta.get("val"), "dtype", torch.float32)
        try:
            if packet is _aten.index:
                return self._index(node)
            if packet in _SHAPING:
                return _SHAPING[packet](node, self.value_of(node.args[0]))
            if packet is operator.getitem:
                return self.value_of(node.args[0])
            if packet in _FOLDING:
                return self._fold(packet, node, dtype)
            rule = RULES.get(packet) or RULES.get(_functional(packet))
            if rule is None:
                raise Unsupported("an operation that is not in the table")
            return self._elementwise(rule, node, dtype)
        except Unsupported as problem:
            raise NotImplementedError(
                f"{self.kind} '{self.body.mod.name}' uses {node.target}"
                f"{user_line(self.body.mod, node)}, which the Triton kernel cannot do "
                f"({problem}); backend='eager' can"
            ) from None

    def _elementwise(self, rule: Callable[..., Value], node: fx.Node, dtype: torch.dtype) -> _Array:
        shape = _shape_of(node)
        whole = packet_takes_size(node)

        def argument(arg: Any) -> Any:
            if isinstance(arg, fx.Node) or (isinstance(arg, (bool, int, float)) and not whole):
                return np.broadcast_to(self.value_of(arg), shape)
            if isinstance(arg, (bool, int, float)):
                return _scalar(number(arg))
            return arg

        args = [argument(a) for a in node.args]
        kwargs = {k: argument(a) for k, a in node.kwargs.items() if k not in _IGNORED}
        result = np.empty(shape, dtype=object)
        for at in np.ndindex(shape):
            pick = lambda a, at=at: _pick(a, at)
            result[at] = rule(
                self.emitter, dtype, *map(pick, args), **{k: pick(a) for k, a in kwargs.items()}
            )
        return result

    def _fold(self, packet: Any, node: fx.Node, dtype: torch.dtype) -> _Array:
        """Sums and the like over the components of a vector."""
        x = self.value_of(node.args[0])
        if packet is _aten.dot:
            pairs = zip(x.flat, self.value_of(node.args[1]).flat, strict=True)
            products = [RULES[_aten.mul](self.emitter, dtype, a, b) for a, b in pairs]
            return _scalar(self._reduce(_aten.add, dtype, products))
        if packet in (_aten.max, _aten.min) and len(node.args) > 1:
            raise Unsupported("its second result is a position")
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        dims = sorted({d % x.ndim for d in dims}) if dims else list(range(x.ndim))  # type: ignore
        kept = [d for d in range(x.ndim) if d not in dims]
        lists = x.transpose([*kept, *dims]).reshape(*(x.shape[d] for d in kept), -1)
        result = np.empty(lists.shape[:-1], dtype=object)
        for at in np.ndindex(result.shape):
            items = [self.emitter.cast(v, dtype) for v in lists[at]]
            folded = self._reduce(_FOLDING[packet], dtype, items)
            if packet is _aten.mean:
                count = number(float(len(items)))
                folded = RULES[_aten.div](self.emitter, dtype, folded, count)
            result[at] = folded
        return result.reshape(_shape_of(node))

    def _reduce(self, packet: Any, dtype: torch.dtype, items: list[Value]) -> Value:
        total = items[0]
        for item in items[1:]:
            total = RULES[packet](self.emitter, dtype, total, item)
        return total

    def _index(self, node: fx.Node) -> _Array:
        table, indices = node.args
        if table not in self.tables:
            raise Unsupported("it reads what is not a captured tensor")
        return self._read(self.tables[table], list(indices)).reshape(_shape_of(node))  # type: ignore

    def _read(self, table: int, indices: list[Any]) -> _Array:
        spec, first = self.specs[table], self.first[table]
        found: dict[tuple[int, ...], Value] = {}
        for component, places in self._components(spec, table, indices):
            terms = []
            for dim, place in enumerate(places):
                last = dim == spec.ndim - 1 and spec.unit
                stride = None if last else self._field(first + 1 + spec.ndim + dim).text
                terms.append(self._scaled(place, stride, wide=spec.wide))
            pointer = f"tables[{first}]"
            if terms:
                pointer += f" + {self._sum(terms).text}"
            depends = frozenset[str]().union(*(p.depends for p in places))
            self.reads |= bool(depends - {"b", "h"})
            found[component] = self._loaded(pointer, spec.dtype, depends)
        shape = tuple(max(c[d] for c in found) + 1 for d in range(len(next(iter(found)))))
        values = np.empty(shape, dtype=object)
        for component, value in found.items():
            values[component] = value
        return values

    def _loaded(self, pointer: str, dtype: torch.dtype, depends: frozenset[str]) -> Value:
        if dtype not in TRITON_NAMES:
            raise Unsupported(f"it reads a captured tensor of {dtype}")
        text = f"tl.load({pointer})"
        if dtype == torch.bool:
            text += " != 0"
        elif dtype in HALF:
            text += ".to(tl.float32)"
        elif dtype in (torch.int8, torch.uint8, torch.int16):
            text += ".to(tl.int32)"
        bounds = None if dtype.is_floating_point else range_of(dtype)
        return self.emitter.let(text, dtype, [Value("", dtype, depends)], bounds)

    def _components(
        self, spec: TableSpec, table: int, indices: list[Any]
    ) -> list[tuple[tuple[int, ...], list[Value]]]:
        """Which place of the table each component of `table[indices]` is, in every dimension."""
        node = self.body.table_inputs[table]
        sizes = node.meta["val"].shape
        indices += [None] * (spec.ndim - len(indices))
        given = [None if i is None else self.value_of(i) for i in indices]
        shape = np.broadcast_shapes(*(g.shape for g in given if g is not None))
        whole = [d for d, g in enumerate(given) if g is None]
        if shape and whole:
            raise Unsupported("it reads slices at several indices")
        counts = shape or tuple(int(sizes[d]) for d in whole)
        if int(np.prod(counts, dtype=np.int64)) > MOST_COMPONENTS:
            raise Unsupported(
                f"it reads {int(np.prod(counts))} elements per score, more than {MOST_COMPONENTS}"
            )
        result = []
        for at in np.ndindex(counts):
            places, slices = [], iter(at)
            for dim, g in enumerate(given):
                if g is None:
                    places.append(number(next(slices)))
                else:
                    places.append(
                        self._place(np.broadcast_to(g, shape)[at if shape else ()], table, dim)
                    )
            result.append((at, places))
        return result

    def _place(self, index: Value, table: int, dim: int) -> Value:
        """A valid position: negative ones count from the end, and none is beyond the table."""
        size = self._field(self.first[table] + 1 + dim)
        low, high = index.bounds or range_of(index.dtype)
        if index.is_number and low >= 0:
            return index
        text = index.text
        if low < 0:
            text = self.emitter.let(
                f"tl.where({text} < 0, {text} + {size.text}, {text})", index.dtype, [index]
            ).text
            text = f"tl.maximum({text}, 0)"
        text = f"tl.minimum({text}, {size.text} - 1)"
        bounds = (0, high) if high <= INT32[1] else None
        return self.emitter.let(text, index.dtype, [index], bounds)

    def _field(self, at: int) -> Value:
        """An encoded size or stride."""
        return self.emitter.let(f"(tables[{at}] - 3) >> 1", torch.int64)

    def _scaled(self, place: Value, stride: str | None, *, wide: bool) -> Value:
        text = place.text
        if wide and not place.is_number:
            text = f"{text}.to(tl.int64)"
        elif place.wide:
            text = f"{text}.to(tl.int32)"
        if stride is not None:
            text = f"{text} * {stride}"
        if text == place.text:
            return place
        return self.emitter.let(text, torch.int64, [place])

    def _sum(self, terms: list[Value]) -> Value:
        if len(terms) == 1:
            return terms[0]
        return self.emitter.let(" + ".join(t.text for t in terms), torch.int64, terms)


def packet_takes_size(node: fx.Node) -> bool:
    """Whether a list among the arguments is a shape."""
    return any(isinstance(a, (list, tuple, torch.Size)) for a in node.args)


def _width(spec: TableSpec) -> int:
    """Entries of the `tables` tuple."""
    return 1 + 2 * spec.ndim - spec.unit


def _scalar(value: Value) -> _Array:
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    shape = tuple(int(n) for n in value.shape)  # type: ignore[union-attr]
    if int(np.prod(shape, dtype=np.int64)) > MOST_COMPONENTS:
        raise Unsupported(f"a vector of {int(np.prod(shape))} elements per score")
    return shape


def _pick(arg: Any, at: tuple[int, ...]) -> Any:
    if not isinstance(arg, np.ndarray):
        return arg
    return arg[at] if arg.ndim else arg[()]


def _only_scattered(node: fx.Node) -> bool:
    """Operations on whole gradients of tables, which `scatters` takes apart."""
    value = node.meta.get("val")
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in (_aten.index_put, _aten.new_zeros, _aten.zeros_like, _aten.zeros):
        return isinstance(value, Tensor) and value.ndim > 0
    return packet in (_aten.add, _aten._to_copy) and any(
        isinstance(a, fx.Node) and _only_scattered(a) for a in node.args
    )


def _functional(packet: Any) -> Any:
    """`aten.masked_fill_` -> `aten.masked_fill`: autograd's formulas write into fresh tensors."""
    name = getattr(packet, "__name__", "")
    return getattr(_aten, name[:-1], None) if name.endswith("_") else None


_IGNORED = {"device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking"}


def _select(node: fx.Node, x: _Array) -> _Array:
    _, dim, at = node.args
    return np.asarray(np.take(x, at, axis=dim), dtype=object)  # type: ignore[call-overload]


def _slice(node: fx.Node, x: _Array) -> _Array:
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    key = [slice(None)] * x.ndim
    key[dim] = slice(start, end, step)  # type: ignore[index]
    return x[tuple(key)]


def _reshaped(node: fx.Node, x: _Array) -> _Array:
    return x.reshape(_shape_of(node))


def _permuted(node: fx.Node, x: _Array) -> _Array:
    return x.transpose(node.args[1])  # type: ignore[arg-type]


_SHAPING: dict[Any, Callable[[fx.Node, _Array], _Array]] = {
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.view: _reshaped,
    _aten.reshape: _reshaped,
    _aten._unsafe_view: _reshaped,
    _aten.squeeze: _reshaped,
    _aten.unsqueeze: _reshaped,
    _aten.expand: lambda node, x: np.broadcast_to(x, _shape_of(node)),
    _aten.permute: _permuted,
    _aten.t: lambda node, x: x.T,
}
_FOLDING: dict[Any, Any] = {
    _aten.sum: _aten.add,
    _aten.mean: _aten.add,
    _aten.prod: _aten.mul,
    _aten.any: _aten.logical_or,
    _aten.all: _aten.logical_and,
    _aten.amax: _aten.maximum,
    _aten.amin: _aten.minimum,
    _aten.max: _aten.maximum,
    _aten.min: _aten.minimum,
    _aten.dot: _aten.add,
}


@cache
def _compile(source: str) -> Any:
    """The `@triton.jit` function of a source text; the same object for the same text."""
    name = source[4 : source.index("(")]
    filename = f"<ringflex {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"tl": tl, "triton": triton, "__name__": __name__}
    namespace |= {n: f for n, f in vars(triton_math).items() if not n.startswith("_")}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[name])
