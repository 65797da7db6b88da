"""Tune mode against Eval mode, closed-form gradients and torch's own pass, in a residual network built here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers.convolution.tune_mode import deploy_conv_bn, tune_conv_bn
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Torchvision's layout; `dynamic` puts a branch on data into the forward, which torch.fx cannot follow."""

    def __init__(self, dynamic=False):
        super().__init__()
        self.dynamic = dynamic
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 4, 1)), nn.Sequential(Block(4, 8, 2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if self.dynamic and x.sum() > 1e9:
            return x
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


PAIRS = {"conv1": "bn1"}
for _layer in ("layer1.0.", "layer2.0."):
    PAIRS |= {f"{_layer}conv1": f"{_layer}bn1", f"{_layer}conv2": f"{_layer}bn2"}
PAIRS["layer2.0.downsample.0"] = "layer2.0.downsample.1"


def _trained(model, seed=0):
    """Return the model in evaluation mode, with statistics and affine maps that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.1 + 2 * torch.rand(module.num_features, generator=generator))
            if module.affine:
                module.weight.data.copy_(torch.randn(module.num_features, generator=generator))
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def _images(samples=4, dtype=torch.float32):
    return torch.randn(samples, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


class TestResNet(LayerTestCase):
    def layer(self):
        model = _trained(ResNet())
        apply(model, "tune-mode")
        return model

    def inputs(self, samples):
        return (_images(samples),)


def _gradients(model, x):
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), found, x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_eval_mode(dtype):
    """The output and every gradient, of convolutions, gamma and beta, and of the input."""
    model = _trained(ResNet()).to(dtype)
    state = list(model.state_dict())
    expected = _gradients(model, _images(dtype=dtype))
    changes = apply(model, "tune-mode").changes
    assert changes.keys() == PAIRS.keys() | set(PAIRS.values())
    model.train()  # frozen: statistics stay
    found = _gradients(model, _images(dtype=dtype))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert list(model.state_dict()) == state


def test_gradient_is_closed_form():
    """For y = gamma (w x + b - mu) r + beta, r = 1 / sqrt(var + eps), on one pixel and one channel."""
    conv, norm = nn.Conv2d(1, 1, 1, dtype=torch.float64), nn.BatchNorm2d(1, dtype=torch.float64)
    _trained(norm)
    tune_conv_bn(conv, norm)
    x = torch.tensor([[[[0.7]]]], dtype=torch.float64, requires_grad=True)
    y = norm(conv(x))
    y.backward()
    w, b, gamma, beta = (float(p.detach()) for p in (conv.weight, conv.bias, norm.weight, norm.bias))
    mu, r = float(norm.running_mean), float(norm.running_var + norm.eps) ** -0.5
    assert float(y.detach()) == pytest.approx(gamma * (w * 0.7 + b - mu) * r + beta)
    assert float(conv.weight.grad) == pytest.approx(gamma * 0.7 * r)
    assert float(conv.bias.grad) == pytest.approx(gamma * r)
    assert float(norm.weight.grad) == pytest.approx((w * 0.7 + b - mu) * r)
    assert float(norm.bias.grad) == pytest.approx(1)
    assert float(x.grad) == pytest.approx(gamma * w * r)


KINDS = [
    (nn.Conv1d, nn.BatchNorm1d, 1, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, nn.BatchNorm2d, 2, {"groups": 2, "dilation": 2}),
    (nn.Conv3d, nn.BatchNorm3d, 3, {"padding": "same"}),
    (nn.ConvTranspose1d, nn.BatchNorm1d, 1, {"stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, nn.BatchNorm2d, 2, {"groups": 2, "stride": 2}),
    (nn.ConvTranspose3d, nn.BatchNorm3d, 3, {}),
]


@pytest.mark.parametrize(("conv", "norm", "dims", "options"), KINDS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_every_kind_of_convolution(conv, norm, dims, options, bias, affine):
    pair = nn.Sequential(conv(4, 6, 3, bias=bias, **options), norm(6, affine=affine)).double()
    _trained(pair)
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = _gradients(pair, x)
    assert apply(pair, "tune-mode").changes.keys() == {"0", "1"}
    torch.testing.assert_close(_gradients(pair, x), expected, rtol=1e-9, atol=1e-12)
    deploy_conv_bn(pair)
    assert [type(part) for part in pair] == [conv, nn.Identity]
    torch.testing.assert_close(pair(x), expected[0])


def test_equals_inductors():
    """torch's own implementation of the paper, on the same modules."""
    inductor = pytest.importorskip("torch._inductor.fx_passes.efficient_conv_bn_eval")
    model = _trained(nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)))
    expected = inductor.efficient_conv_bn_eval(model[1], model[0], _images())
    apply(model, "tune-mode")
    torch.testing.assert_close(model(_images()), expected, rtol=1e-6, atol=1e-6)


