"""One door to every source of examples."""

from difflib import get_close_matches

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.examples import Examples

NAMES = ("digits", "cifar10", "cifar100", "mnist", "emnist", "cinic10", "shakespeare")


def load_examples(data: DataConfig, partition: PartitionConfig, seed: int) -> Examples:
    """The examples that `data` asks for, in memory.

    `data.path` names an image data set in Hugging Face's form, or, for `shakespeare`, the JSON
    lines of roles. Without it, `digits` comes with scikit-learn, and torchvision downloads the
    others into the cache folder.

    `seed` chooses the rows that `data.max_examples` keeps, and nothing else. `partition` is
    asked for one thing: the column of a natural partition, which becomes `Examples.groups`.

    Raises:
        UsageError: For an unknown name, a source that needs `data.path`, or a column that is not there.
        LowrankError: For a source that cannot be had or read: no such folder, an empty split, a broken picture, a
            failed download.
    """
    if data.name == "shakespeare":
        from lowrank_fl.data.shakespeare import load_shakespeare

        return load_shakespeare(data, partition, seed)
    if data.path is not None:
        from lowrank_fl.data.folder import load_folder

        return load_folder(data, partition, seed)

    _check_name(data)
    if partition.kind == "natural":
        raise UsageError(
            f"partition.kind=natural needs to know who made each example, and {data.name} does not say it; "
            "give a data set with such a column as data.path and the column's name as partition.id_column"
        )
    if data.name == "digits":
        from lowrank_fl.data.digits import load_digits

        return load_digits(data, seed)
    if data.name in ("cifar10", "cifar100"):
        from lowrank_fl.data.cifar import load_cifar

        return load_cifar(data, seed)
    from lowrank_fl.data.mnist import load_mnist

    return load_mnist(data, seed)


def _check_name(data: DataConfig) -> None:
    name = data.name
    if name == "cinic10":
        raise LowrankError(
            "cinic10 has no download here: fetch CINIC-10.tar.gz from Edinburgh DataShare "
            "(https://datashare.ed.ac.uk/handle/10283/3192; the authors' page is "
            "https://github.com/BayesWatch/cinic-10), unpack it, and set -o data.path=FOLDER to the folder "
            "that holds train, valid and test"
        )
    if name not in NAMES and (data.image_key is not None or data.label_key is not None):
        raise UsageError(
            f"data set {name!r} is one of your own, and nothing says where it lies; "
            "set -o data.path to its folder or hub id"
        )
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        nearest = f" (nearest: {close[0]})" if close else ""
        raise UsageError(
            f"unknown data set {name!r}{nearest}; data.name is one of {', '.join(NAMES)}, "
            "or a name of your own beside data.path"
        )
