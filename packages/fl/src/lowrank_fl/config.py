"""A federated run as data: every key of a run's YAML file, its type, its bounds and its default."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowrank_fl.section import Fraction, NumberFromZero, Section
from lowrank_fl.trials import AttackConfig, FailuresConfig, PrivacyConfig, check_privacy

Method = Literal["original", "lowrank", "fedpara", "pfedpara", "svd", "kronecker"]
Execution = Literal["sequential", "batched", "graphs"]
Kind = Literal["none", "pfedpara", "fedper", "fedrep", "ditto", "local", "finetune"]


NETWORKS = ("cnn", "mlp", "vgg16", "resnet18", "lstm")
"""Our own; other networks come from torchvision or from a folder of transformers."""


def check_path_name(name: str) -> str:
    """The name, which is to be a folder's on this machine and others; raises ValueError where it is not fit for it."""
    if not re.fullmatch(r"(?!\.+$)[A-Za-z0-9._-]+", name):
        raise ValueError(f"becomes a folder's name and takes letters, digits, '.', '_' and '-' alone, got {name!r}")
    return name


def check_network(name: str) -> str:
    """The name, which is to be that of a network; raises ValueError where it cannot be."""
    if name in NETWORKS or name.startswith("torchvision:") or "/" in name or Path(name).is_dir():
        return name
    nearest = get_close_matches(name, NETWORKS, n=1)
    raise ValueError(
        f"is {', '.join(NETWORKS)}, torchvision:NAME, or a folder that transformers has saved, got {name!r}"
        + (f"; nearest: {nearest[0]}" if nearest else "")
    )


class DataConfig(Section):
    """Which examples."""

    name: str = "digits"
    """`digits` (shipped with scikit-learn), `cifar10`, `cifar100`, `mnist`, `emnist` (torchvision
    downloads them), `cinic10`, `shakespeare`, or a name of your own beside `path`."""
    path: str | None = None
    """A local folder or a hub id of an image classification data set, or the JSON-lines file of roles."""
    image_key: str | None = None
    """The image column; found by its feature type when not given."""
    label_key: str | None = None
    """The label column; found by its feature type when not given."""
    text_key: str | None = None
    """The text column, of a data set of texts."""
    tokenizer: str | None = None
    """The folder with the tokenizer that makes them numbers; `model.name` if not given."""
    max_tokens: PositiveInt = 128
    """Texts are cut after so many tokens."""
    max_examples: PositiveInt | None = None
    """Train on the first so many examples after a seeded shuffle; everything when not given."""
    max_test_examples: PositiveInt | None = None
    """Test on so many examples, chosen like the others; everything when not given."""
    classes: Annotated[list[Annotated[int, Field(ge=0)] | str], Field(min_length=1)] | None = None
    """Keep the examples of these classes alone, by number from 0 or by name, for training and for testing; all of them
    when not given. Labels keep their numbers, so the last layer keeps its size, and pixels are normalised alike."""


class PartitionConfig(Section):
    """How the training examples are shared out among clients."""

    kind: Literal["iid", "dirichlet", "pathological", "natural"] = "iid"
    alpha: PositiveFloat = 0.5
    """Dirichlet concentration: the smaller, the fewer classes a client sees."""
    classes_per_client: PositiveInt = 2
    """Pathological: so many classes each client holds."""
    id_column: str | None = None
    """Natural: the column that names who made an example (writer, role)."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of its examples that each client keeps back to test the model on. Above 0 accuracy is the mean over
    clients of what they find; at 0 the server tests on the data set's own test examples."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each client trains on this share of its examples, after those it holds out (the paper's Figure 5b: 0.2)."""


