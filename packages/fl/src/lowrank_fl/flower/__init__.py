"""Everything that touches Flower, in one folder, because Flower changes monthly."""

import logging
import os

# Both are read when flwr is imported: a benchmark must not call out.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import flwr.app  # noqa: F401 - sets up the logger that is quieted next

# Flower logs every step of every round at INFO.
logging.getLogger("flwr").setLevel(logging.ERROR)
