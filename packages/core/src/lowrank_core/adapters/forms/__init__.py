"""The adapters' algorithms: how ΔW is written as factors."""

from lowrank_core.adapters.forms.adalora import AdaLoRAForm
from lowrank_core.adapters.forms.form import Factors, Form, Init
from lowrank_core.adapters.forms.loha import LoHaForm
from lowrank_core.adapters.forms.lokr import LoKrForm
from lowrank_core.adapters.forms.lora import LoRAForm

__all__ = ["AdaLoRAForm", "Factors", "Form", "Init", "LoHaForm", "LoKrForm", "LoRAForm"]
