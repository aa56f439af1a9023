"""SDXL fine-tuning with low-rank adapters."""
