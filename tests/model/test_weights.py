"""Checkpoints and weights are whole, come back to the bit, and hold data only."""

import os
import pickle
import re
import struct

import pytest
import torch

from bigru.model.forecaster import HandForecaster
from bigru.model.weights import CheckpointError, load_forecaster, load_weights, save_weights
from bigru.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from bigru.training.step import TrainStep


def network(**sizes):
    torch.manual_seed(0)
    model = HandForecaster(**({"hidden_size": 8} | sizes))
    return model, TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-2), grad_clip=1.0)


def learn(step):
    step(torch.randn(2, 4, 84), torch.zeros(2, 4, 84))


def same(weights, other):
    return weights.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in weights.items())


class Evil:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_training_goes_on_to_the_bit(tmp_path):
    model, step = network()
    progress = Progress(history=[{"epoch": 1, "va_mpjpe": 0.1}], windows={"train": 3}, elapsed_s=1.5)
    for _ in range(3):
        learn(step)
    progress.update(0.1, 0.001)
    progress.best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "checkpoint.pt", step, progress)
    for _ in range(3):
        learn(step)
    again, its_step = network()
    restored = load_checkpoint(tmp_path / "checkpoint.pt", its_step)
    for name in ("epoch", "best_epoch", "best_mpjpe", "gain_epoch", "gain_mpjpe", "elapsed_s", "history", "windows"):
        assert getattr(restored, name) == getattr(progress, name), name
    assert same(restored.best_weights, progress.best_weights)
    for _ in range(3):
        learn(its_step)
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("damage", ["torn", "empty", "other network", "other format", "text"])
def test_a_checkpoint_that_cannot_be_used(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, network()[1], Progress())
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "other format":
        torch.save({"format": 1}, path)
    sizes = {"hidden_size": 9} if damage == "other network" else {}
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_checkpoint(path, network(**sizes)[1])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    model, step = network()
    witness = tmp_path / "ran"
    torch.save({"format": 2, "model": Evil(witness)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(witness)))
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(tmp_path / "evil.pt", step)
    for name in ("evil.pt", "plain.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(model, tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "checkpoint.pt", "nested.pth"])
def test_weights_come_back(tmp_path, name):
    model, step = network()
    learn(step)
    if name == "w.safetensors":
        save_weights(tmp_path / name, model.state_dict())
    elif name == "checkpoint.pt":
        save_checkpoint(tmp_path / name, step, Progress())
    else:
        torch.save({"state_dict": model.state_dict()} if name == "nested.pth" else model.state_dict(), tmp_path / name)
    other, _ = network()
    assert not torch.equal(other.pose_head[2].weight, model.pose_head[2].weight)
    load_weights(other, tmp_path / name)
    assert same(other.state_dict(), model.state_dict())


def test_weights_of_another_network_are_named(tmp_path):
    model, _ = network()
    path = tmp_path / "w.safetensors"
    save_weights(path, {key.replace("pose_head", "head"): value for key, value in model.state_dict().items()})
    with pytest.raises(CheckpointError, match=r"missing pose_head\.0\.bias.*unknown head\.0\.bias"):
        load_weights(model, path)
    save_weights(path, network(hidden_size=9)[0].state_dict())
    with pytest.raises(CheckpointError, match=r"pose_head\.0\.bias is \(18,\), expected \(16,\)"):
        load_weights(model, path)
    save_weights(path, network(input_size=84 + 2 + 120)[0].state_dict())
    with pytest.raises(CheckpointError, match=r"206 features \(hands, gaze, objects\).*84 features \(hands\)"):
        load_weights(model, path)
    for with_it, without in ((True, False), (False, True)):
        save_weights(path, network(residual=with_it)[0].state_dict())
        assert load_forecaster(path).state_dict().keys() == network(residual=with_it)[0].state_dict().keys()
        theirs, ours = ("with" if residual else "without" for residual in (with_it, without))
        with pytest.raises(CheckpointError, match=f"trained {theirs} --residual, the run is {ours}"):
            load_weights(network(residual=without)[0], path)
    weights = model.state_dict()
    weights["pose_head.2.bias"] = torch.full((84,), float("nan"))
    save_weights(path, weights)
    with pytest.raises(CheckpointError, match=r"not finite in pose_head\.2\.bias"):
        load_weights(model, path)


@pytest.mark.parametrize("name", ["missing.pt", "torn.safetensors", "weights.bin", "list.pt", "numbers.pt"])
def test_weights_that_cannot_be_read(tmp_path, name):
    path = tmp_path / name
    if name == "torn.safetensors":
        save_weights(path, network()[0].state_dict())
        path.write_bytes(path.read_bytes()[:-10])
    elif name == "weights.bin":
        path.write_bytes(b"")
    elif name != "missing.pt":
        torch.save([1, 2] if name == "list.pt" else {"epoch": 1}, path)
    model, _ = network()
    before = model.pose_head[2].weight.clone()
    with pytest.raises(CheckpointError, match=name):
        load_weights(model, path)
    assert torch.equal(model.pose_head[2].weight, before)


FOREIGN = {
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS"),
    "page": (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "escape codes": (b"\x1b[31mred\x1b[0m", "cannot be read"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_no_weights_are_told_apart_in_our_words(tmp_path, kind, suffix):
    content, message = FOREIGN[kind]
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_weights(network()[0], path)
    said = str(caught.value)
    assert message in said or (kind, suffix) == ("escape codes", "pt")
    assert said.isprintable()
    assert "weights_only" not in said


def test_a_whole_model_is_refused_with_the_cure(tmp_path):
    model, _ = network()
    torch.save(model, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"HandForecaster.*save model\.state_dict") as caught:
        load_weights(model, tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_taken_off(tmp_path, caplog, prefix):
    model, step = network()
    learn(step)
    path = tmp_path / os.fsdecode(b"w\xe4.safetensors")
    save_weights(path, {prefix + name: value for name, value in model.state_dict().items()})
    other, _ = network()
    load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())
    assert f"without their prefix {prefix}" in caplog.text


@pytest.mark.parametrize("content", [b"\x80\x02a", b"\x80\x02G", b"\x80\x02}K\x01R.", b"\x80\x02(e", b"\x80\x02h"])
def test_a_damaged_pickle_is_named_with_what_went_wrong(tmp_path, content):
    # Each breaks the unpickler in another place, and it was not written to say so.
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    model, step = network()
    for load in (lambda: load_weights(model, path), lambda: load_checkpoint(path, step)):
        with pytest.raises(CheckpointError, match=r"damaged\.pt") as caught:
            load()
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [IndexError, AssertionError, AttributeError, TypeError, struct.error, MemoryError])
def test_whatever_the_unpickler_raises(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error("at byte 7")

    path = tmp_path / "w.pt"
    path.write_bytes(b"PK")
    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(CheckpointError, match=rf"w\.pt cannot be read, .*: {error.__name__}: at byte 7") as caught:
        load_weights(network()[0], path)
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("entry", ["progress", "model", "optimizer", "random_states"])
def test_a_checkpoint_with_an_odd_entry(tmp_path, entry):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, network()[1], Progress())
    content = torch.load(path, weights_only=True)
    for odd in (None, [], 3):
        torch.save(content | {entry: odd}, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
            load_checkpoint(path, network()[1])


ODD_TENSORS = {
    "torch.float8_e4m3fn": lambda values: values.to(torch.float8_e4m3fn),
    "torch.complex64": lambda values: torch.complex(values, values),
    "torch.int64": lambda values: values.long(),
    "torch.bool": lambda values: values > 0,
    "torch.sparse_coo": lambda values: values.to_sparse(),
    "without values (meta)": lambda values: values.to("meta"),
    "nested": lambda values: torch.nested.nested_tensor([values, values]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_no_weights(tmp_path, kind):
    model, _ = network()
    before = model.pose_head[2].weight.clone()
    weights = model.state_dict()
    weights["pose_head.2.weight"] = ODD_TENSORS[kind](weights["pose_head.2.weight"])
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt: .*, but pose_head\.2\.weight is {re.escape(kind)}$"):
        load_weights(model, tmp_path / "odd.pt")
    assert torch.equal(model.pose_head[2].weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_precisions(tmp_path, dtype):
    model, _ = network()
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_weights(tmp_path / "w.safetensors", weights)
    load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, weights[name].float()) for name, value in model.state_dict().items())


def test_a_weight_too_large_for_the_network(tmp_path):
    model, _ = network()
    weights = model.state_dict() | {"pose_head.2.bias": torch.full((84,), 1e39, dtype=torch.float64)}
    save_weights(tmp_path / "w.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"not finite in pose_head\.2\.bias"):
        load_weights(model, tmp_path / "w.safetensors")


def test_progress_counts_gains_and_keeps_the_best():
    progress = Progress()
    assert progress.update(1.0, 0.1)
    # Better, so it is kept; not by enough to go on for.
    assert progress.update(0.95, 0.1)
    assert not progress.update(0.97, 0.1)
    assert (progress.best_epoch, progress.gain_epoch) == (2, 1)
    assert progress.stalled(2)
    assert not progress.stalled(3)
    # Small gains add up: 0.89 is 0.11 below the last gain that counted.
    assert progress.update(0.89, 0.1)
    assert (progress.best_epoch, progress.gain_epoch, progress.best_mpjpe) == (4, 4, 0.89)
    assert not progress.stalled(1)
