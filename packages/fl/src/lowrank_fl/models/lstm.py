"""The paper's character model for Shakespeare: a two-layer LSTM of 256 units with weight normalisation."""

from torch import Tensor, nn

from lowrank_core import WeightNormLSTM

_EMBEDDING = 8  # as in LEAF (Caldas et al., 2018), whose set-up the paper follows


class CharacterLSTM(nn.Module):
    """Symbol numbers `(batch, characters)` to logits of the next character `(batch, symbols)`."""

    def __init__(self, num_symbols: int = 80, *, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, _EMBEDDING)
        self.lstm = WeightNormLSTM(_EMBEDDING, hidden, layers, batch_first=True)
        self.decoder = nn.Linear(hidden, num_symbols)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(input))
        return self.decoder(output[:, -1])
