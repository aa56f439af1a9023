"""The ClientApp of a SuperNode."""

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message

from lowrank_fl.flower.remote import make_remote_app, resident_of

if TYPE_CHECKING:
    from lowrank_fl.flower.resident import Resident


def _find(message: Message, context: Context) -> "Resident":
    """The model of the run that the message belongs to, over this node's data.

    The node's configuration may say where the data lie (`data-path`) and the run to start from (`model-start`), what
    to train on (`device`) and where clients keep what they know (`state-folder`).
    """
    from lowrank_fl.data.cache import cache_folder
    from lowrank_fl.flower.app.settings import read_settings
    from lowrank_fl.folder import run_name
    from lowrank_fl.load import expand

    settings, node = read_settings(context.run_config), context.node_config
    number = message.content.config_records["config"].get("run", 0)
    assert isinstance(number, int)
    config, swept = expand(settings.config)[number]
    if "data-path" in node:
        data = config.data.model_copy(update={"path": str(node["data-path"])})
        config = config.model_copy(update={"data": data})
    if "model-start" in node and config.model.start is not None:
        model = config.model.model_copy(update={"start": str(node["model-start"])})
        config = config.model_copy(update={"model": model})
    if "device" in node:
        config = config.model_copy(update={"device": str(node["device"])})
    if settings.states and "state-folder" not in node:
        states = Path(settings.states)
    else:
        states = Path(str(node.get("state-folder", cache_folder() / "clients"))) / settings.run
    return resident_of(config.model_dump_json(), states / run_name(swept) / "clients")


app = make_remote_app(_find)
