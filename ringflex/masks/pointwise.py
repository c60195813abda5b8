"""A traced mod as a function of one score: what is computed per score, over which tables.

What does not depend on the indices is computed once, before a kernel runs: it turns the captured
tensors into *tables*. The rest is a graph over scalars (or short vectors of them) and reads of
those tables, which a fused kernel evaluates at every score; `derivative` is that of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ringflex.masks.graph_rewrites import tracing
from ringflex.masks.traced_mod import TracedMod
from ringflex.modes import without_autocast

_aten = torch.ops.aten
# Derivatives that autograd records as one operation, in terms of elementary ones.
_DECOMPOSED: Any = get_decompositions(
    [
        _aten.elu_backward, _aten.gelu_backward, _aten.hardtanh_backward,
        _aten.leaky_relu_backward, _aten.log_sigmoid_backward, _aten.silu_backward,
        _aten.sigmoid_backward, _aten.softplus_backward, _aten.tanh_backward,
        _aten.threshold_backward, _aten.select_backward, _aten.sgn,
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PointwiseMod:
    """What a mod does per score.

    Attributes:
        mod: the traced mod, without the captured tensors.
        graph: inputs are the mod's arguments (a score mod's first is the score), then the tables.
        arguments: number of arguments. mod_arguments: those of the mod; a derivative has one more.
        sources: nodes of the mod's graph that give the tables.
        scattered: which tables the graph adds gradients into (of a derivative).
    """

    mod: TracedMod
    graph: fx.Graph
    arguments: int
    mod_arguments: int
    sources: tuple[fx.Node, ...]
    scattered: tuple[bool, ...] = ()

    @cached_property
    def table_inputs(self) -> tuple[fx.Node, ...]:
        """The inputs of `graph` that are tables."""
        return tuple(n for n in self.graph.nodes if n.op == "placeholder")[self.arguments :]

    def tables(self, captures: Sequence[Tensor]) -> list[Tensor]:
        """The tables from the captured tensors; differentiable in them.

        A captured tensor without dimensions may be on the CPU whatever the others' device is.
        """
        values: dict[fx.Node, Any] = {}
        remaining = list(captures)
        device = next((c.device for c in captures if c.ndim), None)
        for i, node in enumerate(n for n in self.mod.module.graph.nodes if n.op == "placeholder"):
            if i >= self.mod_arguments:
                capture = remaining.pop(0)
                values[node] = capture if device is None else capture.to(device)
        with without_autocast():
            for node in self._prologue:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if "device" in kwargs and device is not None:
                    kwargs = {**kwargs, "device": device}
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
        return [values[source] for source in self.sources]

    @cached_property
    def _prologue(self) -> list[fx.Node]:
        """The operations behind the tables, in order."""
        wanted = set(self.sources)
        order = []
        for node in reversed(list(self.mod.module.graph.nodes)):
            if node in wanted and node.op == "call_function":
                wanted.update(node.all_input_nodes)
                order.append(node)
        return order[::-1]


def pointwise(mod: TracedMod) -> PointwiseMod:
    """Splits a traced mod into tables and what is computed per score."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in mod.module.graph.nodes if n.op == "placeholder"]
    arguments = len(inputs) - len(mod.captures)
    for node in inputs[:arguments]:
        copied[node] = _input(graph, node)
    varying = mod.varying
    output = next(n for n in mod.module.graph.nodes if n.op == "output")
    users = [n for n in mod.module.graph.nodes if n in varying] + [output]
    constants = _constants(mod)
    sources: list[fx.Node] = []
    for user in users:
        for node in user.all_input_nodes:
            fixed = node not in varying and node not in copied
            if fixed and node not in constants and node not in sources:
                sources.append(node)
    for node in sources:
        copied[node] = _input(graph, node)
    for node in mod.module.graph.nodes:
        if node in varying or node in constants:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[output.args[0]])
    body = replace(mod, captures=())  # what is kept with a mod keeps no tensor of its alive
    return PointwiseMod(body, graph, arguments, arguments, tuple(sources))


