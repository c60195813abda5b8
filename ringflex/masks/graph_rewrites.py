"""Rewrites of a graph that `trace` recorded, and what can be said of it.

After them it reads tensors by whole indices, writes into none, and takes the captured ones as
inputs.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import graph_module

from ringflex.masks.traced_mod import INDEX

_turn = RLock()


@contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time, as fx patches what all of the process uses.

    Forgets the source text of modules made meanwhile, which fx keeps for as long as the process
    lives: there would be one for each time that a mod is traced. Their graphs are walked, not run.
    """
    with _turn:
        kept = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
        before = set(kept)
        try:
            yield
        finally:
            for name in kept.keys() - before:
                kept.pop(name, None)
                linecache.cache.pop(name, None)


def lift_captures(module: fx.GraphModule) -> tuple[Tensor, ...]:
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


def merge_nested_reads(module: fx.GraphModule) -> None:
    """`table[b][q_idx]` reads `table[b, q_idx]`: one scalar read instead of a row."""
    for node in module.graph.nodes:
        if node.target is not INDEX or None in node.args[1]:
            continue
        row = node.args[0]
        if row.target is INDEX and all(i is not None and _is_scalar(i) for i in row.args[1]):
            node.args = (row.args[0], [*row.args[1], *node.args[1]])


def replace_approximations(module: fx.GraphModule) -> bool:
    """attention-gym's `approx::tanh` is tanh, with a permission; was there one?"""
    found = False
    for node in module.graph.nodes:
        if str(node.target).startswith("approx.tanh"):
            node.target = torch.ops.aten.tanh.default
            found = True
    return found


def free_constants(module: fx.GraphModule) -> None:
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


def make_functional(module: fx.GraphModule, kind: str, name: str) -> None:
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


def drop_reshapes(module: fx.GraphModule) -> None:
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


def dependence(
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
