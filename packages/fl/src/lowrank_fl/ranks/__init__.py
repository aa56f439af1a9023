"""Federated AdaLoRA: clients send importances, the server owns the ranks, and what is pruned no longer travels."""
