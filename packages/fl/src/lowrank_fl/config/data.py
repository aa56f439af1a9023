"""Which examples, and who holds them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lowrank_fl.config.section import Section


class DataConfig(Section):
    """Which examples."""

    name: str = "digits"
    """`digits` (shipped with scikit-learn), `cifar10`, `cifar100`, `mnist`, `emnist` (torchvision
    downloads them), `cinic10`, `shakespeare`, or a name of your own beside `path`."""
    path: str | None = None
    """A local folder or a hub id of an image classification data set, or the JSON-lines file of roles."""
    image_key: str | None = None
    """The image column; found by its feature type when not given."""
    label_key: str | None = None
    """The label column; found by its feature type when not given."""
    text_key: str | None = None
    """The text column, of a data set of texts."""
    tokenizer: str | None = None
    """The folder with the tokenizer that makes them numbers; `model.name` if not given."""
    max_tokens: PositiveInt = 128
    """Texts are cut after so many tokens."""
    max_examples: PositiveInt | None = None
    """Train on the first so many examples after a seeded shuffle; everything when not given."""
    max_test_examples: PositiveInt | None = None
    """Test on so many examples, chosen like the others; everything when not given."""
    classes: Annotated[list[Annotated[int, Field(ge=0)] | str], Field(min_length=1)] | None = None
    """Keep the examples of these classes alone, by number from 0 or by name, for training and for testing; all of them
    when not given. Labels keep their numbers, so the last layer keeps its size, and pixels are normalised alike."""


class PartitionConfig(Section):
    """How the training examples are shared out among clients."""

    kind: Literal["iid", "dirichlet", "pathological", "natural"] = "iid"
    alpha: PositiveFloat = 0.5
    """Dirichlet concentration: the smaller, the fewer classes a client sees."""
    classes_per_client: PositiveInt = 2
    """Pathological: so many classes each client holds."""
    id_column: str | None = None
    """Natural: the column that names who made an example (writer, role)."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of its examples that each client keeps back to test the model on. Above 0 accuracy is the mean over
    clients of what they find; at 0 the server tests on the data set's own test examples."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each client trains on this share of its examples, after those it holds out (the paper's Figure 5b: 0.2)."""
