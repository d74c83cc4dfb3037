"""Replaces the nn.GRU inside a small character model, trains it on, and puts nn.GRU back.

    python examples/replace_gru.py [STEPS]

The model predicts each character of a text from its neighbours on both sides. Its state dict, its outputs and its
optimiser stay valid across the replacement: both modules hold the same Parameter objects.
"""

import sys

import torch
from torch import Tensor, nn

from bigru import BiGRU, replace_gru

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8


class Tagger(nn.Module):
    """Embedding, bidirectional GRU, linear head: (B, T) int64 characters to (B, T, C) scores."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.gru = nn.GRU(16, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(text))[0])


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    alphabet = sorted(set(TEXT))
    data = torch.tensor([alphabet.index(character) for character in TEXT])
    model = Tagger(len(alphabet))
    sample = data[:20].unsqueeze(0)
    before = model(sample)

    names = replace_gru(model)
    print(f"replaced: {', '.join(names)}; now {model.gru}")
    assert isinstance(model.gru, BiGRU)
    torch.testing.assert_close(model(sample), before)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        starts = torch.randint(len(data) - 20, (16, 1), generator=generator)
        windows = data[starts + torch.arange(20)]
        # A tenth of the characters is hidden as the first of the alphabet; the model is to restore them.
        hidden = torch.rand(windows.shape, generator=generator) < 0.1
        scores = model(windows.masked_fill(hidden, 0))
        loss = nn.functional.cross_entropy(scores[hidden], windows[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1:3d}  loss {loss.item():.3f}")

    trained = model(sample)
    model.gru = model.gru.to_gru()
    torch.testing.assert_close(model(sample), trained)
    print(f"and back: {model.gru}")
    return loss.item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
