"""Small convolutional networks on handwritten digits: orthogonal layers, recurrent stability, transfer learning."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose
from trimtab.layers.convolution.orthogonality import orthogonal_convolution_penalty
from trimtab.layers.convolution.stable_rank import StableRankNorm
from trimtab.layers.convolution.tune_mode import deploy_conv_bn, tune_conv_bn
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.workloads.workload import Data, workload

_DEPTH, _WIDTH = 10, 8
_BATCH = 32
_MODES = ("eval", "tune", "deploy")
_LARGEST = 30.0


def _digits() -> Data:
    return workload("digits-mlp").data


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    return to_scalar((logits.argmax(-1) == targets).double().mean())


class _Plain(nn.Module):
    """Convolutions with circular padding, without skips or normalisation; each sorts its channels in pairs."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1] + [_WIDTH] * _DEPTH
        self.layers = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, padding_mode="circular") for i in range(_DEPTH)
        )
        self.head = nn.Linear(_WIDTH * 64, 10)

    def hidden(self, pixels: Tensor) -> list[Tensor]:
        x, found = pixels.view(-1, 1, 8, 8), []
        for layer in self.layers:
            first, second = layer(x).chunk(2, dim=1)
            x = torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)
            found.append(x)
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.hidden(pixels)[-1].flatten(1))


def orthogonal(seed: int, *, penalty: float = 0.0, lr: float = 0.003, steps: int = 200) -> dict[str, float]:
    """Train a plain network of ten convolutions with `penalty` times the sum of L_orth, and return how it ends.

    `accuracy` is that on held-out digits, `singular_deviation` the mean |sigma - 1| of the square layers' operators on
    8 x 8 images and `largest_deviation` the largest, `gradient_drift` |log10| of the ratio of the loss gradient's norm
    at the first hidden feature to that at the last.

    Args:
        seed: of the initial weights and batches.
        penalty: coefficient of the sum of L_orth.
        lr: first learning rate.
        steps: how many.
    """
    data = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Plain()

    def loss_at(step: int) -> Tensor:
        index = minibatch(seed, step, _BATCH, len(data.train_inputs))
        loss = F.cross_entropy(model(data.train_inputs[index]), data.train_targets[index])
        return loss + penalty * orthogonal_convolution_penalty(model) if penalty else loss

    losses = fit(model.parameters(), loss_at, steps=steps, lr=lr)
    hidden = model.hidden(data.test_inputs)
    logits = model.head(hidden[-1].flatten(1))
    first, final = torch.autograd.grad(F.cross_entropy(logits, data.test_targets), [hidden[0], hidden[-1]])
    drift = abs(math.log10(max(to_scalar(first.norm()), 1e-30) / max(to_scalar(final.norm()), 1e-30)))
    finite = math.isfinite(losses[-1]) and math.isfinite(drift)
    kernels = [p for p in model.layers.parameters() if p.shape[:2] == (_WIDTH, _WIDTH)]
    deviations = torch.cat([_deviations(p) for p in kernels])
    return {
        "accuracy": _accuracy(logits, data.test_targets) if finite else 0.1,
        "singular_deviation": to_scalar(deviations.mean()) if finite else _LARGEST,
        "largest_deviation": to_scalar(deviations.max()) if finite else _LARGEST,
        "gradient_drift": drift if finite else _LARGEST,
    }


def _deviations(kernel: Tensor) -> Tensor:
    """Return |sigma - 1| of a square circular convolution on 8 x 8 images, from its blocks by frequency."""
    blocks = torch.fft.fft2(kernel.detach().double(), s=(8, 8)).permute(2, 3, 0, 1)
    if not bool(blocks.isfinite().all()):
        return torch.full((1,), math.inf)
    return (torch.linalg.svdvals(blocks) - 1).abs().flatten()


class _Denoiser(nn.Module):
    """A recurrent network for video: h = relu(conv(x) + conv(h)), y = conv(h)."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Conv2d(1, _WIDTH, 3, padding=1), nn.Conv2d(_WIDTH, 1, 3, padding=1)
        self.inner = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)

    def forward(self, frames: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs of frames [T, B, 1, 8, 8] and the last hidden state."""
        outputs = []
        for x in frames:
            h = F.relu(self.inlet(x) + (0 if h is None else self.inner(h)))
            outputs.append(self.outlet(h))
        return torch.stack(outputs), h  # type: ignore[return-value]


