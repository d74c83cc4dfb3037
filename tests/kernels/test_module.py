"""`BiGRU` as a module: copies, files, dtypes, parametrizations, hooks, checkpointing, and the modes of autograd."""

import copy
import io
import pickle

import pytest
import torch
from support import error, same, trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bigru import BiGRU

pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


@pytest.fixture
def gru(backend, kernel_device):
    torch.manual_seed(0)
    return BiGRU(3, 4, backend=backend, device=kernel_device)


@pytest.fixture
def x(kernel_device):
    torch.manual_seed(1)
    return torch.randn(3, 2, 3).to(kernel_device)


def nn_gru(gru):
    """nn.GRU of the same parameters."""
    theirs = nn.GRU(3, 4, bidirectional=True, device=gru.weight_ih_l0.device)
    theirs.load_state_dict(gru.state_dict())
    return theirs


class TestCopiesAndFiles:
    def test_each_computes_the_same(self, gru, x):
        def saved_and_loaded(what, **options):
            file = io.BytesIO()
            torch.save(what, file)
            file.seek(0)
            return torch.load(file, **options)

        fresh = BiGRU(3, 4, backend=gru.backend, device=x.device)
        fresh.load_state_dict(saved_and_loaded(gru.state_dict(), weights_only=True))
        copies = {
            "deepcopy": copy.deepcopy(gru),
            "pickle": pickle.loads(pickle.dumps(gru)),
            "torch.save of the module": saved_and_loaded(gru, weights_only=False),
            "torch.save of the state dict": fresh,
        }
        expected = trained(gru, x)
        for name, twin in copies.items():
            assert (twin.backend, twin.precision) == (gru.backend, gru.precision), name
            assert error(twin(x)[0], gru(x)[0]) < 1e-6, name
            assert same(trained(twin, x), expected), name
            with torch.no_grad():
                twin.weight_ih_l0.zero_()
        assert gru.weight_ih_l0.all()

    @pytest.mark.parametrize("parametrized", [False, True])
    def test_a_copy_of_a_compiled_module_runs_its_own_weights(self, parametrized, x):
        torch._dynamo.reset()
        gru = BiGRU(3, 4, device=x.device)
        if parametrized:
            parametrizations.weight_norm(gru, "weight_hh_l0")
        gru.compile(backend="eager")
        before = gru(x)[0].detach()
        copies = [copy.deepcopy(gru), torch.optim.swa_utils.AveragedModel(gru).module]
        if not parametrized:
            copies += [copy.copy(copy.deepcopy(gru)), pickle.loads(pickle.dumps(gru))]
        for twin in copies:
            assert error(twin(x)[0], before) < 1e-6
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.fill_(2)
            assert error(twin(x)[0], before) > 0.5
        assert torch.equal(gru(x)[0], before)

    def test_state_dict_both_ways(self, gru, x):
        theirs = nn_gru(gru)
        assert same(gru(x), theirs(x), 1e-5)
        for assign in (False, True):
            halved = {name: value / 2 for name, value in theirs.state_dict().items()}
            gru.load_state_dict(halved, assign=assign)
            theirs.load_state_dict(gru.state_dict())
            gru.flatten_parameters()
            assert same(gru(x), theirs(x), 1e-5)

    def test_repr_and_weights_are_nn_grus(self):
        ours, theirs = BiGRU(3, 4, 2, False, True, 0.5), nn.GRU(3, 4, 2, False, True, 0.5, bidirectional=True)
        assert ours.extra_repr() == f"{theirs.extra_repr()}, backend='auto', precision='fp32'"
        assert ours._all_weights == theirs._all_weights
        for own in ours.all_weights:
            assert all(any(weight is parameter for parameter in ours.parameters()) for weight in own)


class TestDtypes:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-2)], ids=str)
    def test_to_16_bits_and_back(self, gru, x, dtype, tolerance):
        expected = nn_gru(gru)(x)
        y, h_n = gru.to(dtype)(x.to(dtype))
        assert y.dtype == h_n.dtype == dtype
        assert same((y, h_n), expected, tolerance)
        assert gru.float()(x)[0].dtype == torch.float32

    def test_double(self, gru, x, backend):
        gru.double()
        if backend == "triton":
            with pytest.raises(RuntimeError, match=r"'triton' cannot serve this call: the input is torch.float64"):
                gru(x.double())
            gru.backend = "auto"  # takes ATen's, on a GPU too
        assert same(gru(x.double()), nn_gru(gru).double()(x.double()), 1e-12)

    def test_meta_to_a_device(self, x, backend, kernel_device):
        gru = BiGRU(3, 4, backend=backend, device="meta").to_empty(device=kernel_device)
        gru.reset_parameters()
        assert same(gru(x), nn_gru(gru)(x), 1e-5)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_made_as_asked(self, device, dtype, backend):
        gru = BiGRU(3, 4, 2, backend=backend, device=device, dtype=dtype)
        assert {(p.device.type, p.dtype) for p in gru.parameters()} == {(device, dtype)}


