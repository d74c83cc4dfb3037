"""Second derivatives, forward mode and torch.func: right, or an error that says how to get them."""

import pytest
import torch
from support import error
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

from bigru import BiGRU

# torch's own, where forward mode and compilers load their decompositions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

STEPS, BATCH, INPUTS, HIDDEN = 3, 2, 2, 3


def make(backend, device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    gru = BiGRU(INPUTS, HIDDEN, 2, dtype=dtype, backend=backend).to(device)
    return gru, torch.randn(STEPS, BATCH, INPUTS, dtype=dtype).to(device)


def loss(gru, x):
    y, h_n = gru(x)
    return (y.cos() * y).sum() + h_n.square().sum()


def second_through_the_input(gru, x):
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(gru, x), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum() + x.pow(3).sum(), x)[0]


def second_through_a_weight(gru, x):
    # y.sum()'s own gradient needs none: a node that looks at its incoming gradients alone would be cut off.
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(gru(x)[0].sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum() + gru.weight_ih_l0.square().sum(), gru.weight_ih_l0)[0]


def gradient_penalty(gru, x):
    gru.zero_grad()
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(gru, x), x, create_graph=True)
    (loss(gru, x) + dx.square().sum()).backward()
    return torch.cat([p.grad.flatten() for p in gru.parameters()])


def forward_mode(gru, x, tangents_of="input"):
    weights = {name: p.detach() for name, p in gru.named_parameters()}
    with forward_ad.dual_level():
        if tangents_of == "input":
            x = forward_ad.make_dual(x, torch.ones_like(x))
        else:
            weights = {name: forward_ad.make_dual(w, torch.ones_like(w)) for name, w in weights.items()}
        return forward_ad.unpack_dual(functional_call(gru, weights, (x,))[0]).tangent


def forward_mode_without_gradients(gru, x):
    with torch.no_grad():
        return forward_mode(gru, x)


def per_sample_gradients(gru, x):
    def of_one(weights, sample):
        return functional_call(gru, weights, (sample,))[0].square().sum()

    weights = {name: p.detach() for name, p in gru.named_parameters()}
    return vmap(grad(of_one), in_dims=(None, 1))(weights, x)["weight_hh_l1"]


def batched_gradients(gru, x):
    x = x.clone().requires_grad_()
    y = gru(x)[0]
    directions = torch.stack([torch.ones_like(y), y.detach()])
    return torch.autograd.grad(y, x, directions, is_grads_batched=True)[0]


TRANSFORMS = {
    "second derivative by the input": second_through_the_input,
    "second derivative by a weight": second_through_a_weight,
    "gradient penalty": gradient_penalty,
    "forward mode by the input": forward_mode,
    "forward mode by the weights": lambda gru, x: forward_mode(gru, x, "weights"),
    "forward mode without gradients": forward_mode_without_gradients,
    "jvp": lambda gru, x: jvp(lambda a: gru(a)[0], (x,), (torch.ones_like(x),))[1],
    "func.grad": lambda gru, x: grad(lambda a: loss(gru, a))(x),
    "jacrev": lambda gru, x: jacrev(lambda a: gru(a)[0])(x),
    "hessian": lambda gru, x: hessian(lambda a: loss(gru, a))(x),
    "vmap": lambda gru, x: vmap(lambda a: gru(a)[0])(torch.stack([x, -x])),
    "per-sample gradients": per_sample_gradients,
    "batched gradients": batched_gradients,
}
# nn.GRU has no rule for vmap: what cannot be had from it is had from calls one by one.
ONE_BY_ONE = {
    "vmap": lambda gru, x: torch.stack([gru(x)[0], gru(-x)[0]]),
    "per-sample gradients": lambda gru, x: torch.stack(
        [torch.autograd.grad(gru(x[:, b])[0].square().sum(), gru.weight_hh_l1)[0] for b in range(BATCH)]
    ),
}


