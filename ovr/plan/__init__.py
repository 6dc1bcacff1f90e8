"""Decide from the images what goes outside, before anything is touched.

`areas` decides for each area of memory, `pages` for runs of pages as arrays, `sharing` for the
pages that tasks share by fork, `pool` for the use of the guest's pool.
"""

from ovr.plan.inside import Inside, build_inside, pool_for
from ovr.plan.plan import NOT_DUMPED, Plan, SharedPlan, TaskPlan, check_kinds, make_plan
from ovr.plan.pool.layout import Pool
from ovr.plan.pool.table import NO_POOL, Cold, Warm

__all__ = [
    "NOT_DUMPED",
    "NO_POOL",
    "Cold",
    "Inside",
    "Plan",
    "Pool",
    "SharedPlan",
    "TaskPlan",
    "Warm",
    "build_inside",
    "check_kinds",
    "make_plan",
    "pool_for",
]
