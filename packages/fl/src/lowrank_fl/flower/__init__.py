"""Everything that touches Flower, in one folder, because Flower changes monthly."""

import os

# Both are read when flwr is imported: a benchmark must not call out.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
