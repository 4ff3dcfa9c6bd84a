"""One device for several models: what each takes beside its KV pool must fit together, and the pools share the rest."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.config.plan.plan import Plan, human_bytes
from headrace.config.spec import EngineSpec
from headrace.errors import DoesNotFit

__all__ = ["share_device"]


class _Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One model on a device.

    Attributes:
        fixed: bytes beside the pool.
        least: of its pool: the context that was asked for, or two blocks.
        most: of its pool: what it would take alone; both are the asked size where kv_cache_bytes is set.
    """

    name: str
    fixed: int
    least: int
    most: int


def share_device(pairs: Sequence[tuple[EngineSpec, Plan]]) -> list[EngineSpec]:
    """The specs with ``kv_cache_bytes`` such that all fit their device together.

    Args:
        pairs: specs with their plans, each drawn as if the model were alone. Those of one machine share it.

    Pools grow evenly beyond what each needs at least, none beyond what it would take alone. Raises DoesNotFit, naming
    what each needs.
    """
    sizes: dict[int, int] = {}
    for machine in dict.fromkeys(plan.machine for _, plan in pairs):
        here = [place for place, (_, plan) in enumerate(pairs) if plan.machine == machine]
        if len(here) > 1:
            tenants = [_tenant(*pairs[place]) for place in here]
            usable = max(pairs[place][1].budget.usable for place in here)
            sizes.update(zip(here, _pools(tenants, usable, machine)))
    return [
        msgspec.structs.replace(spec, kv_cache_bytes=sizes[place]) if sizes.get(place) else spec
        for place, (spec, _) in enumerate(pairs)
    ]


def _tenant(spec: EngineSpec, plan: Plan) -> _Tenant:
    budget = plan.budget
    fixed = budget.process + budget.weights + budget.reserve
    alone = max(budget.pool, 0)
    least = alone
    if plan.kv_token_bytes and spec.kv_cache_bytes is None:
        blocks = 1 + -(-(spec.max_model_len or spec.block_size) // spec.block_size)
        least = min(alone, blocks * spec.block_size * plan.kv_token_bytes)
    return _Tenant(name=spec.name, fixed=fixed, least=least, most=alone)


def _pools(tenants: Sequence[_Tenant], usable: int, machine: str) -> list[int]:
    """Bytes of each pool; 0 for a model without one."""
    left = usable - sum(tenant.fixed + tenant.least for tenant in tenants)
    if left < 0:
        needs = "; ".join(
            f"{tenant.name}: {human_bytes(tenant.fixed)}"
            + (f" and at least {human_bytes(tenant.least)} of KV" if tenant.least else "")
            for tenant in tenants
        )
        raise DoesNotFit(
            f"these models do not fit {machine} together ({needs}): usable are {human_bytes(usable)}, "
            f"{human_bytes(-left)} are missing; serve fewer of them, lower max_model_len or quantize",
            param="model",
        )
    pools = [tenant.least for tenant in tenants]
    modest_first = sorted(range(len(tenants)), key=lambda i: tenants[i].most - tenants[i].least)
    for done, i in enumerate(modest_first):
        more = min(tenants[i].most - tenants[i].least, left // (len(tenants) - done))
        pools[i] += more
        left -= more
    return pools
