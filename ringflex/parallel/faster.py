"""strategy="auto" over several nodes, for layers of a known shape: K/V moved between all GPUs, or
heads dealt within nodes ("ulysses"), whichever is predicted to take less time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ringflex.parallel.links import NOISE, whole_nodes
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.plan import Plan

if TYPE_CHECKING:
    from ringflex.parallel.comm import Communicator
    from ringflex.parallel.draft import MaskFunction

_Plans = Plan | dict[str, Plan]


def may_deal_heads(request: Mapping[str, Any], world_size: int) -> bool:
    """Whether "auto" has this choice: several whole nodes, heads that are multiples of a node's
    GPUs, and a layout that is not given block by block. Mistakes are left to planning."""
    shape, machine, H = request["shape"], request["machine"], request["H"]
    if request["strategy"] != "auto" or not isinstance(request["layout"], str):
        return False
    if not isinstance(shape, AttentionShape) or not isinstance(machine, Machine):
        return False
    gpus = machine.gpus_per_node
    heads = (shape.heads, shape.kv_heads, *([H] if isinstance(H, int) else []))
    return whole_nodes(world_size, gpus) and not any(n % gpus for n in heads)


class FasterPlanning:
    """As `Planning`. All ranks make both plans, and predict the same times of them."""

    def __init__(
        self,
        mask_mod: Callable[[], MaskFunction | Mapping[str, MaskFunction]],
        comm: Communicator | None,
        request: Mapping[str, Any],
    ) -> None:
        from ringflex.parallel.planner import Planning
        from ringflex.parallel.ulysses import UlyssesPlanning

        masks = functools.cache(mask_mod)  # errors are not kept: it raises again
        self.request = request
        self.plannings = (
            Planning(masks, comm, request),
            UlyssesPlanning(masks, comm, {**request, "strategy": "ulysses"}),
        )

    def finish(self) -> _Plans:
        between, dealt = (planning.finish() for planning in self.plannings)
        faster = is_faster(_listed(dealt), _listed(between), self.request)
        return dealt if faster else between


def is_faster(dealt: Sequence[Plan], between: Sequence[Plan], request: Mapping[str, Any]) -> bool:
    """Whether one layer of each of the former takes less time than of the latter."""

    def seconds(plans: Sequence[Plan]) -> float:
        return sum(_predicted(plan, request["shape"], request["machine"]) for plan in plans)

    return seconds(dealt) * (1 + NOISE) < seconds(between)


def _predicted(plan: Plan, shape: AttentionShape, machine: Machine) -> float:
    """Seconds of a layer; kept with the plan, as those of the last batches are remembered."""
    cache = (plan.nodes or plan).cache
    key = "seconds", plan.strategy, shape, machine
    if key not in cache:
        cache[key] = plan.predict(shape, machine).both
    seconds: float = cache[key]
    return seconds


def _listed(plans: _Plans) -> list[Plan]:
    return list(plans.values()) if isinstance(plans, dict) else [plans]