def _saved_bytes(model):
    """Return the bytes of feature maps that a forward keeps for its backward; parameters do not count."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.dim() == 4 and len(tensor) == 16:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(_images(16))
    assert output.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_saves_less_for_the_backward():
    """The maps between convolutions and their normalisations are gone: here all maps but the input and the sums."""
    model = _trained(ResNet())
    before = _saved_bytes(model)
    apply(model, "tune-mode")
    between = 4 * 16 * (3 * 4 * 64 + 3 * 8 * 16)  # six convolutions' outputs, in bytes
    assert before - _saved_bytes(model) == between


def test_train_mode_is_itself():
    """Without freeze, a model in training mode normalises by its batch and updates its statistics as before."""
    plain, model = _trained(ResNet()), _trained(ResNet())
    model.load_state_dict(plain.state_dict())
    apply(model, "tune-mode", freeze=False)
    torch.testing.assert_close(model.train()(_images()), plain.train()(_images()))
    for (name, left), right in zip(plain.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
    torch.testing.assert_close(model.eval()(_images()), plain.eval()(_images()), rtol=1e-4, atol=1e-5)


def test_children_of_a_model_that_cannot_be_traced():
    model = _trained(ResNet(dynamic=True))
    expected = model(_images())
    changes = apply(model, "tune-mode").changes
    inside = {name: norm for name, norm in PAIRS.items() if name != "conv1"}
    assert changes.keys() == inside.keys() | set(inside.values())
    apply(model, "tune-mode", pairs=[("conv1", "bn1")])
    torch.testing.assert_close(model(_images()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no convolution directly followed"):
        apply(model, "tune-mode")


def test_only_safe_pairs_are_changed():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.used_twice, self.a, self.b = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            self.read, self.c = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.plain, self.d = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)
            self.sized, self.e = nn.ConvTranspose2d(2, 2, 3, stride=2), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.b(self.used_twice(self.a(self.used_twice(x))))
            x = self.read(x)
            x = self.e(self.sized(x, output_size=(8, 8)))
            return self.d(self.plain(x + self.c(x)))

    with pytest.raises(UsageError, match="no convolution directly followed"):
        apply(Shared(), "tune-mode")


def test_remove_restores_the_modules():
    model = _trained(ResNet())
    kinds, expected = [type(part) for part in model.modules()], model(_images())
    apply(model, "tune-mode")
    copied = copy.deepcopy(model)
    assert copied.conv1._norm[0] is copied.bn1
    assert remove(model, "tune-mode").changes.keys() == PAIRS.keys()
    assert [type(part) for part in model.modules()] == kinds
    assert model.train().bn1.training
    assert torch.equal(model.eval()(_images()), expected)


def test_remove_restores_the_mode():
    model = _trained(ResNet()).train()
    model.layer1[0].bn1.eval()
    modes = [part.training for part in model.modules()]
    apply(model, "tune-mode")
    assert not model.bn1.training
    remove(model, "tune-mode")
    assert [part.training for part in model.modules()] == modes
    apply(model, "tune-mode")
    model.eval()
    remove(model, "tune-mode")
    assert not any(part.training for part in model.modules())


def test_a_norm_of_two_names_is_merged_under_both():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.alias = self.norm
            self.last = None

        def forward(self, x):
            self.last = x
            return self.alias(self.conv(x))

    model = Named().eval()
    nn.init.uniform_(model.norm.running_var, 2.0, 3.0)
    expected = model(_images())
    apply(model, "tune-mode")
    assert isinstance(model.last, torch.Tensor)  # nothing of torch.fx is left behind
    deploy_conv_bn(model)
    torch.testing.assert_close(model(_images()), expected, rtol=1e-4, atol=1e-5)


def test_pairs_that_share_a_module_change_nothing():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    with pytest.raises(UsageError, match="a module is in two pairs"):
        apply(model, "tune-mode", pairs=[("0", "1"), ("0", "2")])
    assert [type(part) for part in model] == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]


def test_deploy_has_the_same_function_and_other_gradients():
    model = _trained(ResNet())
    expected, gradients, _ = _gradients(model, _images())
    apply(model, "tune-mode")
    changes = deploy_conv_bn(model)
    assert changes.keys() == PAIRS.keys() | set(PAIRS.values())
    output, deployed, _ = _gradients(model, _images())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    # d loss / d W = d loss / d W' * gamma / sqrt(var + eps)
    norm = _trained(ResNet()).bn1
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    torch.testing.assert_close(deployed["conv1.weight"] * scale, gradients["conv1.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tune_conv_bn(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(3)), "a batch normalisation of its channels"),
        (lambda: tune_conv_bn(nn.Linear(1, 2), nn.BatchNorm1d(2)), "got Linear and BatchNorm1d"),
        (lambda: deploy_conv_bn(nn.Linear(1, 1)), "nothing in Linear is in Tune mode"),
        (lambda: apply(ResNet(), "tune-mode", pairs=[("conv9", "bn1")]), "there is no module 'conv9'"),
        (lambda: remove(ResNet(), "tune-mode"), "not applied"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()
