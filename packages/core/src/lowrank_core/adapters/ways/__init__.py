"""The exact ways to compute an adapted layer's output, and which of them is cheapest where."""