def test_inputs_and_weights_are_left_alone(gru, x):
    hx = torch.randn(2, 2, 4, device=x.device).requires_grad_()
    x.requires_grad_()
    kept = [x, hx, *gru.parameters()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in kept]
    y, h_n = gru(x, hx)
    (y.square().sum() + h_n.square().sum()).backward()
    for tensor, (values, version) in zip(kept, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor.detach(), values)


def normed(norm):
    def change(module):
        norm(module.eval(), "weight_hh_l0")
        norm(module, "weight_ih_l0_reverse")
        # In evaluation spectral_norm's power iteration stands still: nn.GRU reads each weight several times a call.
        # cuDNN's backward wants the module in training.
        module.train().parametrizations.eval()

    return change


CHANGES = {
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "pruned": lambda module: prune.l1_unstructured(module, "weight_hh_l0", 0.5),
    "assigned": lambda module: setattr(module, "weight_hh_l0", nn.Parameter(torch.ones_like(module.weight_hh_l0))),
    "other data": lambda module: setattr(module.weight_hh_l0, "data", torch.ones_like(module.weight_hh_l0)),
    "shared": lambda module: setattr(module, "weight_hh_l0_reverse", module.weight_hh_l0),
}


class Scaled(nn.Module):
    """Reads a weight that is stored as 64 times itself, in any dtype."""

    def forward(self, weight):
        return weight.float() / 64


class TestWeightsAreReadWhenCalled:
    def test_functional_call(self, gru, x):
        zeros = {name: torch.zeros_like(p) for name, p in gru.named_parameters()}
        assert not torch.func.functional_call(gru, zeros, (x,))[0].any()
        assert gru(x)[0].any()

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
    def test_changed_in_place_of_what_they_were(self, gru, x, change):
        theirs = nn_gru(gru)
        gru(x)
        for module in (gru, theirs):
            torch.manual_seed(0)
            change(module)
        assert same(trained(gru, x), trained(theirs, x), 1e-5)
        with torch.no_grad():
            for parameter in (*gru.parameters(), *theirs.parameters()):
                parameter.mul_(2)
        assert same(gru(x), theirs(x), 1e-5)
        if parametrize.is_parametrized(gru):
            parametrize.remove_parametrizations(gru, "weight_hh_l0")
        elif prune.is_pruned(gru):
            prune.remove(gru, "weight_hh_l0")
        assert same(gru(x), theirs(x), 1e-5)

    def test_each_is_read_once_a_call(self, gru, x):
        class Counted(nn.Module):
            calls = 0

            def forward(self, weight):
                Counted.calls += 1
                return weight

        for name in ("weight_ih_l0", "bias_hh_l0_reverse"):
            parametrize.register_parametrization(gru, name, Counted())
        Counted.calls = 0
        gru(x)
        assert Counted.calls == 2

    @pytest.mark.parametrize("stored", [torch.float16, torch.int8], ids=str)
    def test_parametrized_from_another_dtype(self, gru, x, stored):
        # What is compared with the input is what is computed with, not what is stored.
        theirs = nn_gru(gru)
        for module in (gru, theirs):
            for name in gru._flat_weights_names:
                weight = module._parameters[name]
                module._parameters[name] = nn.Parameter((64 * weight.data).to(stored), requires_grad=False)
                parametrize.register_parametrization(module, name, Scaled(), unsafe=True)
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2])
        assert same(gru(x), theirs(x), 1e-5)
        assert error(gru(packed)[1], theirs(packed)[1]) < 1e-5
        with pytest.raises(ValueError, match=r"expected torch.float32 like the weights, got torch.float16"):
            gru(x.half())

    def test_a_replica_of_data_parallel(self, gru, x):
        # As torch.nn.parallel.replicate makes it on every GPU: tensors that are no parameters.
        replica = gru._replicate_for_data_parallel()
        for name, parameter in gru.named_parameters():
            setattr(replica, name, parameter * 1)
        assert list(replica.parameters()) == []
        gru._compiled_call_impl = gru.forward  # the replica of a compiled module runs its own tensors
        assert gru._replicate_for_data_parallel()._compiled_call_impl is None
        gru._compiled_call_impl = None
        assert same(trained(gru, x, run=replica), trained(gru, x))
        with pytest.raises(ValueError, match=r"input: expected torch.float32"):
            replica(x.double())


