"""For tests and benchmarks: how the CUDA kernels would be launched, forced to be, and were.

`plan` answers on any machine, with or without a GPU. What the others set holds for the whole process.
"""

from ._load import module

__all__ = [
    "plan",
    "reachable_configurations",
    "record_launches",
    "set_plan_override",
    "take_recorded_launches",
]

_C = module()
plan = _C.plan
set_plan_override = _C.set_plan_override
record_launches = _C.record_launches
take_recorded_launches = _C.take_recorded_launches
reachable_configurations = _C.reachable_configurations
