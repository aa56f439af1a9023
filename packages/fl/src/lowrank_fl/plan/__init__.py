"""What a run would cost, found out without training: parameters, traffic, arithmetic and time on this machine."""

from lowrank_fl.plan.runs import Plan, RunPlan, plan

__all__ = ["Plan", "RunPlan", "plan"]
