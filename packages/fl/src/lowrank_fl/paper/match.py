"""Whether a run is the paper's, and if it is nearly so, what differs."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from lowrank_fl.config import RunConfig
from lowrank_fl.load import load_config
from lowrank_fl.paper.rows import SIZES, PaperRow, ranges, stand_ins

Essence = Mapping[str, Any]
"""By dotted key, what of a configuration can change a result."""

DEFAULT_GAMMA = 0.1
"""Of a factorized run whose configuration names no rank rule."""
_RANK_RULES = ("model.gamma", "model.ratio", "model.rank", "model.budget")
_IRRELEVANT = frozenset(
    {"name", "seed", "device", "data.path", "data.image_key", "data.label_key", "partition.id_column"}
    | {"federation.tolerated_failures", "personalization.kind", "aggregation.gap"}
)
_OF_STRATEGY = {
    "fedavgm": ("server_lr", "server_momentum"),
    "fedprox": ("mu",),
    "fedadam": ("server_lr", "beta1", "beta2", "tau"),
    "fedyogi": ("server_lr", "beta1", "beta2", "tau"),
    "fedadagrad": ("server_lr", "tau"),
    "scaffold": ("server_lr",),
    "feddyn": ("alpha",),
    "fedtrimmedavg": ("trim",),
    "krum": ("malicious",),
}
_OF_ADALORA = frozenset(f"adapter.{key}" for key in ("target_rank", "warmup", "settle", "orthogonality"))
_OF_PERSONALIZATION = {"fedrep": ("epochs",), "ditto": ("epochs", "mu")}
_SERVER_LR = {"fedavgm": 1.0, "scaffold": 1.0}
_ADAPTIVE_SERVER_LR = 0.01

# Runs that differ here are other experiments; in all else they are the paper's experiment, not quite repeated.
_IDENTITY = frozenset(
    {"model.name", "model.width", "model.method", "model.init", "model.hybrid", "model.start"}
    | {"partition.kind", "partition.classes_per_client", "data.classes"}
    | {"partition.train_share", "partition.held_out", "strategy.name", "personalization", "codec.up", "codec.down"}
    | {"privacy.noise_multiplier", "attack.kind", "failures.dropout", "failures.deadline"}
    | {"aggregation.kind", "adapter.method", "adapter.rank", "adapter.target", "adapter.head", "update.kind"}
    | set(_RANK_RULES)
)
_SIZE_KEYS = frozenset(
    {"data.name", "model.name", "model.width", "model.method", "model.hybrid", "personalization"}
    | {"adapter.method", "update.kind"}
    | set(_RANK_RULES)
)


def essence(config: RunConfig) -> dict[str, Any]:
    """The keys that can change a result, with the values they have where none is given.

    Keys that the run's method, strategy, partition or personalisation does not read are left out, and so are the seed,
    the name, the engine and where the data lie.
    """
    tree = config.model_dump(mode="json", exclude={"engine", "sweep"})
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        flat |= (
            {f"{section}.{key}": _hashable(value) for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    kind, method, strategy = config.personalized, config.model.method, config.strategy.name
    dropped = set(_IRRELEVANT)
    if method == "original":
        dropped |= {"model.init", "model.hybrid", *_RANK_RULES}
    elif all(flat[rule] is None for rule in _RANK_RULES):
        flat["model.gamma"] = DEFAULT_GAMMA
    if config.adapter.method is None:
        dropped |= _unread(flat, "adapter", ())
    elif config.adapter.method != "adalora":
        dropped |= _OF_ADALORA
    flat["adapter.target_rank"] = config.adapter.last_rank
    if config.update.kind == "none":
        dropped |= _unread(flat, "update", ())
    if method != "fedpara":
        dropped |= {"model.tanh", "model.jacobian_lambda"}
    if config.model.name not in ("cnn", "mlp"):
        dropped.add("model.width")
    if config.partition.kind != "dirichlet":
        dropped.add("partition.alpha")
    if config.partition.kind != "pathological":
        dropped.add("partition.classes_per_client")
    if "topk" not in (config.codec.up, config.codec.down):
        dropped.add("codec.top_k")
    if config.aggregation.kind != "refit":
        dropped.add("aggregation.sweeps")
    if not config.privacy.on:
        dropped |= _unread(flat, "privacy", ("noise_multiplier",))
    elif config.privacy.clipping == "fixed":
        dropped |= {"privacy.quantile", "privacy.norm_lr"}
    if not config.failures.on:
        dropped |= _unread(flat, "failures", ("dropout", "stragglers", "deadline"))
    if config.attack.kind == "none":
        dropped |= _unread(flat, "attack", ("kind",))
    elif config.attack.kind == "labels":
        dropped.add("attack.scale")
    dropped |= _unread(flat, "strategy", ("name", *_OF_STRATEGY.get(strategy, ())))
    dropped |= _unread(flat, "personalization", ("test_epochs", *_OF_PERSONALIZATION.get(kind, ())))
    flat["personalization.test_epochs"] = config.test_epochs
    if flat["strategy.server_lr"] is None:
        flat["strategy.server_lr"] = _SERVER_LR.get(strategy, _ADAPTIVE_SERVER_LR)
    return {key: value for key, value in flat.items() if key not in dropped} | {"personalization": kind}


def differences(row: PaperRow, ours: Essence) -> list[str] | None:
    """What keeps a run from being the paper's, in words; none where it is; None for another experiment.

    Sizes follow from the model alone, so for them nothing else is looked at.
    """
    paper = of_preset(row.preset, tuple(row.set.items()))
    keys = sorted(paper.keys() | ours.keys())
    if row.quantity in SIZES:
        also = set() if row.quantity == "params" else {"codec.up", "codec.down", "strategy.name", "aggregation.kind"}
        keys = [key for key in keys if key in _SIZE_KEYS | also]
    found: list[str] = []
    for key in keys:
        theirs, own = paper.get(key), ours.get(key)
        bounds = ranges(row.preset).get(key)
        if theirs == own or (bounds is not None and own is not None and bounds[0] <= own <= bounds[1]):
            continue
        is_stand_in = key == "data.name" and stand_ins().get(str(own)) == theirs
        if key in _IDENTITY or (key == "data.name" and not is_stand_in):
            return None
        found.append(in_words(key, theirs if bounds is None else f"{bounds[0]:g} to {bounds[1]:g}", own))
    return found


def in_words(key: str, theirs: Any, own: Any) -> str:
    """`rounds: 200 in the paper, 30 here`."""
    return f"{key}: {_shown(theirs)} in the paper, {_shown(own)} here"


@cache
def of_preset(preset: str, changes: tuple[tuple[str, Any], ...]) -> Essence:
    """The essence of a preset with some keys changed."""
    return essence(load_config(preset, [f"{key}={value}" for key, value in changes]))


def _shown(value: Any) -> str:
    return (
        {None: "none", True: "on", False: "off"}.get(value, str(value))
        if not isinstance(value, float)
        else f"{value:g}"
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unread(flat: Essence, section: str, read: tuple[str, ...]) -> set[str]:
    prefix = f"{section}."
    return {key for key in flat if key.startswith(prefix) and key.removeprefix(prefix) not in read}
