"""LSTMs whose weights are normalised, or compositions of factors, or both."""

# torch leaves the types of nn.LSTM and of norm partly open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import torch
from torch import Tensor, nn

from lowrank_core.factorizations import Factorization
from lowrank_core.layers.weight import FactorizedWeight

State = tuple[Tensor, Tensor]


class WeightNormLSTM(nn.LSTM):
    """nn.LSTM with every weight row w = g·v/‖v‖ (Salimans and Kingma, 2016): `weight_*` hold v, `norm_*` hold g.

    torch's own weight_norm parametrization does not reach the flat weights nn.LSTM computes with.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        for name in weight_names(self):
            gain = getattr(self, name).detach().norm(dim=1, keepdim=True)
            self.register_parameter(name.replace("weight", "norm"), nn.Parameter(gain))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, hx: State | None = None
    ) -> tuple[Tensor, State]:
        weights = {name: normalize_rows(getattr(self, name), gain_of(self, name)) for name in weight_names(self)}
        return run_lstm(self, weights, input, hx)


class FactorizedLSTM(nn.Module):
    """An LSTM with each `weight_ih_l*` and `weight_hh_l*` (4·hidden x inputs) composed from factors.

    Built from an nn.LSTM, whose options, biases and row norms it takes over; `ranks` names the rank of each
    weight that becomes factors, and the others stay as they are.
    Input `(time, batch, features)`, or `(batch, time, features)` under batch_first.
    """

    def __init__(self, source: nn.LSTM, factorization: Factorization, *, ranks: dict[str, int]) -> None:
        super().__init__()
        self.num_layers, self.hidden_size = source.num_layers, source.hidden_size
        self.bias, self.batch_first = source.bias, source.batch_first
        self.dropout, self.bidirectional = source.dropout, source.bidirectional
        for name in list(source._parameters):
            parameter = getattr(source, name)
            if name in ranks:
                weight = FactorizedWeight(
                    parameter.shape, factorization, rank=ranks[name], device=parameter.device, dtype=parameter.dtype
                )
                weight.reset_parameters()
                self.add_module(name, weight)
            else:
                self.register_parameter(name, parameter)

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        weights: dict[str, Tensor] = {}
        for name in weight_names(self):
            held = getattr(self, name)
            weight = held() if isinstance(held, FactorizedWeight) else held
            weights[name] = normalize_rows(weight, gain_of(self, name))
        return run_lstm(self, weights, input, hx)


LSTM = nn.LSTM | FactorizedLSTM


def weight_names(lstm: LSTM) -> list[str]:
    """The names of an LSTM's weight matrices in the order torch.lstm reads them."""
    return [
        f"weight_{kind}_l{layer}{direction}"
        for layer in range(lstm.num_layers)
        for direction in (("", "_reverse") if lstm.bidirectional else ("",))
        for kind in ("ih", "hh")
    ]


def gain_of(lstm: LSTM, weight_name: str) -> Tensor | None:
    return getattr(lstm, weight_name.replace("weight", "norm"), None)


def normalize_rows(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Rows of `weight` scaled to the norms `gain`, `(rows, 1)`; the weight itself where there are none."""
    return weight if gain is None else gain * weight / weight.norm(dim=1, keepdim=True)


def run_lstm(lstm: LSTM, weights: dict[str, Tensor], input: Tensor, hx: State | None) -> tuple[Tensor, State]:
    """Torch's fused LSTM over the given weights; biases and options are those of `lstm`."""
    flat: list[Tensor] = []
    names = weight_names(lstm)
    for ih, hh in zip(names[::2], names[1::2], strict=True):
        flat += [weights[ih], weights[hh]]
        if lstm.bias:
            flat += [getattr(lstm, name.replace("weight", "bias")) for name in (ih, hh)]
    if hx is None:
        directions = 2 if lstm.bidirectional else 1
        batch = input.shape[0 if lstm.batch_first else 1]
        zeros = input.new_zeros(lstm.num_layers * directions, batch, lstm.hidden_size)
        hx = (zeros, zeros)
    output, h, c = torch.lstm(
        input,
        hx,
        flat,
        lstm.bias,
        lstm.num_layers,
        lstm.dropout,
        lstm.training,
        lstm.bidirectional,
        lstm.batch_first,
    )
    return output, (h, c)
