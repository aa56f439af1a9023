"""What geometry a file's factors are for: the model's own layer, or what the factors themselves say."""

import re
from collections.abc import Mapping

from torch import Tensor

from lowrank_core.adapters.config import AdapterConfig, LoKr
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Layers
from lowrank_core.files.check import some
from lowrank_core.files.kron import sides_of

_CONVOLUTIONS = re.compile(r"conv|downsampl|upsampl|patch_embed", re.IGNORECASE)


def geometry_of(config: AdapterConfig, name: str, factors: Mapping[str, Tensor], layers: Layers | None) -> Geometry:
    """The geometry of the layer that these factors are for.

    Raises:
        LowrankError: factors that do not fit the model's layer.
    """
    if layers is not None:
        geometry = layers[name]
        if geometry.kind == "linear" and ("lora_embedding_A" in factors or config.other_fields.get("fan_in_fan_out")):
            # A folder of weights does not say which of its matrices are stored the other way round.
            kind = "embedding" if "lora_embedding_A" in factors else "linear"
            if not geometry.transposed:
                geometry = Geometry(kind, geometry.in_features, geometry.out_features, transposed=True)
        outputs, inputs = matrix_shape(factors, geometry.kernel)
        if (outputs, inputs) != geometry.matrix_shape:
            raise LowrankError(
                f"{name} has factors for a weight of {outputs} x {inputs}, but the model's is "
                f"{' x '.join(map(str, geometry.weight_shape))}; give the model the adapter was trained on"
            )
        return geometry
    if "lora_embedding_A" in factors:
        outputs, inputs = matrix_shape(factors)
        return Geometry("embedding", outputs, inputs, transposed=True)
    kernel = _kernel(factors)
    outputs, inputs = matrix_shape(factors, kernel or ())
    if not kernel:
        return Geometry("linear", outputs, inputs)
    pixels = 1
    for length in kernel:
        pixels *= length
    return Geometry("conv", outputs, inputs // pixels, kernel)


def check_kernels_known(config: AdapterConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse flat convolutions, told by their names, where there is no model to ask for the kernel.

    Raises:
        LowrankError: there are some.
    """
    flat = [name for name, factors in modules.items() if _kernel(factors) is None and _CONVOLUTIONS.search(name)]
    if flat:
        raise LowrankError(
            f"the kernels of {some(flat)} are not in a {config.method} file; give the model they belong to "
            "(--base MODEL)"
        )


def _kernel(factors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The kernel that the factors show; None where they show none, as those of linear layers."""
    for name in ("lora_mid", "hada_t1", "lokr_t2", "lora_A", "lokr_w2"):
        if name in factors and factors[name].dim() > 2:
            kernel = tuple(factors[name].shape[2:])
            # PEFT writes a kernel of one dimension with a second of one; a kernel of two like that is rare.
            return kernel[:1] if name in ("hada_t1", "lokr_t2") and kernel[1:] == (1,) and kernel[0] > 1 else kernel
    return None


def matrix_shape(factors: Mapping[str, Tensor], kernel: tuple[int, ...] = ()) -> tuple[int, int]:
    """(out, in·K) of the weight that the factors compose to."""
    pixels = 1
    for length in kernel:
        pixels *= length
    if "lora_embedding_A" in factors:
        return factors["lora_embedding_B"].shape[0], factors["lora_embedding_A"].shape[1]
    if "lora_mid" in factors:
        return factors["lora_B"].shape[0], factors["lora_A"].shape[1] * pixels
    if "lora_A" in factors:
        return factors["lora_B"].shape[0], factors["lora_A"].flatten(1).shape[1]
    if "hada_t1" in factors:
        return factors["hada_w1_a"].shape[1], factors["hada_w1_b"].shape[1] * pixels
    if "hada_w1_a" in factors:
        return factors["hada_w1_a"].shape[0], factors["hada_w1_b"].shape[1]
    a, b, c, d = sides_of(factors)
    whole = "lokr_w2" in factors or "lokr_t2" in factors
    return a * b, c * d * (pixels if whole else 1)


def check_form(config: AdapterConfig, name: str, factors: Mapping[str, Tensor], geometry: Geometry, rank: int) -> None:
    """Refuse factors in shapes that the config does not give this layer; of a LoKr, any split of its sides is good.

    Raises:
        LowrankError: the names or shapes differ.
    """
    if isinstance(config, LoKr) and _splits(factors, geometry):
        return
    if (differing := _difference(config, factors, geometry, rank)) is not None:
        raise LowrankError(f"{name} has {differing} for this layer; give the model it was trained on")


def check_peft_split(file: AdapterFile, layers: Layers | None) -> None:
    """Refuse a LoKr whose sides are split as no PEFT config splits them, which would only fail when PEFT loads it.

    Raises:
        LowrankError: there is no `decompose_factor` for a layer.
    """
    for name, module in file.modules.items() if isinstance(file.config, LoKr) else ():
        if layers is None and _kernel(module.factors) is None and _CONVOLUTIONS.search(name):
            continue  # nobody knows its kernel
        geometry = geometry_of(file.config, name, module.factors, layers)
        if (differing := _difference(file.config, module.factors, geometry, module.rank)) is not None:
            raise LowrankError(
                f"{name} has {differing} in a PEFT folder, because no decompose_factor splits all layers so; "
                "write a kohya file, or the equal plain LoRA (format lora)"
            )


def _difference(config: AdapterConfig, factors: Mapping[str, Tensor], geometry: Geometry, rank: int) -> str | None:
    """The first factor that is not as the config gives it to the layer, in words."""
    wanted = config.form.shapes(geometry, factors["lora_E"].shape[0] if config.method == "adalora" else rank)
    found = {key: tuple(factor.shape) for key, factor in factors.items()}
    key = next((key for key in [*wanted, *found] if wanted.get(key) != found.get(key)), None)
    if key is None:
        return None
    return f"{key} of shape {found.get(key, 'none')}, expected {wanted.get(key, 'none')}"


def _splits(factors: Mapping[str, Tensor], geometry: Geometry) -> bool:
    """Whether the sides of a LoKr, split in whatever way, make the layer's weight."""
    a, b, c, _ = sides_of(factors)
    outputs, inputs, *kernel = geometry.weight_shape
    if "lokr_w2" in factors and list(factors["lokr_w2"].shape[2:]) != kernel:
        return False
    if "lokr_t2" in factors and list(factors["lokr_t2"].shape[2:]) not in (kernel, [*kernel, 1]):
        return False
    return a * b == outputs and not inputs % c and matrix_shape(factors, geometry.kernel) == geometry.matrix_shape