@pytest.mark.parametrize("backend", ["reference", "auto", "torch"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_right_where_nothing_is_fused(name, backend):
    gru, x = make(backend)
    theirs = torch.nn.GRU(INPUTS, HIDDEN, 2, bidirectional=True, dtype=x.dtype)
    theirs.load_state_dict(gru.state_dict())
    if name in ONE_BY_ONE:
        with pytest.raises(RuntimeError):
            TRANSFORMS[name](theirs, x)
    if (name, backend) == ("vmap", "torch"):
        with pytest.raises(RuntimeError):
            TRANSFORMS[name](gru, x)
        return
    expected = ONE_BY_ONE.get(name, TRANSFORMS[name])(theirs, x)
    assert expected.any()
    assert error(TRANSFORMS[name](gru, x), expected) < 1e-12


def of_packed(gru, x):
    packed = pack_padded_sequence(x, [1, 3], enforce_sorted=False)
    run, ones = (lambda data: gru(packed._replace(data=data))[0].data), torch.ones_like(packed.data)
    if gru.backend != "torch":
        return jvp(run, (packed.data,), (ones,))[1]
    # torch.func cannot enter ATen's, but forward mode can.
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(packed.data, ones))).tangent


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_packed_sequences(backend):
    assert error(of_packed(*make(backend)), of_packed(*make("torch"))) < 1e-12


@pytest.mark.parametrize("transform", [*TRANSFORMS.values(), of_packed], ids=[*TRANSFORMS, "packed"])
def test_refused_by_the_fused_kernels(transform, triton_device):
    with pytest.raises(RuntimeError, match=r'fused kernels.*backend="reference"'):
        transform(*make("triton", triton_device, torch.float32))


def test_a_tangent_elsewhere_does_not_matter(triton_device):
    gru, x = make("triton", triton_device, torch.float32)
    with forward_ad.dual_level(), torch.no_grad():
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))
        assert gru(x)[0].isfinite().all()


@pytest.mark.parametrize("name", ["jvp", "func.grad", "vmap"])
def test_compiled_together_with_the_transform(name, triton_device):
    def compiled(gru, x):
        torch._dynamo.reset()
        return torch.compile(lambda a: TRANSFORMS[name](gru, a), backend="eager", fullgraph=True)(x)

    assert error(compiled(*make("auto")), TRANSFORMS[name](*make("auto"))) < 1e-12
    with pytest.raises(torch._dynamo.exc.Unsupported, match='backend="reference"'):
        compiled(*make("triton", triton_device, torch.float32))


# torch 2.11 looks into what it was told is constant, and warns of a cache there.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_then_in_forward_mode(triton_device):
    gru, x = make("triton", triton_device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(gru, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        refused = pytest.raises(RuntimeError, match=r'no forward-mode derivative; .*backend="reference"')
        with forward_ad.dual_level(), refused:
            compiled(forward_ad.make_dual(x, torch.ones_like(x)))


# The inputs of PyTorch's own module tests for its GRU.
@pytest.mark.parametrize(
    ("bias", "batch_first", "layers", "batched", "given_state"),
    [
        *((True, True, 2, True, True), (True, True, 2, False, False), (False, False, 2, True, False)),
        *((False, False, 2, False, True), (True, False, 1, True, True), (True, False, 1, False, False)),
    ],
)
def test_gradcheck_to_second_order(bias, batch_first, layers, batched, given_state):
    torch.manual_seed(0)
    gru = BiGRU(2, 2, layers, bias, batch_first, backend="reference", dtype=torch.float64)
    names = list(dict(gru.named_parameters()))

    def run(x, *rest):
        hx, weights = (rest[0], rest[1:]) if given_state else (None, rest)
        return functional_call(gru, dict(zip(names, weights, strict=True)), (x, hx))

    x, hx = torch.randn(2, 3, 2), torch.randn(2 * layers, 2 if batch_first else 3, 2)
    tensors = [x, hx] if given_state else [x]
    tensors = [*(tensors if batched else (t[:, 0] for t in tensors)), *gru.parameters()]
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
