"""Bad calls, each made of nn.GRU and of BiGRU: the same class, and a message that names what is wrong."""

import warnings

import pytest
import torch
from torch import nn

from bigru import BiGRU

SIZES = {"input_size": 2, "hidden_size": 3, "num_layers": 2}
BAD_VALUES = {
    "input_size": [0, -1, 2.0, "2", None],
    "hidden_size": [0, -1, 3.0, "3"],
    "num_layers": [0, -1, 2.0, "2", None],
    "bias": [1, None],
    "batch_first": [0, None],
    "dropout": [-0.1, 1.5, True, float("nan"), "much", None],
    "proj_size": [0, 1, -1],
    "dtype": [torch.int32],
    "device": ["nowhere"],
    "nonsense": [1],
}
BAD_CONSTRUCTIONS = [{name: bad} for name, values in BAD_VALUES.items() for bad in values]


@pytest.mark.parametrize("bad", BAD_CONSTRUCTIONS, ids=str)
def test_bad_construction_raises_what_nn_gru_raises(bad):
    arguments = SIZES | bad
    with pytest.raises((ValueError, TypeError, RuntimeError)) as theirs:
        nn.GRU(**arguments, bidirectional=True)
    with pytest.raises(theirs.type):
        BiGRU(**arguments)


def test_missing_sizes():
    for module in (nn.GRU, BiGRU):
        with pytest.raises(TypeError, match="hidden_size"):
            module(2)


@pytest.mark.parametrize("proj_size", [0, 1])
def test_a_proj_size_by_position_is_refused(proj_size):
    # nn.GRU takes the eighth for one, makes the projections, and fails when it is called.
    with pytest.raises(ValueError, match="proj_size"):
        BiGRU(2, 3, 1, True, False, 0.0, True, proj_size)


def test_bidirectional_is_accepted_and_nothing_else():
    assert repr(BiGRU(2, 3, bidirectional=True)) == repr(BiGRU(2, 3)) == repr(BiGRU(2, 3, 1, True, False, 0.0, True))
    with pytest.raises(ValueError, match=r"bidirectional: expected True, got False.*torch.nn.GRU"):
        BiGRU(2, 3, bidirectional=False)
    with pytest.raises(TypeError, match="bidirectional: expected a bool, got int"):
        BiGRU(2, 3, bidirectional=1)


def test_dropout_with_one_layer_warns():
    for make in (lambda: nn.GRU(2, 3, dropout=0.5), lambda: BiGRU(2, 3, dropout=0.5)):
        with pytest.warns(UserWarning, match="dropout"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BiGRU(2, 3, 2, dropout=1)
        BiGRU(2, 3, dropout=0)


X, H0 = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)


def packed(x):
    return nn.utils.rnn.pack_padded_sequence(x, [2, 2, 2, 1, 1])


