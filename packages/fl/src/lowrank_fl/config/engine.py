"""What runs the clients."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lowrank_fl.config.section import Section

Execution = Literal["sequential", "batched", "graphs", "compiled"]

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


class EngineConfig(Section):
    """What runs the clients. No key here changes a result on the CPU but `threads` and, in the last digits, `execution`
    batched and compiled.
    """

    kind: Literal["local", "ray", "superlink"] = "local"
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes that train clients side by side; `auto` takes one for each core."""
    threads: PositiveInt = 1
    """Threads a client trains with."""
    execution: Execution | Literal["auto"] = "sequential"
    """How a process of the local engine trains its clients. `sequential`: one after the other. `batched`: several at
    once, their parameters stacked; of the models for the MLP. `graphs`: one after the other, each step a CUDA graph.
    `compiled`: one after the other, each step compiled by torch.compile. `auto`: on a GPU the fastest of the first
    three, timed before the first round; on a CPU `sequential`, so that no bit depends on a clock."""
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
