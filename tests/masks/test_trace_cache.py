"""A score mod is traced once for what its trace depends on, and anew for what it may."""

import functools
import os
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx import graph_module

import ringflex as rf
from ringflex.masks import trace_cache
from ringflex.masks.trace_cache import traced_score
from ringflex.masks.traced_mod import user_line

F32 = torch.float32
FACTOR = 2.0
TABLE = torch.arange(5.0)


@pytest.fixture(autouse=True)
def _forget() -> None:
    trace_cache._traces.clear()


def traces_of(*mods: Callable[..., Tensor], dtype: torch.dtype = F32) -> int:
    """How many of these mods, one after the other, are traced."""
    with mock.patch.object(trace_cache, "trace_score", wraps=trace_cache.trace_score) as traced:
        for mod in mods:
            traced_score(mod, dtype)
    return traced.call_count


def test_the_same_kind_is_traced_once() -> None:
    slopes = torch.ones(4)
    assert traces_of(rf.softcap(3.0), rf.softcap(3.0), rf.softcap(3.0)) == 1
    assert traces_of(rf.alibi(slopes), rf.alibi(slopes), rf.alibi(torch.zeros(4))) == 1
    assert traces_of(*(rf.compose(rf.softcap(2.0), rf.alibi(torch.ones(4))) for _ in "12")) == 1


def test_what_differs_is_traced_anew() -> None:
    x = torch.ones(4)
    assert traces_of(rf.softcap(3.0), rf.softcap(4.0)) == 2
    assert traces_of(rf.alibi(x), rf.alibi(torch.ones(5)), rf.alibi(x.double())) == 3
    assert traces_of(rf.alibi(torch.ones(4, requires_grad=True))) == 1
    assert traces_of(rf.compose(rf.alibi(x), rf.alibi(x))) == 1
    assert traces_of(rf.compose(rf.alibi(x), rf.alibi(x.clone()))) == 1  # two tensors, not one
    assert traces_of(rf.softcap(3.0), dtype=torch.float64) == 1


def test_new_tensors_are_bound_to_the_old_graph() -> None:
    first, second = torch.ones(4), torch.full((4,), 2.0, requires_grad=False)
    traced_score(rf.alibi(first), F32)
    mod = traced_score(rf.alibi(second), F32)
    assert len(mod.captures) == 1 and mod.captures[0] is second
    index = torch.tensor([3])
    value = mod.evaluate(index, index, index, index + 2, score=torch.zeros(1))
    assert value.item() == 4.0
    two = rf.compose(rf.alibi(first), rf.relative_position(torch.zeros(4, 3)))
    traced_score(two, F32)
    a, b = torch.rand(4), torch.rand(4, 3)
    assert [
        c is x
        for c, x in zip(
            traced_score(rf.compose(rf.alibi(a), rf.relative_position(b)), F32).captures, (a, b)
        )
    ] == [True, True]


