"""Plan which layer is held by which decomposition, and say why the others are kept."""

from deeptwist.plan.plan import Plan, PlannedLayer, plan, read_plan

__all__ = ["Plan", "PlannedLayer", "plan", "read_plan"]
