"""The networks of the benchmarks, plain torch layers that `lowrank_core.factorize` then changes."""
