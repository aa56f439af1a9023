"""Networks of torchvision and transformers that others have trained, as the base of a federated run."""

from collections.abc import Generator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core.errors import LowrankError, UsageError

TORCHVISION = "torchvision:"
# Of the pictures that nearly all of torchvision's weights were trained on, per channel from 0 to 1.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Pretrained(nn.Module):
    """Such a network behind the interface of ours: pictures `(n, channels, height, width)` or token numbers
    `(n, tokens)` in, logits `(n, classes)` out.

    Grey pictures become the three channels that the network reads, pictures of another size than `pixels` are scaled
    to it, and tokens that are `padding` are not attended to.
    """

    def __init__(self, network: nn.Module, *, pixels: int | None = None, padding: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.pixels, self.padding = pixels, padding

    @property
    def head(self) -> str:
        """The name of the last layer."""
        return f"network.{last_layer(self.network)}"

    def forward(self, input: Tensor) -> Tensor:
        if self.padding is not None:
            return self.network(input_ids=input, attention_mask=(input != self.padding).long()).logits
        if input.shape[1] == 1:
            input = input.expand(-1, 3, -1, -1)
        if self.pixels is not None and input.shape[-1] != self.pixels:
            size = (self.pixels, self.pixels)
            input = F.interpolate(input, size, mode="bilinear", align_corners=False, antialias=False)
        answer = self.network(input)
        return answer if isinstance(answer, Tensor) else answer.logits


def build_pretrained(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, pretrained: bool, pixels: int | None
) -> Pretrained:
    """The network that `model.name` means, its last layer drawn anew where it is of other classes.

    name: `torchvision:` and the name of a builder, or a folder as transformers saves a classifier of pictures or texts.
    pretrained: take its weights; torchvision downloads its own once to torch's cache. Otherwise they are drawn.

    Raises:
        UsageError: torchvision has no such model.
        LowrankError: the folder holds no such model, or one that reads something else; no weights, or no network
            connection to fetch them over; a model that has no Linear as its last layer.
    """
    if name.startswith(TORCHVISION):
        return _of_torchvision(name.removeprefix(TORCHVISION), num_classes, pretrained, pixels)
    return _of_transformers(Path(name), len(input_shape) == 1, num_classes, pretrained, pixels)


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that the network was trained on, per channel, from 0 to 1.

    Raises:
        LowrankError: the folder's preprocessor_config.json cannot be read.
    """
    if name.startswith(TORCHVISION) or not (Path(name) / "preprocessor_config.json").is_file():
        return _IMAGENET
    import transformers

    with _of_folder(Path(name)):
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=True)
        return tuple(processor.image_mean), tuple(processor.image_std)


def tokenize(texts: list[str], folder: Path, max_tokens: int) -> Tensor:
    """Texts as the numbers of their tokens, int32 `(n, tokens)`, padded to the longest, cut after `max_tokens`.

    Raises:
        LowrankError: the folder has no tokenizer, or one without a padding token.
    """
    import transformers

    with _of_folder(folder):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        read = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return read["input_ids"].int()


def builder_of(name: str) -> Any:
    """The builder of that name in torchvision; raises UsageError with the nearest names where there is none."""
    from torchvision.models import get_model_builder, list_models

    names = list_models()
    if name not in names:
        nearest = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        raise UsageError(f"torchvision has no model {name!r}; the nearest names are {', '.join(nearest)}")
    return get_model_builder(name)


def _of_torchvision(name: str, num_classes: int, pretrained: bool, pixels: int | None) -> Pretrained:
    builder = builder_of(name)
    if not pretrained:
        return Pretrained(builder(weights=None, num_classes=num_classes), pixels=pixels)
    try:
        network: nn.Module = builder(weights="DEFAULT", progress=False)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LowrankError(
            f"torchvision's weights of {name} cannot be had ({reason}); fetch them where there is a network, or draw "
            "them with -o model.pretrained=false"
        ) from None
    path = last_layer(network)
    last = network.get_submodule(path)
    assert isinstance(last, nn.Linear)
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Linear(last.in_features, num_classes, bias=last.bias is not None))
    return Pretrained(network, pixels=pixels)


def _of_transformers(folder: Path, is_text: bool, num_classes: int, pretrained: bool, pixels: int | None) -> Pretrained:
    if not (folder / "config.json").is_file():
        raise LowrankError(
            f"model.name is {folder}, and there is no config.json in it; give a folder as save_pretrained of "
            "transformers leaves it, torchvision:NAME, or a network of lowrank's"
        )
    import transformers

    kind: Any = (
        transformers.AutoModelForSequenceClassification if is_text else transformers.AutoModelForImageClassification
    )
    with _of_folder(folder):
        config: Any = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, num_labels=num_classes
        )
        if pretrained:
            network: nn.Module = kind.from_pretrained(
                str(folder),
                config=config,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        else:
            network = kind.from_config(config, dtype=torch.float32)
    if is_text:
        return Pretrained(network, padding=config.pad_token_id or 0)
    return Pretrained(network, pixels=pixels or getattr(config, "image_size", None))


@contextmanager
def _of_folder(folder: Path) -> Generator[None]:
    """Tells a user's mistake from ours, and keeps transformers from telling about new last layers and progress."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    # Of many kinds, of transformers, tokenizers and safetensors, and all are about the files in the folder.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LowrankError(
            f"{folder} cannot be used as model.name ({reason}); give a folder as save_pretrained of transformers "
            "leaves it, with its processor or tokenizer"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def last_layer(network: nn.Module) -> str:
    """The last of the Linear layers, which in these libraries' classifiers gives the logits."""
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise LowrankError(
            f"{type(network).__name__} has no Linear as its last layer, so it cannot be given other classes; take "
            "another model"
        )
    # Under an adapter the layer is the base of another of its name.
    return found[-1].removesuffix(".base")
