"""Every form that an adapter's factors take."""

from lowrank_core.adapters.forms import AdaLoRAForm, Form, LoHaForm, LoKrForm, LoRAForm

FORMS: dict[str, Form] = {
    "lora": LoRAForm(),
    "lora tucker": LoRAForm(tucker=True),
    "loha": LoHaForm(),
    "loha tucker": LoHaForm(tucker=True),
    "lokr": LoKrForm(),
    "lokr both sides": LoKrForm(factor=2, decompose_both=True),
    "lokr tucker": LoKrForm(tucker=True),
    "adalora": AdaLoRAForm(),
}
