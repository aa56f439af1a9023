"""Server strategies: Flower's own by name, and SCAFFOLD and FedDyn, which Flower has not. Usable in any Flower app."""

from lowrank_fl.flower.strategies.build import make_strategy
from lowrank_fl.flower.strategies.feddyn import FedDyn
from lowrank_fl.flower.strategies.private import make_private, reported
from lowrank_fl.flower.strategies.scaffold import Scaffold
from lowrank_fl.flower.strategies.state import load_strategy_state, strategy_state

__all__ = ["FedDyn", "Scaffold", "load_strategy_state", "make_private", "make_strategy", "reported", "strategy_state"]
