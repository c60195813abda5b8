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
import linecache
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import fx

from ringflex.kernels import triton_math
from ringflex.kernels.graph_writer import GraphWriter
from ringflex.kernels.mod_tables import TableSpec
from ringflex.kernels.scalars import number
from ringflex.masks.pointwise import PointwiseMod, scatters

_aten = torch.ops.aten
_KEPT = 1024
_functions: OrderedDict[str, Any] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Lowered:
    """A generated function.

    Attributes:
        function: the `@triton.jit` function.
        source: its text.
        trivial: of a mask: True if everything is visible, whatever the indices.
    """

    function: Any
    source: str
    trivial: bool


def lower_mask(body: PointwiseMod, specs: Sequence[TableSpec]) -> Lowered:
    """The mask as a function.

    Raises:
        NotImplementedError: an operation outside the table; names it and the user's line.
    """
    writer = GraphWriter(body, specs, ["b", "h", "q_idx", "kv_idx"], "mask_mod")
    visible = writer.value_of(writer.output).item()
    visible = writer.emitter.cast(visible, torch.bool)
    result = visible.text
    if visible.is_number:
        result = "kv_idx >= 0" if visible.number else "kv_idx < 0"
    return _finished(writer, "mask", "b, h, q_idx, kv_idx, tables", result, trivial=visible.number)


def lower_score(
    body: PointwiseMod, specs: Sequence[TableSpec], *, tanh: str = "accurate_tanh"
) -> Lowered:
    """The score mod as a function of fp32 scores. Raises: as `lower_mask`.

    Args:
        tanh: which of `triton_math` to call.
    """
    arguments = ["score", "b", "h", "q_idx", "kv_idx"]
    writer = GraphWriter(body, specs, arguments, "score_mod", tanh)
    value = writer.emitter.cast(writer.value_of(writer.output).item(), torch.float32)
    result = writer.whole_tile(value, "score")
    return _finished(writer, "score", "score, b, h, q_idx, kv_idx, tables", result)


def lower_gradient(
    gradient: PointwiseMod, specs: Sequence[TableSpec], *, tanh: str = "accurate_tanh"
) -> Lowered:
    """The derivative of a score mod (`pointwise.derivative`). Raises: as `lower_mask`."""
    arguments = ["score", "b", "h", "q_idx", "kv_idx", "grad"]
    writer = GraphWriter(gradient, specs, arguments, "the derivative of score_mod", tanh)
    dscore, *dtables = writer.output
    position = 0
    for i, (node, wanted) in enumerate(zip(_wanted(gradient, dtables), gradient.scattered)):
        if wanted:
            try:
                terms = scatters(node)
            except NotImplementedError as problem:
                name = gradient.mod.name
                raise NotImplementedError(f"score_mod '{name}': {problem}") from None
            for indices, added in terms:
                writer.scatter(i, position, indices, added)
            position += 2 + max(0, specs[i].ndim - 1)
    value = number(0.0)
    if dscore is not None:
        value = writer.emitter.cast(writer.value_of(dscore).item(), torch.float32)
    signature = "score, grad, b, h, q_idx, kv_idx, tables, into, HOW, Q_AXIS"
    return _finished(writer, "gradient", signature, writer.whole_tile(value, "grad"))


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


def _finished(
    writer: GraphWriter, name: str, signature: str, result: str, *, trivial: Any = False
) -> Lowered:
    lines = [*writer.emitter.lines, f"return {result}"]
    source = "".join(f"    {line}\n" for line in lines)
    digest = hashlib.blake2b((signature + source).encode(), digest_size=6).hexdigest()
    source = f"def {name}_{digest}({signature}):\n{source}"
    return Lowered(_compile(source), source, trivial is True)


def _compile(source: str) -> Any:
    """The `@triton.jit` function of a source text; the same object for the same text, unless
    `_KEPT` others came in between."""
    if source in _functions:
        _functions.move_to_end(source)
        return _functions[source]
    if len(_functions) >= _KEPT:
        _, dropped = _functions.popitem(last=False)
        linecache.cache.pop(f"<ringflex {dropped.__name__}>", None)
    name = source[4 : source.index("(")]
    filename = f"<ringflex {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"tl": tl, "triton": triton, "__name__": __name__}
    namespace |= {n: f for n, f in vars(triton_math).items() if not n.startswith("_")}
    exec(compile(source, filename, "exec"), namespace)
    _functions[source] = triton.jit(namespace[name])
    return _functions[source]
