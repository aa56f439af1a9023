"""Prior preservation (DreamBooth, Ruiz et al., 2022): pictures of the subject's class, as the base draws them.

A few pictures of one dog make a model forget other dogs. So each step trains on as many pictures of "a dog" besides,
which the base itself has drawn, and counts their loss `prior.weight` times.
"""

from pathlib import Path
from typing import Any

from lowrank_core.errors import UsageError
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.data.folder import PICTURE_ENDINGS, files_below
from lowrank_diffusion.infer.drawing import Shot, draw
from lowrank_diffusion.material import Material, find_material
from lowrank_diffusion.results import Observer
from lowrank_diffusion.samples import png
from lowrank_diffusion.seeds import derive_seed

_OWN = "class-"


def prior_run(
    config: DiffusionConfig, pipeline: Any, accelerator: Any, global_batch: int, observer: Observer
) -> tuple[DiffusionConfig, Material]:
    """The run on class pictures that goes beside `config`'s, after the base has drawn those that are missing.

    Raises:
        LowrankError: what drawing and `find_material` raise.
        UsageError: `prior.path` is a file.
    """
    if missing_pictures(config):
        pipeline.to(accelerator.device)
        _draw(config, pipeline, observer, accelerator.process_index, accelerator.num_processes)
        pipeline.to("cpu")
    accelerator.wait_for_everyone()
    beside = prior_config(config)
    return beside, find_material(beside, global_batch, observer.note)


def prior_config(config: DiffusionConfig) -> DiffusionConfig:
    """`config` on class pictures, with draws of its own."""
    prior = config.prior
    data = {"path": prior.path, "caption": prior.caption, "held_out": 0.0, "repeats": 1}
    unchanged = ("resolution", "buckets", "bucket_step", "max_aspect", "crop", "flip", "background")
    data |= {name: getattr(config.data, name) for name in unchanged}
    data |= {"caption_dropout": config.data.caption_dropout, "dropped_caption": config.data.dropped_caption}
    seed = derive_seed(config.seed, "prior") % 2**32
    return config.model_copy(update={"data": type(config.data).model_validate(data), "seed": seed})


def missing_pictures(config: DiffusionConfig) -> list[int]:
    """The numbers of the class pictures that are still to be drawn, from 1.

    Pictures in the folder that were not drawn here count too, so that only what they lack is drawn.

    Raises:
        UsageError: `prior.path` is a file.
    """
    folder = Path(str(config.prior.path)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"prior.path is {config.prior.path}, a file; it takes a folder for pictures of the class")
    files = files_below(folder) if folder.is_dir() else []
    others = [file for file in files if file.suffix.lower() in PICTURE_ENDINGS and not file.name.startswith(_OWN)]
    wanted = range(1, config.prior.images - len(others) + 1)
    return [number for number in wanted if Path(_name(number)) not in files]


def _draw(config: DiffusionConfig, pipeline: Any, observer: Observer, process: int, processes: int) -> None:
    """Draw what is missing in `prior.path`, with a base that has no adapter yet and lies on its device.

    Each picture's noise follows from the run's seed and its number. Each of several processes draws the numbers that
    are its own.
    """
    prior, data = config.prior, config.data
    mine = [number for number in missing_pictures(config) if number % processes == process]
    folder = Path(str(prior.path)).expanduser()
    side = data.resolution // data.bucket_step * data.bucket_step
    pipeline.set_progress_bar_config(disable=True)
    drawn = draw(
        pipeline,
        [Shot(str(prior.caption), 1, number) for number in mine],
        seed=derive_seed(config.seed, "prior"),
        negative=None,
        size=(side, side),
        steps=prior.steps,
        guidance=prior.guidance,
        batch=config.train.batch_size,
    )
    for done, (shot, picture) in enumerate(drawn, 1):
        png(picture, folder / _name(shot.image_number))
        observer.stage("drawing class pictures", done, len(mine))


def _name(number: int) -> str:
    return f"{_OWN}{number:05}.png"
