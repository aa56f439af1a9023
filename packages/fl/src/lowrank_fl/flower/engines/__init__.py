"""What carries messages between the server and its clients, and evaluates models: one interface, several engines."""

from lowrank_fl.flower.engines.engine import Engine, make_engine, worker_count

__all__ = ["Engine", "make_engine", "worker_count"]
