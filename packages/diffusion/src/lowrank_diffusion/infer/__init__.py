"""Pictures from adapters of any form on any SDXL base."""
