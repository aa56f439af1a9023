"""Who trains in a round, what the server makes of it, and how it travels."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lowrank_fl.config.section import Fraction, NumberFromZero, Section

Precision = Literal["fp32", "bf16"]
Kind = Literal["none", "pfedpara", "fedper", "fedrep", "ditto", "local", "finetune"]


class FederationConfig(Section):
    """Who trains in a round, and how."""

    clients: PositiveInt = 20
    clients_per_round: PositiveInt = 20
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 0.1
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate is multiplied by this after every round."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NumberFromZero = 0.0
    precision: Precision = "fp32"
    """`bf16`: clients train and models are tested under torch.autocast, which multiplies in bfloat16; parameters, their
    updates and what travels are float32 under both."""
    tolerated_failures: Fraction = 0.0
    """The share of a round's clients that may fail; the round goes on without them."""

    def lr_in(self, round_number: int) -> float:
        """The learning rate of that round; the first is round 1."""
        return self.lr * self.lr_decay ** (round_number - 1)


class StrategyConfig(Section):
    """The server's rule, by Flower's name in small letters; the other keys belong to the rule that reads them."""

    name: Literal[
        "fedavg",
        "fedavgm",
        "fedprox",
        "fedadam",
        "fedyogi",
        "fedadagrad",
        "scaffold",
        "feddyn",
        "fedmedian",
        "fedtrimmedavg",
        "krum",
    ] = "fedavg"
    mu: NumberFromZero = 0.1
    """FedProx: weight of the proximal term."""
    server_lr: PositiveFloat | None = None
    """The server's learning rate; 0.01 for FedAdam, FedYogi and FedAdagrad, 1 for FedAvgM and SCAFFOLD if not given."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """FedAvgM."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: PositiveFloat = 1e-3
    """FedAdam, FedYogi, FedAdagrad: degree of adaptivity."""
    alpha: PositiveFloat = 0.1
    """FedDyn: strength of the dynamic regularisation."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """FedTrimmedAvg: the share of clients cut off at either end, number by number."""
    malicious: Annotated[int, Field(ge=0)] = 0
    """Krum: how many clients may send anything."""


class PersonalizationConfig(Section):
    """What of the model is each client's own, and how it trains it."""

    kind: Kind | None = None
    """`pfedpara`: the factors of W2 stay with the client. `fedper`, `fedrep`: the last layer does. `ditto`: a whole
    model of its own beside the shared one. `local`: nothing is shared. `finetune`: the shared model, trained further
    by each client before it is tested. If not given, `pfedpara` for that method and `none` for the others."""
    epochs: PositiveInt | None = None
    """Of a client's own part under fedrep, ditto and finetune; `federation.epochs` if not given."""
    test_epochs: Annotated[int, Field(ge=0)] | None = None
    """For so many epochs each client trains its whole model further before every test of it, and drops the result.
    `epochs` under finetune and 0 under the others if not given."""
    mu: NumberFromZero = 0.1
    """Ditto: how strongly a client's model is drawn to the shared one."""


class AggregationConfig(Section):
    """What the server does about factors, whose mean does not compose to the mean of the weights."""

    kind: Literal["factors", "one-factor", "refit"] = "factors"
    """`factors`: their mean. `one-factor`: clients train one factor of each weight a round, in turn, so that the mean
    is exact. `refit`: the server refits the mean factors to the mean of the composed weights."""
    sweeps: PositiveInt = 2
    """Of refit's alternating least squares, over all factors of a weight."""
    gap: bool = False
    """Measure the aggregation gap of every round; `refit` does so anyway. It composes every client's weights."""


class CodecConfig(Section):
    """How numbers are written for the way."""

    up: Literal["none", "fp16", "int8", "topk"] = "none"
    """What clients do to the change they send: half precision, eight bits by stochastic rounding, or its largest
    entries alone, the rest being kept for the next time."""
    down: Literal["none", "fp16", "int8", "topk"] = "none"
    """What the server does to what it sends."""
    top_k: Annotated[float, Field(gt=0, le=1)] = 0.05
    """The share of entries that `topk` sends."""
