"""adapter_config.json: our config and PEFT's fields, and back without losing any.

A field that means something here becomes a field of the config; every other one, and every value that the config would
write differently (null for an empty list, a schedule in steps), is kept in `other_fields` and written again as it was.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from lowrank_core.adapters.config import AdaLoRA, AdapterConfig, LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError, shortened

PEFT_TYPES: dict[str, type[AdapterConfig]] = {"LORA": LoRA, "LOHA": LoHa, "LOKR": LoKr, "ADALORA": AdaLoRA}

_COMMON = {
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "modules_to_save": "modules_to_save",
}
_LORA = {**_COMMON, "lora_alpha": "alpha", "lora_dropout": "dropout"}
_LYCORIS = {
    **_COMMON,
    "r": "rank",
    "alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "use_effective_conv2d": "tucker",
}
_FIELDS: dict[str, dict[str, str]] = {
    "LORA": {
        **_LORA,
        "r": "rank",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "use_rslora": "rank_stabilized",
    },
    "ADALORA": {
        **_LORA,
        "init_r": "rank",
        "alpha_pattern": "alpha_pattern",
        "target_r": "target_rank",
        "deltaT": "every",
        "beta1": "beta1",
        "beta2": "beta2",
        "orth_reg_weight": "orthogonality",
    },
    "LOHA": _LYCORIS,
    "LOKR": {
        **_LYCORIS,
        "decompose_both": "decompose_both",
        "decompose_factor": "factor",
        "rank_dropout_scale": "rank_dropout_scale",
    },
}
_NULLABLE: dict[str, Any] = {"exclude_modules": (), "modules_to_save": (), "rank_pattern": {}, "alpha_pattern": {}}
_COMPUTES_OTHERWISE = (
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "use_khatri_rao",
)
"""Fields with which PEFT computes something that the factors alone do not say."""
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take their factors out of the base weights, which the file does not hold."""
_WHOLE = ("target_r", "deltaT", "decompose_factor")
"""Fields for which no fraction is meant; a rank is looked at by the config itself."""
_PLAIN_STEPS = 1000
"""The length of a run in steps where only shares of it are known; AdaLoRA's JSON needs a number."""