def test_globals_defaults_and_partials_count() -> None:
    def by_global(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * FACTOR + TABLE[k]

    def by_default(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, f: float = 1.0) -> Tensor:
        return s * f

    assert traces_of(by_global, by_global) == 1
    with mock.patch.dict(globals(), FACTOR=3.0):
        assert traces_of(by_global) == 1
    with mock.patch.dict(globals(), TABLE=torch.arange(6.0)):
        assert traces_of(by_global) == 1
    two, three = (functools.partial(by_default, f=f) for f in (2.0, 3.0))
    assert traces_of(by_default, two, two, three) == 3


def test_attributes_of_modules_classes_and_functions_count() -> None:
    """Those that the code names, also through other modules, and tensors among them."""
    config, inner = types.ModuleType("config"), types.ModuleType("inner")
    config.factor, config.inner, inner.table = 2.0, inner, torch.ones(4)

    class Model:
        factor = 2.0
        unused = 1.0

        @staticmethod
        def scaled(s: Tensor) -> Tensor:
            return s * Model.factor

    def by_itself(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * by_itself.factor  # type: ignore[attr-defined]

    by_itself.factor = 2.0  # type: ignore[attr-defined]
    mods: list[tuple[Callable[..., Tensor], Any, str, Any]] = [
        (lambda s, b, h, q, k: s * config.factor, config, "factor", 3.0),
        (lambda s, b, h, q, k: s * config.inner.table[k], inner, "table", torch.zeros(4)),
        (lambda s, b, h, q, k: s * Model.factor, Model, "factor", 3.0),
        (lambda s, b, h, q, k: Model.scaled(s), Model, "factor", 3.0),
        (by_itself, by_itself, "factor", 3.0),
    ]
    index = torch.tensor([3])
    value = lambda mod: traced_score(mod, F32).evaluate(*[index] * 4, score=torch.ones(1)).item()
    for mod, where, name, other in mods:
        before = value(mod)
        assert traces_of(mod, mod) == 0
        with mock.patch.object(where, name, other):
            assert value(mod) != before
    assert traces_of(mods[2][0]) == 0
    with mock.patch.object(Model, "unused", 5.0):
        assert traces_of(mods[2][0]) == 0


class Settings:
    factor = 2.0

    @classmethod
    def scaled(cls, s: Tensor) -> Tensor:
        return s * cls.factor

    @staticmethod
    def scaled_by_name(s: Tensor) -> Tensor:
        return s * Settings.factor + 0 * Settings.scaled(s)


def scaled_by(settings: Any, s: Tensor) -> Tensor:
    return s * settings.factor


def attribute(settings: Any, name: str, s: Tensor) -> Tensor:
    value: Tensor = s * getattr(settings, name)
    return value


MODS: dict[str, Callable[..., Tensor]] = {
    "helper": lambda s, b, h, q, k: scaled_by(Settings, s),
    "class method": lambda s, b, h, q, k: Settings.scaled(s),
    "in a circle": lambda s, b, h, q, k: Settings.scaled_by_name(s),
    "getattr": lambda s, b, h, q, k: s * getattr(Settings, "factor"),  # noqa: B009
    "getattr of a name": lambda s, b, h, q, k: attribute(Settings, "factor", s),
    "partial": functools.partial(lambda settings, s, b, h, q, k: scaled_by(settings, s), Settings),
}


@pytest.mark.parametrize("name", MODS)
def test_attributes_that_helpers_ask_for_count(name: str) -> None:
    index, score = torch.tensor([3]), torch.ones(1)
    value = lambda: traced_score(MODS[name], F32).evaluate(*[index] * 4, score=score).item()
    assert value() == 2.0
    assert traces_of(MODS[name], MODS[name]) == 0
    with mock.patch.object(Settings, "factor", 3.0):
        assert value() == 3.0
    assert value() == 2.0
    assert traces_of(MODS[name]) == 0


def test_what_cannot_be_compared_is_traced_at_every_call() -> None:
    class Model:
        factor = 2.0

        def score(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.factor

    factors = [2.0]
    by_list = lambda s, b, h, q, k: s * factors[0]
    model = Model()
    assert traces_of(model.score, model.score) == 2
    assert traces_of(by_list, by_list) == 2
    lookup = {"factor": 2.0}.get
    by_method_of_an_object = lambda s, b, h, q, k: s * lookup("factor")
    assert traces_of(by_method_of_an_object, by_method_of_an_object) == 2
    by_environment = lambda s, b, h, q, k: s * float(os.environ.get("FACTOR", 1))
    assert traces_of(by_environment, by_environment) == 2


def test_a_remembered_mod_still_knows_its_lines() -> None:
    def odd(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(s.abs() + 1)  # this very line

    traced_score(odd, F32)
    mod = traced_score(odd, F32)
    (node,) = (n for n in mod.module.graph.nodes if n.target is torch.ops.aten.lgamma.default)
    assert "test_trace_cache.py" in user_line(mod, node)
    assert "# this very line" in user_line(mod, node)


def test_values_that_change_are_seen() -> None:
    """In place, or by another object."""
    table, q = torch.zeros(2, 3), torch.randn(1, 2, 20, 8)
    run = lambda bias: rf.flex_attention(q, q, q, rf.relative_position(bias))
    before = run(table)
    table[:, 0] += 1
    assert not torch.equal(run(table), before)
    assert torch.equal(run(torch.zeros(2, 3)), before)


def test_tensors_of_a_closure_are_not_kept_alive() -> None:
    import gc
    import weakref

    bias = torch.zeros(2, 4096)[:, :3]
    gone = weakref.ref(bias)
    traced_score(rf.relative_position(bias), F32)
    del bias
    gc.collect()
    assert gone() is None


def test_memory_is_bounded() -> None:
    for cap in range(1, trace_cache._KEPT + 20):
        traced_score(rf.softcap(float(cap)), F32)
    assert len(trace_cache._traces) == trace_cache._KEPT


def test_no_sources_are_kept() -> None:
    """fx would keep one or two for each time that a mod is traced."""

    class Model:
        factor = 2.0

    model = Model()
    kept = graph_module._loader.eval_cache
    q, k, v = (torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3))
    before = len(kept)
    for _ in range(3):
        out = rf.flex_attention(q, k, v, lambda s, b, h, q, k: s * model.factor)
        out.sum().backward()
    assert len(kept) == before


def test_threads_trace_one_after_the_other() -> None:
    """Masks and scores, with derivatives, that nobody traced before."""
    x = torch.randn(1, 1, 64, 8)

    def attend(number: int) -> float:
        q = x.clone().requires_grad_()
        mask = lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) * number >= 0
        score = lambda score, b, h, q_idx, kv_idx: score * (1 + number) + q_idx * 0.1
        block_mask = rf.create_block_mask(mask, None, None, 64, 64, BLOCK_SIZE=16)
        out = rf.flex_attention(q, x, x, score, block_mask)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        return float(gradient.abs().sum())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attend, range(24)))
    trace_cache._traces.clear()
    assert found == pytest.approx([attend(number) for number in range(24)], rel=1e-5)
