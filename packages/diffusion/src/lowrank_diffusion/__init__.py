"""SDXL fine-tuning with low-rank adapters: reserved; nothing is built here yet."""