def from_json(fields: Mapping[str, Any]) -> AdapterConfig:
    """The config that an adapter_config.json describes.

    Raises:
        LowrankError: a method that is not one of the four, a field that changes what is computed and is not supported,
            a value of the wrong type.
        UsageError: a value out of range, such as a rank below 1.
    """
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise LowrankError(
            f"adapter_config.json is of peft_type {shortened(repr(kind))}; this reads {', '.join(PEFT_TYPES)}"
        )
    for name in _COMPUTES_OTHERWISE:
        if fields.get(name):
            raise LowrankError(f"adapter_config.json sets {name}, which is not supported; merge the adapter with PEFT")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASES):
        raise LowrankError(
            f"the adapter starts from {shortened(init)}, which changes the base weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for name, wanted, fits in _TYPES:
        if fields.get(name) is not None and not fits(fields[name]):
            raise _wrong_type(name, fields[name], wanted)
    values: dict[str, Any] = {"target_modules": []}
    defaults = PEFT_TYPES[kind](target_modules=[])
    for theirs, ours in _FIELDS[kind].items():
        value = fields.get(theirs)
        if value is None:
            value = _NULLABLE.get(theirs)
        if value is not None:
            _check_type(theirs, value, getattr(defaults, ours))
            values[ours] = value
    if kind == "LORA":
        values["weight_decompose"] = "out" if fields.get("use_dora") else None
    started = fields.get("init_lora_weights" if "LORA" in kind else "init_weights", True)
    values["init_weights"] = "random" if started is False else "lycoris" if started == "lycoris" else "peft"
    if kind == "ADALORA":
        values |= _shares(fields)
    try:
        config = PEFT_TYPES[kind](**values)
        written = to_json(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise LowrankError(f"adapter_config.json has a value of the wrong type: {error}; correct it") from None
    others = {name: value for name, value in fields.items() if name not in written or written[name] != value}
    return PEFT_TYPES[kind](**values, other_fields=others)


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise a LowrankError where a field that is a number, a switch or a table of numbers holds something else."""
    if isinstance(default, bool):
        wanted, fits = "true or false", isinstance(value, bool)
    elif name in _WHOLE:
        wanted, fits = "a whole number", _is_number(value) and isinstance(value, int)
    elif isinstance(default, int | float):
        wanted, fits = "a number", _is_number(value)
    elif isinstance(default, Mapping):
        wanted = "names with numbers"
        fits = isinstance(value, Mapping) and all(map(_is_number, cast("Mapping[str, Any]", value).values()))
    else:
        return
    if not fits:
        raise _wrong_type(name, value, wanted)


def _wrong_type(name: str, value: Any, wanted: str) -> LowrankError:
    return LowrankError(
        f"adapter_config.json has a value of the wrong type: {name} is {shortened(repr(value))}, expected {wanted}; "
        "correct it"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in cast("list[Any]", value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) for one in cast("list[Any]", value))


_TYPES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    *(
        (name, "a name or a list of names", lambda value: isinstance(value, str) or _are_names(value))
        for name in ("target_modules", "exclude_modules", "layers_pattern")
    ),
    ("modules_to_save", "a list of names", _are_names),
    ("layers_to_transform", "a whole number or a list of them", lambda v: isinstance(v, int) or _are_numbers(v)),
    ("auto_mapping", "names with values", lambda value: isinstance(value, dict)),
)
"""What fields hold whose defaults do not show it; null is always good."""


def _shares(fields: Mapping[str, Any]) -> dict[str, Any]:
    """AdaLoRA's schedule, as shares of the run; PEFT's defaults (null steps) are no schedule at all."""
    shares: dict[str, Any] = {}
    for name in ("total_step", "tinit", "tfinal", "target_r", "init_r"):
        _check_type(name, 0 if fields.get(name) is None else fields[name], 0)
    if fields.get("total_step"):
        shares = {
            "warmup": (fields.get("tinit") or 0) / fields["total_step"],
            "settle": (fields.get("tfinal") or 0) / fields["total_step"],
        }
        if shares["warmup"] + shares["settle"] >= 1:
            shares = {}
    # PEFT lets the target be above the start, which then never happens.
    if fields.get("target_r") is not None and fields.get("init_r") is not None:
        shares["target_rank"] = max(1, min(fields["target_r"], fields["init_r"]))
    return shares


def to_json(config: AdapterConfig) -> dict[str, Any]:
    """The fields of adapter_config.json; what PEFT cannot express is refused.

    Raises:
        LowrankError: Tucker cores in a LoRA, or DoRA where PEFT has none.
    """
    kind = next(kind for kind, form in PEFT_TYPES.items() if isinstance(config, form))
    if isinstance(config, LoRA) and config.tucker:
        raise LowrankError("PEFT has no Tucker form of LoRA; write it as plain LoRA (format lora), which is exact")
    if config.weight_decompose and (kind != "LORA" or config.weight_decompose == "in"):
        axis = "" if kind != "LORA" else " along the inputs"
        equal = "write the equal LoRA with DoRA (--to lora), " if config.weight_decompose == "out" else ""
        # Of AdaLoRA kohya files have none either.
        kohya = "write a kohya file, " if kind != "ADALORA" else ""
        either = "or " if equal or kohya else ""
        raise LowrankError(f"PEFT has no DoRA{axis} for {config.method}; {equal}{kohya}{either}merge the adapter")
    fields: dict[str, Any] = {"peft_type": kind, "task_type": None, "inference_mode": True}
    fields |= {"base_model_name_or_path": None, "revision": None, "auto_mapping": None}
    for theirs, ours in _FIELDS[kind].items():
        value: Any = getattr(config, ours)
        if isinstance(value, list | tuple | set | frozenset):
            value = list(cast("Iterable[Any]", value)) or (None if theirs in _NULLABLE else [])
        fields[theirs] = dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
    if kind == "LORA":
        fields["use_dora"] = config.weight_decompose is not None
    init = {"peft": True, "random": False, "lycoris": "lycoris" if kind == "LOKR" else True}[config.init_weights]
    fields["init_lora_weights" if "LORA" in kind else "init_weights"] = init
    if isinstance(config, AdaLoRA):
        fields |= {
            "total_step": _PLAIN_STEPS,
            "tinit": round(config.warmup * _PLAIN_STEPS),
            "tfinal": round(config.settle * _PLAIN_STEPS),
            "r": config.rank,
        }
    return {**fields, **config.other_fields}


def carried_over(config: AdapterConfig) -> dict[str, Any]:
    """The other fields that say where an adapter comes from, and so still hold in another method's config."""
    kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
    return {name: config.other_fields[name] for name in kept if name in config.other_fields}