class TestAutograd:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, gru, x, use_reentrant):
        def run(x):
            return checkpoint(gru, x, use_reentrant=use_reentrant)

        assert same(trained(gru, x, run=run), trained(gru, x))

    def test_hooks(self, gru, x):
        seen = []
        gru.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        gru.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
        gru.register_full_backward_hook(lambda module, dx, dy: seen.append((len(dx), len(dy))))
        gru.weight_hh_l0.register_hook(lambda gradient: 3 * gradient)
        gru.bias_ih_l0.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
        plain = copy.deepcopy(nn_gru(gru))
        y, _ = gru(x.clone().requires_grad_())
        expected, _ = plain(2 * x)
        assert error(y, expected + 1) < 1e-5
        y.sum().backward()
        expected.sum().backward()
        assert error(gru.weight_hh_l0.grad, 3 * plain.weight_hh_l0.grad) < 1e-5
        assert sorted(seen, key=str) == sorted([(12,), (1, 2)], key=str)

    def test_inference_mode(self, gru, x):
        with torch.inference_mode():
            y, h_n = gru(x)
        assert y.is_inference()
        assert h_n.is_inference()
        assert error(y, gru(x)[0]) < 1e-6
        with torch.no_grad():
            y, h_n = gru(x)
        assert not y.requires_grad
        assert not h_n.requires_grad

    def test_gradients_accumulate_and_the_graph_is_freed(self, gru, x):
        loss = sum(output.square().sum() for output in gru(x))
        once = torch.autograd.grad(loss, list(gru.parameters()), retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        assert same([parameter.grad / 2 for parameter in gru.parameters()], once)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_one_output_alone(self, gru, x):
        theirs = nn_gru(gru)
        for which in (0, 1):
            sums = ((m(x)[which].square().sum(), list(m.parameters())) for m in (gru, theirs))
            assert same(*(torch.autograd.grad(*both) for both in sums), 1e-5)

    @pytest.mark.usefixtures("not_cudnn")
    def test_the_same_bits_from_run_to_run_and_gradients_in_eval_mode(self, gru, x):
        first, second = trained(gru, x), trained(gru, x)
        assert all(map(torch.equal, first, second))
        assert same(trained(gru.eval(), x), first)


class TestWhatIsGiven:
    def test_a_tensor_subclass_comes_back_in_every_output(self, gru, x):
        class Marked(torch.Tensor):
            pass

        for module in (gru, nn_gru(gru)):
            with torch.no_grad():
                assert {type(output) for output in module(x.as_subclass(Marked))} == {Marked}

    def test_weights_of_other_shapes_are_refused(self, gru, x):
        others = [gru.weight_hh_l0.new_ones(12, 3)]
        if gru.backend != "torch" or not x.is_cuda:  # cuDNN's looks at the addresses alone
            others.append(gru.weight_hh_l0.T)
        for other in others:
            with pytest.raises(RuntimeError):
                torch.func.functional_call(gru, {"weight_hh_l0": other}, (x,))

    @pytest.mark.usefixtures("poisoned", "not_cudnn")
    def test_hooks_of_saved_tensors_may_change_their_layout(self, gru, x):
        def packed(tensor):
            assert tensor.isfinite().all()
            return tensor.transpose(0, -1).contiguous() if tensor.dim() > 1 else tensor

        def unpacked(tensor):
            # Or give them back inside larger memory, as those that offload do.
            return tensor.transpose(0, -1) if tensor.dim() > 1 else torch.cat([tensor.new_ones(64), tensor])[64:]

        def hooked(x):
            with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
                return gru(x)

        assert same(trained(gru, x, run=hooked), trained(gru, x))

    def test_y_is_not_to_be_changed_in_place_while_training(self, x, triton_device):
        gru = BiGRU(3, 4, backend="triton", device=triton_device)
        y = gru(x)[0].mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            y.sum().backward()
        with torch.no_grad():
            assert error(gru(x)[0].mul_(2), 2 * gru(x)[0]) == 0

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_outputs_own_their_storage_and_are_detached_in_place(self, batch_first, backend, x):
        ours = BiGRU(3, 4, 2, batch_first=batch_first, backend=backend)
        theirs = nn.GRU(3, 4, 2, True, batch_first)
        for module in (ours, theirs):
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled):
                    y, h_n = module.to(x)(x)
                    for output in (y, h_n):
                        assert output.untyped_storage().nbytes() == output.numel() * output.element_size()
                        assert not output._is_view()
                    assert y.detach_().requires_grad is False
                if enabled:
                    h_n.sum().backward()
        y, h_n = ours(x)
        (dx,) = torch.autograd.grad(h_n.sum(), ours.weight_hh_l0)
        assert error(ours.weight_hh_l0.grad, dx) == 0


@pytest.mark.usefixtures("not_cudnn")  # whose operator is not counted
@pytest.mark.parametrize("trained", [False, True])
def test_flops_are_nn_grus(gru, x, trained):
    counts = []
    for module in (gru, nn_gru(gru).cpu()):
        leaves = [tensor.to(module.weight_hh_l0) for tensor in (x, torch.randn(2, 2, 4))]
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
            y, _ = module(*(leaf.detach().requires_grad_(trained) for leaf in leaves))
            if trained:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_meta_device():
    x = torch.empty(5, 2, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"the input is on meta|not installed"):
        BiGRU(3, 4, backend="triton", device="meta")(x)
    assert BiGRU(3, 4, backend="reference", device="meta")(x)[0].shape == (5, 2, 8)
    assert BiGRU(3, 4, device="meta")(x)[1].shape == (2, 2, 4)


def test_autocast_leaves_doubles_alone():
    gru = BiGRU(3, 4, backend="reference", dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert gru(x)[0].dtype == torch.float64
