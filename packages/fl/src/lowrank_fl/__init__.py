"""Federated benchmarks of low-rank layers on Flower; start with `lowrank_fl.run.run` or `lowrank fl run`."""
