"""SDXL fine-tuning with low-rank adapters."""

import logging

# diffusers and PEFT import bitsandbytes wherever it is installed, which then warns of a kernel that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
