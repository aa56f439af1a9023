"""A tiny SDXL: the real topology, small enough for a laptop, pre-trained on drawings of coloured shapes."""
