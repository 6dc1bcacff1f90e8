"""The plan: everything that is decided from the images, before anything is touched.

`areas` decides for each area of memory, `pages` has verdicts on pages as arrays, `sharing` the
pages that tasks share by fork, `pool` the use of the guest's pool.
"""

from ovr.plan.plan import NOT_DUMPED, Plan, SharedPlan, TaskPlan, make_plan

__all__ = ["NOT_DUMPED", "Plan", "SharedPlan", "TaskPlan", "make_plan"]
