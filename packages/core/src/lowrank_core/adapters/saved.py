"""Modules that are trained whole, beside the adapters (`modules_to_save`)."""

from typing import Any

from torch import nn

from lowrank_core.adapters.wrapper import Wrapper


class SavedModule(Wrapper):
    """A frozen module (`base`) and trained copies of it, one for each adapter that asks for one.

    Called, it is the copy of the active adapter, or the base where none is active or adapters are disabled. A copy
    shares no weight with anything: that of an output embedding is not tied to the input's. Weights of adapters
    (`set_scale`) do not apply to copies.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.copies = nn.ModuleDict().train(base.training)
        self.active: list[str] = []
        self.disabled = False

    @property
    def current(self) -> nn.Module:
        return self.copies[self.active[0]] if self.active and not self.disabled else self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)
