"""Each probe's numbers against their definition, computed by hand in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from trimtab.record import Run
from trimtab.testing.probe import ProbeTestCase
from trimtab.watch import Watch
from trimtab.watch.norms import l2_norms
from trimtab.watch.probes import Activations, Gradients, Logits, Units, Updates


def values(probe) -> dict[str, dict[str, float]]:
    return {
        name: dict(zip(labels or ("",), entries.flatten().tolist(), strict=True))
        for name, labels, entries in probe.read()
    }


class TestGradients(ProbeTestCase):
    def probe(self):
        return Gradients()

    def test_norms_are_taken_before_clipping(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Watch(model, optimizer, to=tmp_path) as watch:
            loss = 50 * model(torch.ones(2, 3)).square().sum()
            loss.backward()
            expected = [
                math.sqrt(sum(float(p.grad.double().square().sum()) for p in layer.parameters())) for layer in model
            ]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
        total = math.hypot(*expected)
        with Run(tmp_path) as run:
            by_module = run.series("grad_norm_by_module")
            assert by_module.labels == ("0", "1")
            np.testing.assert_allclose(by_module.values[0], expected, rtol=1e-5)
            assert run.series("grad_norm").flat[0] == pytest.approx(total, rel=1e-5)
            assert run.series("grad_clip").flat[0] == pytest.approx(0.5 / total, rel=1e-4)
            assert run.series("lr").flat.tolist() == [0.1]

    def test_gradients_below_the_limit_are_not_clipped(self, tmp_path):
        model = nn.Linear(3, 2)
        with Watch(model, to=tmp_path) as watch:
            model(torch.ones(1, 3)).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            watch.step()
        with Run(tmp_path) as run:
            assert run.series("grad_clip").flat.tolist() == [1.0]

    def test_a_parameter_without_gradient_counts_as_zero(self, tmp_path):
        model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Watch(model, optimizer, to=tmp_path) as watch:
            model["used"](torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watch.step()
        with Run(tmp_path) as run:
            np.testing.assert_allclose(run.series("grad_norm_by_module").values[0], [math.sqrt(3), 0.0], rtol=1e-6)
            assert "loss" not in run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_l2_norms_do_not_overflow(dtype):
    tensors = [torch.full((300,), 200.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype), torch.zeros(0, dtype=dtype)]
    expected = [200.0 * math.sqrt(300), 3.0, 0.0]
    np.testing.assert_allclose([float(norm) for norm in l2_norms(tensors)], expected, rtol=1e-5)


def test_l2_norms_of_sparse_gradients():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    assert float(l2_norms([embedding.weight.grad])[0]) == pytest.approx(math.sqrt(2 * 4 + 2))


class TestUpdates(ProbeTestCase):
    def probe(self):
        return Updates()

    def test_one_step_of_gradient_descent(self, tmp_path):
        model = nn.Linear(3, 2)
        start = [p.detach().double().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        with Watch(model, optimizer, to=tmp_path, every=1, probes=[Updates()]) as watch:
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            gradient = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
            optimizer.step()
            watch.step(loss)
        weight = math.sqrt(sum(float(p.square().sum()) for p in start))
        with Run(tmp_path) as run:
            assert run.series("update_norm").flat[0] == pytest.approx(0.25 * gradient, rel=1e-5)
            assert run.series("weight_norm").flat[0] == pytest.approx(weight, rel=1e-6)
            assert run.series("update_ratio_by_module").flat[0] == pytest.approx(0.25 * gradient / weight, rel=1e-5)

    def test_several_optimizers_make_one_update(self, tmp_path):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
        with Watch(model, optimizers, to=tmp_path, every=1) as watch:
            model(torch.ones(1, 2)).sum().backward()
            expected = [0.1 * float(layer.weight.grad.norm()) for layer in model]
            for optimizer in optimizers:
                optimizer.step()
            watch.step()
        with Run(tmp_path) as run:
            np.testing.assert_allclose(run.series("update_norm_by_module").values[0], expected, rtol=1e-4)


class TestActivations(ProbeTestCase):
    def probe(self):
        return Activations()

    def test_moments(self):
        x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        x[7, 3] = -40.0
        probe = Activations()
        probe.on_output("m", x)
        seen, x = values(probe), x.double()
        assert seen["activation_rms"]["m"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
        assert seen["activation_max"]["m"] == 40.0
        assert seen["activation_kurtosis"]["m"] == pytest.approx(
            float((x**4).mean() / x.square().mean() ** 2), rel=1e-5
        )

    def test_the_largest_value_is_found_outside_the_sample(self):
        x = torch.zeros(4000, 64)
        x[1, 5] = 9.0
        x[::2] = 1.0
        probe = Activations()
        probe.on_output("m", x)
        assert values(probe)["activation_max"]["m"] == 9.0

    def test_gaussian_kurtosis_is_three(self):
        probe = Activations()
        probe.on_output("m", torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)))
        assert values(probe)["activation_kurtosis"]["m"] == pytest.approx(3.0, abs=0.1)


class TestUnits(ProbeTestCase):
    def probe(self):
        return Units()

    def test_dead_units_of_rows_and_of_images(self):
        rows = torch.relu(torch.tensor([[1.0, -1.0, -1.0, 2.0], [-1.0, -1.0, 3.0, 2.0]]))
        images = torch.ones(2, 4, 3, 3)
        images[:, 1] = 0
        images[0, 2] = 0
        probe = Units()
        probe.on_activation("rows", "relu", rows)
        probe.on_activation("images", "relu", images)
        assert values(probe)["dead_fraction"] == {"rows": 0.25, "images": 0.25}

    def test_saturation(self):
        probe = Units()
        probe.on_activation("t", "tanh", torch.tanh(torch.tensor([0.0, 1.0, 3.0, -5.0])))
        probe.on_activation("s", "sigmoid", torch.sigmoid(torch.tensor([0.0, 1.0, 5.0, -5.0, 4.0])))
        seen = values(probe)["saturated_fraction"]
        assert seen == pytest.approx({"t": 0.5, "s": 0.4})

    @pytest.mark.parametrize("call", [torch.relu, functional.relu, nn.ReLU(), torch.Tensor.relu])
    def test_functions_are_seen_however_they_are_called(self, call, tmp_path):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(2, 2)

            def forward(self, x):
                return call(self.inner(x) - 100.0).sum()

        model = nn.Sequential(Net())
        with Watch(model, to=tmp_path) as watch:
            loss = model(torch.randn(4, 2))
            loss.backward()
            watch.step(loss)
        with Run(tmp_path) as run:
            assert run.series("dead_fraction").flat.tolist() == [1.0]


class TestLogits(ProbeTestCase):
    def probe(self):
        return Logits()

    def test_definitions(self):
        logits = torch.tensor([[2.0, 0.0, -1.0], [200.0, 0.0, 0.0], [0.0, 300.0, 0.0]])
        probe = Logits()
        probe.on_classification(logits, torch.tensor([0, 0, 2]))
        seen = values(probe)
        log_z = [math.log(math.exp(2) + 1 + math.exp(-1)), 200.0, 300.0]
        assert seen["logits_abs_log_z"][""] == pytest.approx(sum(log_z) / 3, rel=1e-6)
        assert seen["logits_max"][""] == 300.0
        # The second sample has collapsed; the third is as large but wrong, so its loss is not zero.
        assert seen["zero_loss_fraction"][""] == pytest.approx(1 / 3)
        assert seen["train_accuracy"][""] == pytest.approx(2 / 3)

    def test_collapse_depends_on_the_precision_of_the_logits(self):
        logits, targets = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
        probe = Logits()
        probe.on_classification(logits, targets)
        assert values(probe)["zero_loss_fraction"][""] == 1.0
        probe.on_classification(logits.double(), targets)
        assert values(probe)["zero_loss_fraction"][""] == 0.0

    @pytest.mark.parametrize("layout", ["flat", "images", "ignored", "module", "keywords"])
    def test_cross_entropy_is_seen_however_it_is_called(self, layout, tmp_path):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        x, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        with Watch(model, to=tmp_path) as watch:
            logits = model(x)
            expected = logits.detach().logsumexp(-1).abs()
            if layout == "flat":
                loss = functional.cross_entropy(logits, targets)
            elif layout == "keywords":
                loss = functional.cross_entropy(input=logits, target=targets)
            elif layout == "module":
                loss = nn.CrossEntropyLoss()(logits, targets)
            elif layout == "images":
                loss = functional.cross_entropy(logits.view(2, 3, 3).transpose(1, 2), targets.view(2, 3))
            else:
                targets[:2] = -100
                expected = expected[2:]
                loss = functional.cross_entropy(logits, targets)
            loss.backward()
            watch.step(loss)
        with Run(tmp_path) as run:
            assert run.series("logits_abs_log_z").flat[0] == pytest.approx(float(expected.mean()), rel=1e-5)
            assert run.meta["n_classes"] == 3

    def test_evaluation_is_not_mistaken_for_training(self, tmp_path):
        model = nn.Linear(4, 3)
        with Watch(model, to=tmp_path) as watch:
            with torch.no_grad():
                functional.cross_entropy(model(torch.randn(6, 4)), torch.zeros(6, dtype=torch.long))
            watch.step(1.0)
        with Run(tmp_path) as run:
            assert "logits_max" not in run