class ModelConfig(Section):
    """Which network, and how its weights are written as factors."""

    name: Annotated[str, AfterValidator(check_network)] = "cnn"
    """One of `NETWORKS`, `torchvision:NAME`, or a folder with a classifier of pictures or texts as transformers saves
    it; these two bring weights of their own, and their last layer is drawn anew where it is of other classes."""
    pretrained: bool = True
    """Of the two: take their weights; drawn from the seed otherwise."""
    pixels: PositiveInt | None = None
    """Of the two: scale pictures to so many pixels a side, inside the network; to what a folder's config.json says, or
    not at all, if not given."""
    method: Method = "fedpara"
    gamma: Fraction | None = None
    """The paper's rank rule: 0 is the smallest rank without a rank limit, 1 the original's size."""
    ratio: Fraction | None = None
    """The authors' notebook's rank rule: factor parameters as a fraction of the layer's."""
    rank: PositiveInt | None = None
    """One rank for every layer."""
    budget: PositiveInt | str | None = None
    """The whole model's size: a number of parameters, or text such as `1.5M` or `6MB`."""
    init: Literal["calibrated", "paper", "flower"] = "calibrated"
    tanh: bool = False
    """W = tanh(W1) * tanh(W2) (FedPara, appendix B)."""
    jacobian_lambda: NumberFromZero = 0.0
    """Weight of the Jacobian correction, Eq. 9 (0: none)."""
    hybrid: Annotated[int, Field(ge=0)] = 0
    """So many of the layers that would become factors, the first ones, stay as they are: the hybrid network of
    Pufferfish (Wang et al., 2021, https://arxiv.org/abs/2103.03936)."""
    width: PositiveInt = 32
    """Channels of the small CNN's first convolution, or the hidden units of the MLP."""
    start: str | None = None
    """The folder of a finished run, whose weights every client starts from. An adapter in that run is merged into its
    layers; weights that are factors here and were not there are cut off their SVD, under `svd` alone; the last layer is
    drawn anew where its shape differs. Everything is drawn from the seed when not given."""

    @model_validator(mode="after")
    def _one_rank_rule(self) -> "ModelConfig":
        given = [key for key in ("gamma", "ratio", "rank", "budget") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"takes one rank rule, got {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _weights_are_kept(self) -> "ModelConfig":
        if self.name not in NETWORKS and self.pretrained and self.method != "original":
            raise ValueError(
                f"method {self.method} draws factors in place of the weights that {self.name} brings; set "
                "model.method=original, which an adapter needs too, or model.pretrained=false"
            )
        return self


class AdapterConfig(Section):
    """The adapter that is trained in place of the network, whose weights are then frozen and never travel.

    Norms are trained whole beside it."""

    method: Literal["lora", "loha", "lokr", "adalora"] | None = None
    """None when not given: the whole network is trained, and no other key here is read."""
    rank: PositiveInt = 8
    alpha: PositiveFloat = 8
    """What the adapter adds is multiplied by alpha / rank."""
    target: str | list[str] | None = None
    """The layers it goes to: names or their endings, one regular expression for whole names, or `all-linear`. Every
    Linear and Conv2d if not given."""
    head: bool = True
    """The last layer is trained whole and has no adapter; otherwise it is a layer as any other."""
    target_rank: PositiveInt | None = None
    """AdaLoRA: the mean rank of a layer at the end; half of `rank`, where it starts, rounded up, if not given."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """AdaLoRA: the share of the rounds before ranks begin to fall."""
    settle: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """AdaLoRA: the share of the rounds after they have fallen."""
    orthogonality: NumberFromZero = 0.5
    """AdaLoRA: the weight of the penalty that keeps a layer's directions apart."""

    @property
    def last_rank(self) -> int:
        """`target_rank` under AdaLoRA, or what it means where it is not given; the others' `rank`."""
        return (self.target_rank or (self.rank + 1) // 2) if self.method == "adalora" else self.rank

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdapterConfig":
        if self.method != "adalora":
            return self
        if self.target_rank is not None and self.target_rank > self.rank:
            raise ValueError(
                f"target_rank is {self.target_rank}, above the rank of {self.rank} that layers start with; lower "
                "target_rank or raise rank"
            )
        if self.warmup + self.settle >= 1:
            raise ValueError(
                f"warmup and settle are shares of the rounds that leave some of them, got {self.warmup:g} and "
                f"{self.settle:g}; lower one of them"
            )
        return self


class UpdateConfig(Section):
    """FedMUD: clients train, and send, a few factors of each layer's change in place of the layer.

    Norms and biases are trained whole beside them (Li et al., 2025, https://arxiv.org/abs/2505.23176)."""

    kind: Literal["none", "low-rank", "kronecker"] = "none"
    """How a layer's change is written: `u vᵀ`, or blocks `u ⊗ v` one after the other. `none` trains the layers
    themselves, and no other key here is read."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 1 / 32
    """Numbers in the factors, as a share of the layer's."""
    aware: bool = True
    """u v'ᵀ + u' vᵀ with random u' and v' that everybody draws from the seed, so that the server's mean is exact;
    otherwise u vᵀ, u and v being trained together."""
    interval: PositiveInt = 1
    """After so many rounds the change is merged into the layer, and the factors begin anew."""
    scale: PositiveFloat = 1.0
    """What is random in the factors is uniform between -scale and scale; a step grows with its square."""
    whole_ends: bool = True
    """The first and the last layer are trained whole."""


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


class EngineConfig(Section):
    """What runs the clients. No key here changes a result on the CPU but `threads` and, in the last digits, `execution`
    batched."""

    kind: Literal["local", "ray", "superlink"] = "local"
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes that train clients side by side; `auto` takes one for each core."""
    threads: PositiveInt = 1
    """Threads a client trains with."""
    execution: Execution | Literal["auto"] = "sequential"
    """How a process of the local engine trains its clients. `sequential`: one after the other. `batched`: several at
    once, their parameters stacked; of the models for the MLP. `graphs`: one after the other, each step a CUDA graph.
    `auto`: on a GPU the fastest of these, timed before the first round; on a CPU `sequential`, so that no bit depends
    on a clock."""
    timeout: PositiveFloat | None = None
    """Seconds the server waits for a round's replies under ray and superlink; for ever if not given."""
    local_nodes: PositiveInt | None = None
    """superlink: start a SuperLink and so many SuperNodes on this machine for the run, and stop them after it."""
    address: str | None = None
    """superlink: HOST:PORT of a SuperLink that runs already."""
    root_certificates: str | None = None
    """superlink: the PEM file that certifies it; the system's own if not given."""
    insecure: bool = False
    """superlink: no TLS. On this machine there is none without `root_certificates` anyway."""
    certificate: str | None = None
    """superlink with `local_nodes`: the PEM file that the SuperLink shows; `root_certificates` must certify it."""
    private_key: str | None = None
    """superlink with `local_nodes`: the certificate's key, a PEM file."""
    node_keys: list[str] = Field(default=[])
    """superlink with `local_nodes`: each SuperNode's private key, an EC key as OpenSSH writes it, with the public one
    beside it as FILE.pub; no other node is let in."""
    server_folder: str | None = None
    """superlink: the folder on the SuperLink's machine to write the run to; one below its user's cache if not given."""
    wait_for_nodes: PositiveFloat = 120.0
    """superlink: seconds the server waits for SuperNodes that are not there."""

    @model_validator(mode="after")
    def _reachable(self) -> "EngineConfig":
        if self.kind != "local" and self.execution not in ("auto", "sequential"):
            raise ValueError(
                f"execution {self.execution} belongs to engine.kind local, not {self.kind}; set engine.kind=local, or "
                "engine.execution=sequential"
            )
        if self.kind != "superlink":
            for key in _SUPERLINK_KEYS:
                if getattr(self, key) != EngineConfig.model_fields[key].default:
                    raise ValueError(f"{key} belongs to engine.kind superlink, not {self.kind}; add --engine superlink")
            if self.kind == "local" and self.timeout is not None:
                raise ValueError("timeout belongs to engine.kind ray and superlink, not local, which loses no reply")
            return self
        if (self.local_nodes is None) == (self.address is None):
            raise ValueError(
                "superlink takes either address (HOST:PORT of a SuperLink that runs) or local_nodes "
                f"(SuperNodes to start here), got {'none' if self.address is None else 'both'}"
            )
        if self.address is not None and not self.address.rpartition(":")[2].isdigit():
            raise ValueError(f"address is HOST:PORT, got {self.address!r}")
        pair = (self.certificate, self.private_key)
        if any(pair) and (self.local_nodes is None or self.root_certificates is None or not all(pair)):
            raise ValueError("certificate and private_key go together, with root_certificates and local_nodes")
        if self.node_keys and (not self.certificate or len(self.node_keys) != self.local_nodes):
            raise ValueError(
                "node_keys takes one key for each of local_nodes, and a certificate: Flower wants TLS for it"
            )
        if self.insecure and self.root_certificates is not None:
            raise ValueError("insecure means no TLS, so root_certificates has no use; leave one of them out")
        return self


_SUPERLINK_KEYS = (
    "local_nodes",
    "address",
    "root_certificates",
    "insecure",
    "certificate",
    "private_key",
    "node_keys",
    "server_folder",
    "wait_for_nodes",
)


_MEANS_BY_EXAMPLES = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "scaffold")


class RunConfig(Section):
    """One federated run, or a sweep of runs."""

    name: Annotated[str, AfterValidator(check_path_name)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    rounds: PositiveInt = 16
    device: str = "cpu"
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    update: UpdateConfig = UpdateConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = StrategyConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    codec: CodecConfig = CodecConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    failures: FailuresConfig = FailuresConfig()
    attack: AttackConfig = AttackConfig()
    engine: EngineConfig = EngineConfig()
    sweep: dict[str, list[Any]] = Field(default={})
    """Dotted keys and the values each takes; the runs are every combination."""

    @property
    def method(self) -> str:
        """What is trained, in one word: the adapter's method, `KIND-update`, else the network's."""
        if self.update.kind != "none":
            return f"{self.update.kind}-update"
        return self.adapter.method or self.model.method

    @property
    def personalized(self) -> Kind:
        """`personalization.kind`, or what it means where it is not given."""
        if self.personalization.kind is not None:
            return self.personalization.kind
        return "pfedpara" if self.model.method == "pfedpara" and self.partition.held_out else "none"

    @property
    def test_epochs(self) -> int:
        """`personalization.test_epochs`, or what it means where it is not given."""
        own = self.personalization
        if own.test_epochs is not None:
            return own.test_epochs
        return (own.epochs or self.federation.epochs) if own.kind == "finetune" else 0

    @model_validator(mode="after")
    def _personalization_fits(self) -> "RunConfig":
        kind = self.personalization.kind
        if kind == "pfedpara" and self.model.method != "pfedpara":
            raise ValueError(
                "personalization.kind pfedpara keeps the factors of W2 with each client, and model.method "
                f"{self.model.method} has none; set model.method=pfedpara"
            )
        if kind not in (None, "none") and not self.partition.held_out:
            raise ValueError(
                f"personalization.kind {kind} gives each client a model of its own, which only its own examples can "
                "test; set partition.held_out above 0"
            )
        if self.test_epochs and not self.partition.held_out:
            raise ValueError(
                f"personalization.test_epochs is {self.test_epochs}, and the server, which tests here, does not train; "
                "set partition.held_out above 0, or personalization.test_epochs=0"
            )
        if kind == "local" and self.strategy.name == "krum":
            raise ValueError(
                "strategy.name krum chooses among the models that clients send, and under personalization.kind local "
                "they send none; use strategy.name=fedavg"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> "RunConfig":
        adapter, kind = self.adapter.method, self.personalized
        if adapter is None:
            return self
        if self.model.method != "original":
            raise ValueError(
                f"adapter.method {adapter} goes onto the layers of the original network, and model.method "
                f"{self.model.method} writes them as factors; set model.method=original, and sweep over no other"
            )
        if kind in ("fedper", "fedrep") and not self.adapter.head:
            raise ValueError(
                f"personalization.kind {kind} keeps the last layer with each client, and with adapter.head false it is "
                "frozen but for an adapter; set adapter.head=true"
            )
        return self

    @model_validator(mode="after")
    def _update_fits(self) -> "RunConfig":
        kind, aggregation = self.update.kind, self.aggregation
        if kind == "none":
            return self
        if self.model.method != "original":
            raise ValueError(
                f"update.kind {kind} is of the original network's layers, and model.method {self.model.method} writes "
                "them as factors; set model.method=original, and sweep over no other"
            )
        if self.adapter.method is not None:
            raise ValueError(
                f"update.kind {kind} changes the layers that adapter.method {self.adapter.method} freezes; set "
                "adapter.method=null or update.kind=none"
            )
        if self.strategy.name not in ("fedavg", "fedprox"):
            raise ValueError(
                f"update.kind {kind} begins its factors anew, and strategy.name {self.strategy.name} does more with "
                "them than a mean; use fedavg or fedprox"
            )
        if self.personalized not in ("none", "finetune"):
            raise ValueError(
                f"update.kind {kind} is of layers that all clients share, and under personalization.kind "
                f"{self.personalized} they do not; set personalization.kind to none or finetune"
            )
        if aggregation.kind != "factors" or aggregation.gap:
            asked = "aggregation.gap" if aggregation.kind == "factors" else f"aggregation.kind {aggregation.kind}"
            raise ValueError(
                f"{asked} is about weights that are factors, and under update.kind {kind} their changes are; set "
                "aggregation.kind=factors and aggregation.gap=false"
            )
        if (self.codec.up, self.codec.down) != ("none", "none"):
            raise ValueError(
                f"codec.up {self.codec.up} and codec.down {self.codec.down} write changes of what was sent, and under "
                f"update.kind {kind} factors begin anew instead; set both to none"
            )
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> "RunConfig":
        if self.adapter.method != "adalora":
            return self
        if self.strategy.name not in ("fedavg", "fedprox"):
            raise ValueError(
                f"strategy.name {self.strategy.name} does not go with adapter.method adalora, under which arrays "
                "shrink from round to round and clients' importances are averaged by examples; use fedavg or fedprox"
            )
        for way in ("up", "down"):
            if getattr(self.codec, way) == "topk":
                raise ValueError(
                    f"codec.{way} topk remembers numbers by their places in the model, and under adapter.method "
                    "adalora these change as ranks fall; use none, fp16 or int8"
                )
        if self.personalized in ("ditto", "local"):
            raise ValueError(
                f"personalization.kind {self.personalized} gives each client an adapter of its own, whose ranks the "
                "server cannot allocate; use another kind, or an adapter.method other than adalora"
            )
        return self

    @model_validator(mode="after")
    def _aggregation_fits(self) -> "RunConfig":
        aggregation, model, strategy = self.aggregation, self.model, self.strategy.name
        kind = aggregation.kind
        if kind == "factors" and not aggregation.gap:
            return self
        asked = "aggregation.gap" if kind == "factors" else f"aggregation.kind {kind}"
        if self.adapter.method is not None:
            raise ValueError(
                f"{asked} is about weights that are factors alone, and adapter.method {self.adapter.method} adds its "
                "factors to frozen weights; set aggregation.kind=factors and aggregation.gap=false"
            )
        if self.personalized not in ("none", "finetune"):
            raise ValueError(
                f"{asked} is about weights that all clients share whole, and under personalization.kind "
                f"{self.personalized} a part of them is each client's own; set personalization.kind to none or finetune"
            )
        if kind == "factors":
            if strategy not in _MEANS_BY_EXAMPLES:
                raise ValueError(
                    f"aggregation.gap is that of a mean by examples, and strategy.name {strategy} takes none; use one "
                    f"of {', '.join(_MEANS_BY_EXAMPLES)}"
                )
            return self
        if strategy not in ("fedavg", "fedprox"):
            raise ValueError(
                f"{asked} makes the clients' mean exact, and strategy.name {strategy} takes a step of its own from "
                "it; use fedavg or fedprox"
            )
        if model.method == "original":
            raise ValueError(
                f"{asked} is about factors, and model.method original has none; set model.method to a factorized one, "
                "and sweep over no other"
            )
        if model.tanh and model.method == "fedpara":
            raise ValueError(
                f"{asked} needs weights that are linear in each factor, and those of model.tanh are in none; "
                "set model.tanh=false"
            )
        if kind == "one-factor" and model.jacobian_lambda and model.method in ("fedpara", "pfedpara"):
            raise ValueError(
                f"model.jacobian_lambda is {model.jacobian_lambda:g}, and the correction is of a step that all factors "
                "take together, which they do not under aggregation.kind one-factor; set model.jacobian_lambda=0"
            )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> "RunConfig":
        check_privacy(self)
        return self

    @model_validator(mode="after")
    def _plain_steps(self) -> "RunConfig":
        momentum = self.federation.momentum
        if self.strategy.name == "scaffold" and momentum:
            raise ValueError(
                f"federation.momentum is {momentum:g}, and strategy.name scaffold takes its control variates from "
                "plain SGD steps; set federation.momentum=0"
            )
        return self

    @model_validator(mode="after")
    def _execution_fits(self) -> "RunConfig":
        # Where configurations alone are read, nothing else of the package is.
        from lowrank_fl.execution.fits import fault

        found = fault(self, self.engine.execution)
        if found:
            raise ValueError(found)
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> "RunConfig":
        federation = self.federation
        if federation.clients_per_round > federation.clients:
            raise ValueError(
                f"federation.clients_per_round is {federation.clients_per_round} but there are only "
                f"{federation.clients} clients (federation.clients)"
            )
        return self
