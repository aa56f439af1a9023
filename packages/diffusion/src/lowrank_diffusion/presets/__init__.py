"""The named runs. Each is a YAML file here whose first line, a comment, says what it is."""

from importlib.resources import files


def presets() -> dict[str, str]:
    """Every preset's name and its one line, the quick one first."""
    found = {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for path in files(__name__).iterdir()
        if path.name.endswith(".yaml")
    }
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "quickstart", name))}


def read_preset(name: str) -> str:
    """The YAML text of a preset that exists."""
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
