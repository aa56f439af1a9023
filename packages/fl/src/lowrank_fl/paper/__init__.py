"""The paper's settings and results as data (`tables.json`), and how a run of ours is held against them."""
