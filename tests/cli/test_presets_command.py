"""`lowrank fl presets`."""

import json

from lowrank_fl.presets import presets


def test_every_preset_has_a_line(lowrank):
    outcome = lowrank("fl", "presets")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()[2:]]
    assert lines == [f"{name} {description}" for name, description in presets().items()]


def test_json_names_and_describes_every_preset(lowrank):
    tree = json.loads(lowrank("fl", "presets", "--json").out)
    assert {preset["name"]: preset["description"] for preset in tree["presets"]} == presets()
