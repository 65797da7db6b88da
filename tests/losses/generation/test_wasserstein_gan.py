"""WGAN-GP against closed forms, difference quotients and the authors' formula, and where slopes are 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.losses import critic_loss, generator_loss, gradient_penalty


def _critic(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def _samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    return real.to(dtype), fake.to(dtype), torch.rand(6, generator=generator, dtype=torch.float64)


def test_penalty_equals_a_closed_form():
    """D(x) = x' A x / 2 has the gradient A x: norms by hand at each point."""
    real, fake, mix = _samples()
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]], dtype=torch.float64)
    found = gradient_penalty(
        lambda x: 0.5 * ((x @ matrix) * x).sum(1), real, fake, mix=mix, weight=2.0, reduction="none"
    )
    for b in range(6):
        point = [float(mix[b] * real[b, i] + (1 - mix[b]) * fake[b, i]) for i in range(3)]
        slope = [sum(float(matrix[i, j]) * point[j] for j in range(3)) for i in range(3)]
        assert float(found[b].detach()) == pytest.approx(
            2 * (sum(value**2 for value in slope) ** 0.5 - 1) ** 2, rel=1e-10
        )


def test_gradient_in_the_parameters_is_a_difference_quotient():
    """The double backward: what moves the parameters is the derivative of the penalty itself."""
    critic, (real, fake, mix) = _critic(), _samples()

    def penalty():
        return gradient_penalty(critic, real, fake, mix=mix)

    gradients = torch.autograd.grad(penalty(), list(critic.parameters())[:3])
    for parameter, gradient in zip(list(critic.parameters())[:3], gradients, strict=True):
        flat = parameter.data.view(-1)
        for k in range(0, flat.numel(), 5):
            before = float(flat[k])
            flat[k] = before + 1e-6
            above = float(penalty().detach())
            flat[k] = before - 1e-6
            below = float(penalty().detach())
            flat[k] = before
            assert float(gradient.view(-1)[k]) == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-7)


def test_gradgradcheck():
    real, fake, mix = _samples()
    weight = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def penalty(w):
        return gradient_penalty(lambda x: torch.tanh(x @ w).sum(1), real, fake, mix=mix, reduction="none")

    assert torch.autograd.gradcheck(penalty, (weight,))
    assert torch.autograd.gradgradcheck(penalty, (weight,))


def test_equals_the_authors_formula():
    """gan_toy.py: slopes = sqrt(sum of squares), mean of (slopes - 1)^2, times lambda, beside the two means."""
    critic, (real, fake, _) = _critic(), _samples()
    alpha = torch.rand(6, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    points = (alpha.double()[:, None] * real + (1 - alpha.double()[:, None]) * fake).requires_grad_()
    (slopes,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    cost = critic(fake).mean() - critic(real).mean() + 10 * ((slopes.pow(2).sum(1).sqrt() - 1) ** 2).mean()
    found = critic_loss(critic(real), critic(fake)) + gradient_penalty(
        critic, real, fake, generator=torch.Generator().manual_seed(7)
    )
    torch.testing.assert_close(found, cost)
    for left, right in zip(
        torch.autograd.grad(found, list(critic.parameters())[:3]),
        torch.autograd.grad(cost, list(critic.parameters())[:3]),
        strict=True,
    ):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(generator_loss(critic(fake)), -critic(fake).mean())


def test_samples_that_are_single_numbers():
    real, fake, mix = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 1.0])
    loss = gradient_penalty(torch.square, real, fake, mix=mix, weight=1.0, reduction="none")
    assert loss.tolist() == [1.0, 1.0]  # at 1: slope 2 in both


def test_a_flat_critic_has_a_finite_gradient():
    critic = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        critic[0].weight.zero_()
        critic[0].bias.fill_(-1)
    real, fake, mix = _samples(torch.float32)
    loss = gradient_penalty(critic, real, fake, mix=mix)
    loss.backward()
    assert float(loss.detach()) == 10
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())


def test_generator_decides_and_the_global_one_is_left_alone():
    critic, (real, fake, _) = _critic(), _samples()
    before = torch.get_rng_state()
    values = [
        float(gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(seed)).detach())
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1] != values[2]


def test_no_gradient_reaches_the_generator_and_evaluation_works_without_one():
    critic, (real, fake, mix) = _critic(), _samples()
    fake.requires_grad_()
    gradient_penalty(critic, real, fake, mix=mix).backward()
    assert fake.grad is None
    with torch.no_grad():
        assert gradient_penalty(critic, real, fake, mix=mix) > 0


def test_micro_batches_add_up():
    critic, (real, fake, mix) = _critic(), _samples()

    def gradients(rows, **options):
        loss = critic_loss(critic(real[rows]), critic(fake[rows]), **options)
        loss = loss.sum() + gradient_penalty(critic, real[rows], fake[rows], mix=mix[rows], **options)
        return torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)

    whole = gradients(slice(0, 6))
    parts = zip(gradients(slice(0, 2), denominator=6), gradients(slice(2, 6), denominator=6), strict=True)
    for left, (first, second) in zip(whole, parts, strict=True):
        torch.testing.assert_close(left, first + second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_in_float32_or_better(dtype):
    critic, (real, fake, mix) = _critic(dtype), _samples(dtype)
    assert gradient_penalty(critic, real, fake, mix=mix).dtype == torch.float32
    assert critic_loss(critic(real), critic(fake)).dtype == torch.float32
    assert generator_loss(critic(fake)).dtype == torch.float32
    empty = critic_loss(critic(real)[:0], critic(fake)[:0]) + gradient_penalty(critic, real[:0], fake[:0], mix=mix[:0])
    empty.backward()
    assert float(empty.detach()) == 0


def test_arguments_are_checked():
    critic, (real, fake, mix) = _critic(), _samples()
    with pytest.raises(UsageError, match=r"give it a torch\.Generator as generator"):
        gradient_penalty(critic, real, fake)
    with pytest.raises(UsageError, match="mix must hold a number for each sample"):
        gradient_penalty(critic, real, fake, mix=mix[:2])
    with pytest.raises(UsageError, match="of one shape"):
        gradient_penalty(critic, real, fake[:2], mix=mix)
    with pytest.raises(UsageError, match="one score for each sample"):
        gradient_penalty(lambda x: x.sum(), real, fake, mix=mix)
    with pytest.raises(UsageError, match="as many scores"):
        critic_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(UsageError, match="fake must be floating-point"):
        generator_loss(torch.zeros(2, dtype=torch.int64))
