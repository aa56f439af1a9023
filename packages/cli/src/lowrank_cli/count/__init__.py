"""`lowrank count-params`: what a method costs on a model, told without weights."""