def recurrent(
    seed: int, *, alpha: float = 0.0, beta: float = 1.0, lr: float = 0.003, steps: int = 250, frames: int = 300
) -> dict[str, float]:
    """Train a recurrent denoiser on six frames, look for an input that makes it diverge, and return how far it goes.

    The diagnostic optimises ten frames so that the hidden state is as large as possible ten frames after them; ordinary
    frames follow. `growth` is log10 of the largest output in them, at least 0 and at most 30, `loss` the held-out
    squared error of the sixth frame, and `spectral_norm` that of the recurrent operator on circular 16 x 16 images.

    Args:
        seed: of the initial weights, batches, noise and the search.
        alpha: spectral norm that the recurrent convolution is given; 0 leaves it free.
        beta: bound of its stable rank.
        lr: first learning rate.
        steps: how many.
        frames: ordinary frames after the search.
    """
    data = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Denoiser()
    if alpha:
        norm = StableRankNorm(model.inner, alpha=alpha, beta=beta)
        nn.utils.parametrize.register_parametrization(model.inner, "weight", norm)

    def video(images: Tensor, length: int, noise_seed: int) -> tuple[Tensor, Tensor]:
        clean = images.view(1, -1, 1, 8, 8).expand(length, -1, -1, -1, -1)
        generator = torch.Generator().manual_seed(noise_seed)
        return clean + torch.randn(clean.shape, generator=generator), clean

    def loss_at(step: int) -> Tensor:
        index = minibatch(seed, step, _BATCH, len(data.train_inputs))
        noisy, clean = video(data.train_inputs[index], 6, seed * 1_000_003 + step)
        return F.mse_loss(_with_fixed_weight(model, noisy)[0][2:], clean[2:])

    losses = fit(model.parameters(), loss_at, steps=steps, lr=lr)
    model.eval()
    with torch.no_grad():
        noisy, clean = video(data.test_inputs[:128], 6, 0)
        error = to_scalar(F.mse_loss(model(noisy)[0][-1], clean[-1]))
        sigma = to_scalar(torch.linalg.svdvals(_blocks(model.inner.weight)).max())
    state = _search(model, seed)
    with torch.no_grad():
        ordinary, _ = video(data.test_inputs[:1], frames, 1)
        largest = to_scalar(model(ordinary, state)[0].abs().max())
    growth = min(max(math.log10(largest), 0.0), _LARGEST) if 0 < largest < math.inf else _LARGEST
    trained = math.isfinite(losses[-1]) and math.isfinite(error)
    return {
        "growth": growth if trained else _LARGEST,
        "loss": error if trained else losses[0],
        "spectral_norm": sigma if trained else _LARGEST,
        "diverged": float(growth > 3 or not trained),
    }


def _with_fixed_weight(model: _Denoiser, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's outputs; its weight is normalised once for all frames."""
    with nn.utils.parametrize.cached():
        return model(frames)


def _blocks(kernel: Tensor) -> Tensor:
    return torch.fft.fft2(kernel.detach().double(), s=(16, 16)).permute(2, 3, 0, 1)


def _search(model: _Denoiser, seed: int, length: int = 10, rounds: int = 30) -> Tensor:
    """Return the hidden state after frames in [-1, 1] that are optimised to make it large ten zero frames later."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(length, 1, 1, 8, 8, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.3)
    rest = torch.zeros(length, 1, 1, 8, 8)
    for _ in range(rounds):
        optimizer.zero_grad()
        (-_with_fixed_weight(model, torch.cat([free.tanh(), rest]))[1].square().sum().log()).backward()
        optimizer.step()
    with torch.no_grad():
        return model(torch.cat([free.tanh(), rest]))[1]


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bn3(self.conv3(x)))


def transfer(seed: int, *, mode: str = "eval", lr: float = 0.1, steps: int = 150) -> dict[str, float]:
    """Train a residual network on the digits 0 to 4, move it to 5 to 9 with frozen statistics, and return how it ends.

    Batch normalisation is in training mode at first; then SGD with momentum trains the network in one of three modes:
    `eval` (two modules), `tune` (folded on the fly) or `deploy` (merged for good). `loss` and `accuracy` are those on
    held-out images of 5 to 9, `saved_bytes` is what a forward of 64 images keeps for its backward.

    Args:
        seed: of the initial weights and batches.
        mode: `"eval"`, `"tune"` or `"deploy"`.
        lr: first learning rate of the second part.
        steps: of each part.
    """
    choose("mode", mode, _MODES)
    data = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [_Residual(1, _WIDTH), _Residual(_WIDTH, _WIDTH), _Residual(_WIDTH, 2 * _WIDTH)]
        body = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), blocks[0], nn.MaxPool2d(2), *blocks[1:])
        heads = [nn.Linear(2 * _WIDTH, 5), nn.Linear(2 * _WIDTH, 5)]

    def train(part: int, **options: float) -> list[float]:
        mask = (data.train_targets >= 5) == bool(part)
        inputs, targets = data.train_inputs[mask], data.train_targets[mask] - 5 * part

        def loss_at(step: int) -> Tensor:
            index = minibatch(seed, step + part * steps, _BATCH, len(inputs))
            return F.cross_entropy(heads[part](body(inputs[index]).mean((2, 3))), targets[index])

        return fit([*body.parameters(), *heads[part].parameters()], loss_at, steps=steps, **options)

    train(0, lr=0.01)
    body.eval()
    if mode != "eval":
        for block in blocks:
            for number in "123":
                tune_conv_bn(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
    if mode == "deploy":
        deploy_conv_bn(body)
    losses = train(1, lr=lr, momentum=0.9)
    chosen = data.test_targets >= 5
    logits = heads[1](body(data.test_inputs[chosen]).mean((2, 3)))
    loss = to_scalar(F.cross_entropy(logits, data.test_targets[chosen] - 5))
    finite = math.isfinite(losses[-1]) and math.isfinite(loss)
    return {
        "loss": min(loss, math.log(5)) if finite else math.log(5),
        "accuracy": _accuracy(logits, data.test_targets[chosen] - 5) if finite else 0.2,
        "saved_bytes": float(_saved_bytes(body, data.train_inputs[:64])),
    }


def _saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Return the bytes that a forward keeps for its backward, each storage once and parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs)
    return sum(size for pointer, size in kept.items() if pointer not in parameters)
