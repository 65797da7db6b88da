from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.workloads import Settings, workload, workloads
from trimtab.workloads.workload import evaluating

NAMES = (
    "digits-cnn",
    "digits-mlp",
    "digits-vit",
    "lm-medium",
    "lm-small",
    "lm-zipf",
    "modadd",
    "modadd-nodecay",
    "regression",
    "tabular",
)


def test_every_workload_is_listed_by_name() -> None:
    assert tuple(job.name for job in workloads()) == NAMES


def test_unknown_workload_is_one_line() -> None:
    with pytest.raises(UsageError, match="Did you mean 'lm-small'"):
        workload("lm-smal")


@pytest.mark.parametrize("name", NAMES)
class TestEveryWorkload:
    def test_defaults_say_where_they_come_from(self, name: str) -> None:
        job = workload(name)
        assert job.summary
        assert {"lr", "steps"} & set(job.sources)
        assert set(job.sources) <= set(Settings.model_fields)

    def test_initialisation_is_a_pure_function_of_the_seed(self, name: str) -> None:
        job = workload(name)
        before = torch.get_rng_state()
        first, again, other = job.model(3), job.model(3), job.model(4)
        assert torch.equal(before, torch.get_rng_state())
        same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
        assert all(same)
        assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))

    def test_batches_are_a_pure_function_of_seed_and_step(self, name: str) -> None:
        job, other = workload(name), workload(name)
        size = job.defaults.batch_size
        before = torch.get_rng_state()
        for step in (7, 0, 123, 7):
            inputs, targets = job.batch(5, step, size)
            torch.rand(1)  # what happens in between does not matter
            again = other.batch(5, step, size)
            assert torch.equal(inputs, again[0])
            assert torch.equal(targets, again[1])
        torch.set_rng_state(before)
        if size:
            assert len(inputs) == size
            assert not torch.equal(inputs, job.batch(5, 8, size)[0])
            assert not torch.equal(inputs, job.batch(6, 7, size)[0])

    def test_an_epoch_shows_each_sample_at_most_once(self, name: str) -> None:
        job = workload(name)
        data = job.data
        marked = torch.arange(len(data.train_inputs))
        job._data = type(data)(marked, marked, data.test_inputs, data.test_targets, "marked")
        size = 64
        batches = len(marked) // size
        for epoch in range(2):
            seen = torch.cat([job.batch(0, epoch * batches + place, size)[0] for place in range(min(batches, 30))])
            assert len(seen.unique()) == len(seen)

    def test_evaluation_is_pure(self, name: str) -> None:
        job = workload(name)
        model = job.model(0).train()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eval()  # a mode of its own, that must survive
        modes = [module.training for module in model.modules()]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        before = torch.get_rng_state()
        first, second = job.evaluate(model), job.evaluate(model)
        assert first == second
        assert first["loss"] > 0
        assert torch.equal(before, torch.get_rng_state())
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_too_large_a_batch_is_one_line(self, name: str) -> None:
        job = workload(name)
        with pytest.raises(UsageError, match=r"exceeds the \d+ training samples"):
            job.batch(0, 0, 10**8)


@pytest.mark.parametrize(("name", "count"), [("lm-small", 218_240), ("lm-medium", 837_888)])
def test_language_models_have_their_size_and_a_tied_head(name: str, count: int) -> None:
    model = workload(name).model(0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.head.weight is model.embedding.weight


def test_language_model_is_causal() -> None:
    model = workload("lm-small").model(0)
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 40:] = 7
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-3)


def test_attention_equals_the_written_out_formula() -> None:
    """q, k and v are thirds of `qkv` by the layout (3, heads, width of a head)."""
    attention = workload("lm-small").model(0).blocks[0].attention.double()
    x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    qkv = x @ attention.qkv.weight.double().T
    expected = torch.zeros_like(x)
    for head in range(4):
        q, k, v = (qkv[..., 64 * part + 16 * head : 64 * part + 16 * (head + 1)] for part in range(3))
        scores = q @ k.transpose(1, 2) / 4.0
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        expected[..., 16 * head : 16 * (head + 1)] = scores.softmax(-1) @ v
    assert torch.allclose(attention(x), expected @ attention.proj.weight.T)


def test_vision_transformer_sees_patches_of_neighbouring_pixels() -> None:
    model = workload("digits-vit").model(0)
    seen: list[torch.Tensor] = []
    model.patch.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.arange(64.0).view(8, 8)
    model(image.view(1, 64))
    assert torch.equal(seen[0][0, 5], image[2:4, 2:4].flatten())


def test_targets_of_a_language_model_are_the_next_bytes(tmp_path: Path) -> None:
    text = bytes(range(256)) * 20
    (tmp_path / "text").write_bytes(text)
    job = workload("lm-small")
    data = job.prepare(tmp_path / "text")
    cut = int(0.9 * len(text))
    assert bytes(data.train_inputs.flatten()) == text[: data.train_inputs.numel()]
    assert bytes(data.train_targets.flatten()) == text[1 : data.train_inputs.numel() + 1]
    assert bytes(data.test_inputs.flatten()) == text[cut : cut + data.test_inputs.numel()]
    assert job.batch(0, 0, 4)[0].dtype == torch.int64


def test_text_of_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name, byte in (("b.txt", b"b"), ("a/z.txt", b"a"), (".git/c.txt", b"c")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(byte * 1000)
    data = workload("lm-small").prepare(tmp_path)
    assert bytes(data.train_inputs.flatten()[:1000]) == b"a" * 1000
    assert set(bytes(data.train_inputs.flatten()) + bytes(data.test_inputs.flatten())) == {ord("a"), ord("b")}


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 600])
def test_too_short_a_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match="too few for windows of 64: give at least 650"):
        workload("lm-small").prepare(tmp_path / "text")
    (tmp_path / "text").write_bytes(b"x" * 650)
    workload("lm-small").prepare(tmp_path / "text")


def test_missing_text_and_text_for_others_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        workload("lm-small").prepare(tmp_path / "nothing")
    with pytest.raises(UsageError, match="takes no text"):
        workload("digits-mlp").prepare(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        workload("lm-small").prepare("/proc/self/mem")


def test_fingerprint_depends_on_every_part() -> None:
    data = workload("tabular").data
    assert len(data.sha256) == len(hashlib.sha256().hexdigest())
    parts = [data.train_inputs, data.train_targets, data.test_inputs, data.test_targets]
    for place, part in enumerate(parts):
        changed = part.clone()
        changed.view(-1)[-1] += 1
        other = type(data)(*parts[:place], changed, *parts[place + 1 :], data.source)
        assert other.sha256 != data.sha256


def test_splits_do_not_overlap_and_modadd_knows_its_sums() -> None:
    data = workload("modadd").data
    assert len(data.train_inputs) == int(0.4 * 97 * 97)
    both = torch.cat([data.train_inputs, data.test_inputs])
    assert len(both.unique(dim=0)) == 97 * 97
    assert torch.equal((both[:, 0] + both[:, 1]) % 97, torch.cat([data.train_targets, data.test_targets]))


def test_tables_are_standardised_by_the_training_part_only() -> None:
    for name in ("tabular", "regression"):
        data = workload(name).data
        assert torch.allclose(data.train_inputs.mean(0), torch.zeros(1), atol=1e-5)
        assert torch.allclose(data.train_inputs.std(0), torch.ones(1), atol=1e-5)
        assert not torch.allclose(data.test_inputs.mean(0), torch.zeros(1), atol=1e-2)


def test_evaluating_restores_modes_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[1].eval()

    def fail() -> None:
        with evaluating(model):
            assert not model[0].training
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
