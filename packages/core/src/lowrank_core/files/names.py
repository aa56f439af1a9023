"""kohya's names of modules, and which modules they mean.

A kohya file writes `lora_unet_down_blocks_1_attentions_0_proj_in` for `down_blocks.1.attentions.0.proj_in`. The
underscores that were dots cannot be told from the others, so names are looked up among those that a model has.
"""

from collections.abc import Collection, Mapping

from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import Component
from lowrank_core.files.check import some
from lowrank_core.files.sdxl import layers_per_block, text_layers, to_sgm, unet_layers

PREFIXES: dict[str, Component] = {
    "lora_unet_": "unet",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te_": "te1",
    "lycoris_": "",
}
PREFIX_OF: dict[Component, str] = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "": "lycoris_"}
_TEXT_LEVEL = "text_model."

Names = Mapping[Component, Collection[str]]
"""The modules' names of each model at hand."""


def with_text_level(name: str) -> str:
    """A text encoder's module as files name it: with the level `text_model`, which some versions of CLIP lack."""
    return name if name.startswith(_TEXT_LEVEL) or not name.startswith("encoder.") else _TEXT_LEVEL + name


def file_name(name: str, component: Component, *, sgm: bool = True, layers: int = 2, alone: bool = False) -> str:
    """A module's name in a kohya file, prefix and all; `alone` for the text encoder of a pipeline that has one."""
    if component == "unet" and sgm:
        name = to_sgm(name, layers)
    elif component in ("te1", "te2"):
        name = with_text_level(name)
    prefix = "lora_te_" if alone and component == "te1" else PREFIX_OF[component]
    return prefix + name.replace(".", "_")


def split_prefix(module: str) -> tuple[Component, str] | None:
    """The component and the rest of a kohya module's name; None if the prefix is none of those known."""
    for prefix, component in PREFIXES.items():
        if module.startswith(prefix):
            return component, module.removeprefix(prefix)
    return None


def names_for(
    component: Component, known: Names | None, *, single: bool, whole: bool = False
) -> Collection[str] | None:
    """The names of the model at hand that an adapter's part is for; None if it is for another.

    A file of one part goes to the one model there is, whatever either is called.

    Raises:
        LowrankError: it is for another, and the file is wanted whole.
    """
    if known is None:
        return None
    if component in known:
        return known[component]
    if single and len(known) == 1:
        return next(iter(known.values()))
    found = known.get("unet") if component == "" and single else None
    if found is None and whole:
        raise LowrankError(
            f"the adapter has a part for {component or 'a model without a name'}, which is not in the base; "
            "give the folder of the whole pipeline"
        )
    return found


def resolve(flat: Collection[str], component: Component, known: Collection[str] | None) -> dict[str, str]:
    """Which module each of the flat names (without prefix) means.

    known: the names of the model at hand; None: those of SDXL.

    Raises:
        LowrankError: names that match nothing, or two modules at once.
    """
    table, clashes = _table(component, known)
    if missing := [name for name in flat if name not in table]:
        where = "in the model" if known is not None else "in SDXL"
        hint = "give the model that the file belongs to" + (
            " (--base FOLDER, or load it onto the model)" if known is None else ", not this one"
        )
        raise LowrankError(f"the file names layers that are not {where}: {some(missing)}; {hint}")
    if unclear := [name for name in flat if name in clashes]:
        raise LowrankError(
            f"{unclear[0]} could be {clashes[unclear[0]]} or {table[unclear[0]]}; save the adapter as a PEFT folder"
        )
    found = {name: table[name] for name in flat}
    if len(set(found.values())) < len(found):
        doubled = next(name for name in flat if list(found.values()).count(found[name]) > 1)
        raise LowrankError(f"the file names {found[doubled]} twice, in two ways of writing; remove one of them")
    return found


def _table(component: Component, known: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """The flat names of all modules, in every way they are written; and those that mean a second module as well."""
    if known is None:
        known = text_layers() if component in ("te1", "te2") else unet_layers()
    layers = layers_per_block(known)
    table: dict[str, str] = {}
    clashes: dict[str, str] = {}
    for name in known:
        ways = [name]
        if component == "unet":
            ways.append(to_sgm(name, layers))
        elif component in ("te1", "te2"):
            ways += [with_text_level(name), name.removeprefix(_TEXT_LEVEL)]
        for way in dict.fromkeys(ways):
            other = table.setdefault(way.replace(".", "_"), name)
            if other != name:
                clashes[way.replace(".", "_")] = name
    return table, clashes


def fit(names: Collection[str], component: Component, known: Collection[str]) -> dict[str, str]:
    """Full names of an adapter's modules as this model writes them: CLIP's `text_model` level added or taken away.

    Raises:
        LowrankError: modules that the model does not have.
    """
    known = set(known)
    fitted: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        ways = [name, _TEXT_LEVEL + name, name.removeprefix(_TEXT_LEVEL)] if component != "unet" else [name]
        found = next((way for way in ways if way in known), None)
        if found is None:
            missing.append(name)
        else:
            fitted[name] = found
    if missing:
        raise LowrankError(
            f"the adapter is for layers that the model does not have: {some(missing)}; give the model it was trained on"
        )
    return fitted
