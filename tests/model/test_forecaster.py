"""The network is the published one: names, sizes and answers."""

import pytest
import torch
from torch import nn

from bigru.model.forecaster import HandForecaster


class Published(nn.Module):
    """The published network, written out with torch.nn.GRU."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"core": nn.GRU(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)}
        )
        self.pose_head = nn.Sequential(nn.LayerNorm(2 * hidden_size), nn.Dropout(0.2), nn.Linear(2 * hidden_size, 84))

    def forward(self, x):
        return self.pose_head(self.encoder["core"](x)[0])


def test_published_size():
    assert sum(parameter.numel() for parameter in HandForecaster().parameters()) == 482_900


def test_published_names_and_shapes():
    ours = {name: tuple(value.shape) for name, value in HandForecaster().state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in Published(84, 128, 2).state_dict().items()}
    assert ours["encoder.core.weight_ih_l1_reverse"] == (384, 256)
    assert ours["pose_head.2.weight"] == (84, 256)


@pytest.mark.parametrize(
    ("input_size", "hidden_size", "num_layers", "frames"),
    [
        pytest.param(84, 128, 2, 60, id="published"),
        pytest.param(214, 7, 1, 5, id="every modality, one layer"),
        pytest.param(86, 8, 3, 1, id="one frame"),
    ],
)
def test_answers_as_a_network_of_nn_gru(input_size, hidden_size, num_layers, frames):
    torch.manual_seed(0)
    published = Published(input_size, hidden_size, num_layers).eval()
    ours = HandForecaster(input_size, hidden_size, num_layers).eval()
    ours.load_state_dict(published.state_dict())
    x = torch.randn(3, frames, input_size)
    y, expected = ours(x), published(x)
    assert y.shape == (3, frames, 84)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    for (name, mine), theirs in zip(ours.named_parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=lambda text, at=name: at + text)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model, x = HandForecaster(hidden_size=8, dropout=0.5), torch.randn(2, 4, 84)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_residual_network_predicts_displacements():
    torch.manual_seed(0)
    published, residual = HandForecaster(86, 8).eval(), HandForecaster(86, 8, residual=True).eval()
    residual.load_state_dict(published.state_dict() | {"residual": torch.ones(())})
    x = torch.randn(2, 4, 86)
    torch.testing.assert_close(residual(x), published(x) + x[:, 3:, :84])
