"""Writes one function of Triton source from a graph whose values are scalars or short vectors.

A value of the graph is an array of `Value`s, without dimensions for a scalar: views and sums of
vectors happen here, while the code is written, and leave scalars only.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ringflex.kernels.mod_tables import TableSpec
from ringflex.kernels.scalar_rules import RULES
from ringflex.kernels.scalars import (
    HALF,
    INT32,
    LARGEST_INDEX,
    TRITON_NAMES,
    Emitter,
    Unsupported,
    Value,
    number,
    range_of,
)
from ringflex.masks.pointwise import PointwiseMod
from ringflex.masks.traced_mod import user_line

_LARGEST_BATCH = 2**20  # batch elements, heads
_MOST_COMPONENTS = 256  # of a vector inside a mod

_aten = torch.ops.aten
_Array = np.ndarray[Any, np.dtype[Any]]  # of Values

_BOUNDS = {
    "b": (0, _LARGEST_BATCH - 1),
    "h": (0, _LARGEST_BATCH - 1),
    "q_idx": (0, LARGEST_INDEX - 1),
    "kv_idx": (0, LARGEST_INDEX - 1),
}


class GraphWriter:
    """Walks a graph; then says what any of its values is called.

    Args:
        body: the graph, and which of its inputs are tables.
        specs: of the tables.
        arguments: names of the other inputs in the generated function.
        kind: what the graph is, for messages.
        tanh: which of `triton_math` to call.
    """

    def __init__(
        self,
        body: PointwiseMod,
        specs: Sequence[TableSpec],
        arguments: list[str],
        kind: str,
        tanh: str = "accurate_tanh",
    ) -> None:
        self.body, self.specs, self.kind = body, specs, kind
        # A comparison may tell how often a product was rounded.
        self.emitter = Emitter(tanh=tanh, fuses=kind != "mask_mod")
        self.values: dict[fx.Node, _Array] = {}
        self.tables: dict[fx.Node, int] = {n: i for i, n in enumerate(body.table_inputs)}
        self.first = [0, *itertools.accumulate(spec.entries for spec in specs)]
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
            if dtype not in TRITON_NAMES:
                raise Unsupported(f"it computes in {dtype}")
            if packet in _SHAPING:
                return _SHAPING[packet](node, self.value_of(node.args[0]))
            if packet is operator.getitem:
                return self._item(*node.args)
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
        whole = _takes_size(node)

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

    def _item(self, source: Any, at: Any) -> _Array:
        """One of an operation's results."""
        if at == 0:
            return self.value_of(source)
        if getattr(source.target, "overloadpacket", None) is not _aten.log_sigmoid_forward:
            raise Unsupported("it uses a second result")
        x = self.value_of(source.args[0])  # exp(-|x|), for its derivative
        steps = (_aten.abs, _aten.neg, _aten.exp)
        for at_, value in np.ndenumerate(x):
            for step in steps:
                value = RULES[step](self.emitter, torch.float32, value)
            x = x.copy()
            x[at_] = value
        return x

    def _fold(self, packet: Any, node: fx.Node, dtype: torch.dtype) -> _Array:
        """Sums and the like over the components of a vector."""
        x = self.value_of(node.args[0])
        if packet is _aten.dot:
            pairs = zip(x.flat, self.value_of(node.args[1]).flat, strict=True)
            wide = torch.float32 if dtype in HALF else dtype
            products = [RULES[_aten.mul](self.emitter, wide, a, b) for a, b in pairs]
            return _scalar(self.emitter.settle(self._reduce(_aten.add, wide, products), dtype))
        if packet in (_aten.max, _aten.min) and len(node.args) > 1:
            raise Unsupported("its second result is a position")
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        dims = sorted({d % x.ndim for d in dims}) if dims else list(range(x.ndim))  # type: ignore
        kept = [d for d in range(x.ndim) if d not in dims]
        lists = x.transpose([*kept, *dims]).reshape(*(x.shape[d] for d in kept), -1)
        result = np.empty(lists.shape[:-1], dtype=object)
        wide = torch.float32 if dtype in HALF else dtype  # rounded once, at the end
        for at in np.ndindex(result.shape):
            items = [self.emitter.cast(v, wide) for v in lists[at]]
            folded = self._reduce(_FOLDING[packet], wide, items)
            if packet is _aten.mean:
                count = number(float(len(items)))
                folded = RULES[_aten.div](self.emitter, wide, folded, count)
            result[at] = self.emitter.settle(folded, dtype)
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
            found[component] = self._loaded(pointer, table, depends)
        shape = tuple(max(c[d] for c in found) + 1 for d in range(len(next(iter(found)))))
        values = np.empty(shape, dtype=object)
        for component, value in found.items():
            values[component] = value
        return values

    def _loaded(self, pointer: str, table: int, depends: frozenset[str]) -> Value:
        """An element of a table, which may be stored in a narrower integer than the graph's."""
        stored, dtype = self.specs[table].dtype, self.body.table_inputs[table].meta["val"].dtype
        if stored not in TRITON_NAMES:
            raise Unsupported(f"it reads a captured tensor of {stored}")
        text = f"tl.load({pointer})"
        if stored == torch.bool:
            text += " != 0"
        elif stored in HALF:
            text += ".to(tl.float32)"
        elif stored in (torch.int8, torch.uint8, torch.int16):
            text += ".to(tl.int32)"
        bounds = None if stored.is_floating_point else range_of(stored)
        return self.emitter.let(text, dtype, [Value("", dtype, depends)], bounds)

    def _components(
        self, spec: TableSpec, table: int, indices: list[Any]
    ) -> Iterator[tuple[tuple[int, ...], list[Value]]]:
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
        if int(np.prod(counts, dtype=np.int64)) > _MOST_COMPONENTS:
            raise Unsupported(
                f"it reads {int(np.prod(counts))} elements per score, more than {_MOST_COMPONENTS}"
            )
        for at in np.ndindex(counts):
            places: list[Value] = []
            slices = iter(at)
            for dim, g in enumerate(given):
                if g is None:
                    places.append(number(next(slices)))
                else:
                    index: Any = np.broadcast_to(g, shape)[at if shape else ()]
                    places.append(self._place(index, table, dim))
            yield at, places

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


def _takes_size(node: fx.Node) -> bool:
    """Whether a list among the arguments is a shape."""
    return any(isinstance(a, (list, tuple, torch.Size)) for a in node.args)


def _scalar(value: Value) -> _Array:
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    shape = tuple(int(n) for n in value.shape)  # type: ignore[union-attr]
    if int(np.prod(shape, dtype=np.int64)) > _MOST_COMPONENTS:
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
    dim, at = node.args[1:]
    assert isinstance(dim, int) and isinstance(at, int)
    return np.asarray(np.take(x, at, axis=dim), dtype=object)


def _slice(node: fx.Node, x: _Array) -> _Array:
    given: list[Any] = list(node.args[1:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    key = [slice(None)] * x.ndim
    key[dim] = slice(start, end, step)
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
