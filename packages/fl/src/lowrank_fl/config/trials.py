"""What a federation can be put through, as data: noise for its clients' privacy, clients that fail, poisoned ones."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from lowrank_fl.config.section import Fraction, NumberFromZero, Section


class PrivacyConfig(Section):
    """Differential privacy of clients: their changes are clipped, and the server adds noise to the mean."""

    noise_multiplier: NumberFromZero | None = None
    """The noise's standard deviation on the sum of the changes, in clipping norms; no privacy when not given. At 0
    changes are clipped alone, and there is no ε."""
    clipping_norm: PositiveFloat = 1.0
    """The longest a client's change may be, over all numbers together; under adaptive clipping in the first round."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` lets the norm follow a quantile of the changes' norms (Andrew et al., 2021)."""
    side: Literal["server", "client"] = "server"
    """Who clips."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """ε is reported at this δ."""
    quantile: Fraction = 0.5
    """adaptive: the share of the changes that should be no longer than the norm."""
    norm_lr: PositiveFloat = 0.2
    """adaptive: the rate at which the norm follows."""

    @property
    def on(self) -> bool:
        return self.noise_multiplier is not None


class FailuresConfig(Section):
    """Simulated clients that fail to train; nothing here depends on how long anything really takes."""

    dropout: Fraction = 0.0
    """With this probability a client that is asked to train does not answer."""
    stragglers: Fraction = 0.0
    """With this probability it is slow in this round."""
    slowdown: Annotated[float, Field(ge=1)] = 10.0
    """So many times as long a slow client takes."""
    deadline: PositiveFloat | None = None
    """Simulated seconds after which the server goes on with the replies it has; it waits for all when not given."""
    speed: PositiveFloat = 1000.0
    """Examples that a client which is not slow trains on in a simulated second."""

    @property
    def on(self) -> bool:
        return bool(self.dropout or self.stragglers or self.deadline)


class AttackConfig(Section):
    """Poisoned clients."""

    kind: Literal["none", "labels", "sign", "noise"] = "none"
    """What they do. `labels`: train on class c - 1 - y in place of y, of c classes. `sign`: send the opposite of their
    change, `scale` times as long. `noise`: send Gaussian noise, `scale` times as long as their change, in its place."""
    share: Fraction = 0.2
    """Of all clients."""
    scale: PositiveFloat = 1.0