BAD_CALLS = {  # input, hx, what ours says
    "input of no dimension": (torch.zeros(()), None, "input: expected 2 or 3 dimensions, got 0"),
    "input of one dimension": (torch.zeros(3), None, "input: expected 2 or 3 dimensions, got 1"),
    "input of four dimensions": (torch.zeros(1, 2, 2, 3), None, "input: expected 2 or 3 dimensions, got 4"),
    "wrong features": (torch.zeros(2, 2, 4), None, "input: expected 3 features .* got 4"),
    "no features": (torch.zeros(2, 2, 0), None, "input: expected 3 features .* got 0"),
    "wrong features, one sequence": (torch.zeros(2, 4), None, "input: expected 3 features .* got 4"),
    "double input": (X.double(), None, "input: expected torch.float32 .* got torch.float64"),
    "integer input": (X.long(), None, "input: expected torch.float32 .* got torch.int64"),
    "16-bit input": (X.bfloat16(), None, "input: expected torch.float32 .* got torch.bfloat16"),
    "input on another device": (X.to("meta"), None, "input: expected a tensor on cpu .* got one on meta"),
    "no time step": (torch.zeros(0, 2, 3), None, "input: expected at least one time step"),
    "no time step, one sequence": (torch.zeros(0, 3), None, "input: expected at least one time step"),
    "state of one dimension": (X, torch.zeros(4), "hx: expected 3 dimensions"),
    "state of two dimensions": (X, torch.zeros(2, 4), "hx: expected 3 dimensions"),
    "state of three dimensions": (X[:, 0], H0, "hx: expected 2 dimensions"),
    "state of another batch": (X, torch.zeros(2, 1, 4), r"hx: expected shape \(2, 5, 4\) .* got \(2, 1, 4\)"),
    "state of another size": (X, torch.zeros(2, 5, 5), r"hx: expected shape \(2, 5, 4\)"),
    "state of another depth": (X, torch.zeros(4, 5, 4), r"hx: expected shape \(2, 5, 4\)"),
    "state of one direction": (X, torch.zeros(1, 5, 4), r"hx: expected shape \(2, 5, 4\)"),
    "state with the batch first": (X, torch.zeros(5, 2, 4), r"hx: expected shape \(2, 5, 4\)"),
    "double state": (X, H0.double(), "hx: expected torch.float32 .* got torch.float64"),
    "state on another device": (X, H0.to("meta"), "hx: expected a tensor on cpu .* got one on meta"),
    "no tensor": ([[0.0]], None, "dim"),
    "no tensor at all": (None, None, "dim"),
    "a tuple of states": (X, (H0, H0), "dim"),
    "packed, wrong features": (packed(torch.zeros(2, 5, 4)), None, "input: expected 3 features .* got 4"),
    "packed, wrong dtype": (packed(X.double()), None, "input: expected torch.float32"),
    "packed, state of two dimensions": (packed(X), torch.zeros(2, 4), "hx: expected 3 dimensions"),
    "packed, state of a smaller batch": (packed(X), torch.zeros(2, 4, 4), r"hx: expected shape \(2, 5, 4\)"),
}


@pytest.mark.parametrize(("x", "hx", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call_raises_what_nn_gru_raises(x, hx, message, backend):
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as theirs:
        nn.GRU(3, 4, bidirectional=True)(x, hx)
    with pytest.raises(theirs.type, match=message) as ours:
        BiGRU(3, 4, backend=backend)(x, hx)
    if "RNN input dtype" in str(theirs.value):  # the words that PyTorch's own module tests look for
        assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_autocast_takes_floating_numbers_alone(backend, dtype):
    # Unembedded tokens would train; of complex numbers the imaginary part would go.
    theirs, ours = nn.GRU(3, 4, bidirectional=True), BiGRU(3, 4, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for bad in ((X.to(dtype),), (X, H0.to(dtype)), (packed(X.to(dtype)),), (packed(X), H0.to(dtype))):
            with pytest.raises(RuntimeError):
                theirs(*bad)
            with pytest.raises(RuntimeError, match=f"(input|hx): expected .* got {dtype}"):
                ours(*bad)


def test_a_weight_of_another_dtype():
    for module in (nn.GRU(3, 4, bidirectional=True), BiGRU(3, 4), BiGRU(3, 4, backend="reference")):
        module.weight_hh_l0.data = module.weight_hh_l0.data.double()
        with pytest.raises(RuntimeError):
            module(X)


@pytest.mark.parametrize("option", ["backend", "precision"])
def test_an_unknown_option(option):
    gru = BiGRU(3, 4)
    for call in (lambda: setattr(gru, option, "fast"), lambda: BiGRU(3, 4, **{option: "fast"})):
        with pytest.raises(ValueError, match=f"{option}: expected one of .* got 'fast'"):
            call()
    assert (gru.backend, gru.precision) == ("auto", "fp32")


def test_arguments_by_name():
    for module in (nn.GRU(3, 4, bidirectional=True), BiGRU(3, 4)):
        assert module(hx=H0, input=X)[0].shape == (2, 5, 8)
        with pytest.raises(TypeError):
            module()
        with pytest.raises(TypeError):
            module(X, state=H0)


def test_an_oversized_state_of_a_packed_sequence_is_refused():
    # nn.GRU takes the rows of other sequences where the sequences were not sorted.
    x = nn.utils.rnn.pack_padded_sequence(X, [1, 2, 1, 2, 1], enforce_sorted=False)
    hx = torch.zeros(2, 7, 4)
    assert nn.GRU(3, 4, bidirectional=True)(x, hx)[0].data.shape == (7, 8)
    with pytest.raises(RuntimeError, match=r"hx: expected shape \(2, 5, 4\) .* got \(2, 7, 4\)"):
        BiGRU(3, 4)(x, hx)
