"""Federated benchmarks of low-rank layers on Flower. Start with `lowrank_fl.run.run` or the command `lowrank fl run`."""
