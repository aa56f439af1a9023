"""What the sections of a run's configuration are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NumberFromZero = Annotated[float, Field(ge=0)]
OnOrNumber = Annotated[bool | int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=16, multiple_of=8)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
