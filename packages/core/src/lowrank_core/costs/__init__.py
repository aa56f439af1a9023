"""What a method costs on a model, from shapes alone: parameters, reachable ranks and arithmetic, layer by layer."""