@tracing()
def derivative(body: PointwiseMod, wanted: Sequence[bool]) -> PointwiseMod:
    """The gradient of a score mod, by tracing autograd.

    The graph's inputs are the arguments, the gradient of the result, and the tables. Its outputs
    are the gradient of the score and, for each table that is `wanted`, an expression of `index_put`
    into zeros, for `scatters`.

    Raises:
        NotImplementedError: autograd cannot differentiate the mod.
    """
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    nodes = [n for n in body.graph.nodes if n.op == "call_function"]
    result = next(n for n in body.graph.nodes if n.op == "output").args[0]

    def gradient(*values: Tensor) -> list[Tensor | None]:
        given = [*values[: body.arguments], *values[body.arguments + 1 :]]
        known: dict[Any, Any] = dict(zip(inputs, given, strict=True))
        leaves = [known[inputs[0]].detach().requires_grad_()]
        known[inputs[0]] = leaves[0]
        for node, want in zip(body.table_inputs, wanted, strict=True):
            if want:
                known[node] = known[node].detach().requires_grad_()
                leaves.append(known[node])
        with torch.enable_grad():
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                kwargs = {k: v for k, v in kwargs.items() if k != "device"}
                known[node] = node.target(*args, **kwargs)
            y = known[result]
        if not y.requires_grad:
            return [None] * len(leaves)
        upstream = values[body.arguments].to(y.dtype)
        return list(torch.autograd.grad(y, leaves, upstream, allow_unused=True))

    def example(node: fx.Node) -> Tensor:
        value = node.meta["val"]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    examples = [example(n) for n in inputs]
    examples.insert(body.arguments, torch.empty((), dtype=examples[0].dtype, device="meta"))
    try:
        module = make_fx(gradient, decomposition_table=_DECOMPOSED)(*examples)
    except RuntimeError as error:
        raise NotImplementedError(
            f"score_mod '{body.mod.name}' cannot be differentiated: {error}"
        ) from error
    graph = module.graph
    graph.eliminate_dead_code()
    return replace(
        body, graph=graph, arguments=body.arguments + 1, scattered=tuple(bool(w) for w in wanted)
    )


def scatters(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """An expression for a table's gradient as terms `(indices, value)` to be added up.

    `value` has the shape of `table[indices]`; of a table without dimensions, indices are empty. It
    is not rounded to a table of half precision, as sums are kept in fp32.
    """
    if node is None:
        return []
    value = node.meta["val"]
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _ZEROS:
        return []
    if packet is _aten.index_put and node.args[3:4] == (True,):
        base, indices, added = node.args[:3]
        return scatters(base) + [(tuple(indices), _unrounded(added))]
    if packet is _aten.add and all(
        isinstance(a, fx.Node) and a.meta["val"].shape == value.shape for a in node.args
    ):
        if value.ndim:
            return [term for a in node.args for term in scatters(a)]
    elif packet in _SAME:
        return scatters(node.args[0]) if value.ndim else [((), _unrounded(node))]
    if value.ndim == 0:
        return [((), _unrounded(node))]
    raise NotImplementedError(f"the gradient of a captured tensor through {node.target}")


def _unrounded(node: Any) -> Any:
    """What was rounded to half precision last of all, before that."""
    if isinstance(node, fx.Node) and node.target is _aten._to_copy.default:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        if node.meta["val"].dtype.itemsize == 2 and before.meta["val"].is_floating_point():
            return before
    return node


_ZEROS = (_aten.new_zeros, _aten.zeros_like, _aten.zeros)
_SAME = (_aten._to_copy, _aten.detach, _aten.clone, _aten.alias)


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.placeholder(node.name)
    copy.meta["val"] = node.meta["val"]
    return copy


def _constants(mod: TracedMod) -> set[fx.Node]:
    """Operations that depend on nothing at all: numbers, written into the mod."""
    constants: set[fx.Node] = set()
    for node in mod.module.graph.nodes:
        if node.op == "call_function" and node not in mod.varying:
            value = node.meta.get("val")
            alone = all(n in constants for n in node.all_input_nodes)
            if alone and isinstance(value, Tensor) and value.ndim == 0:
                constants.add(node)
    return constants
