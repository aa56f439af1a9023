"""Adapters: frozen layers plus scale x composition. LoRA, LoHa, LoKr and AdaLoRA."""
