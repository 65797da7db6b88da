"""Preference losses against TRL's trainers, in float64: their methods are run, on scores and on a model's logits.

Optional: TRL 0.28.0 (with transformers 4.57) for all but the tests of the current DPOTrainer, which are for 1.16.0
(with transformers 5). From 0.29 on `DPOTrainer.dpo_loss` is gone; tests for what a version lacks are skipped.
"""

from __future__ import annotations

import collections
import importlib
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch

from trimtab.losses import (
    cpo_loss,
    dno_loss,
    dpo_loss,
    ipo_loss,
    iterative_rpo_loss,
    kto_loss,
    robust_dpo_loss,
    rpo_loss,
    sequence_log_probs,
    simpo_loss,
)

TRL = pytest.importorskip("trl")
_WHOLE = "get_batch_loss_metrics"


def _trainer(name, method, **state):
    """A trainer of TRL without its __init__, which would want a model, a tokenizer and data."""
    kind = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in (f"trl.experimental.{name[:3].lower()}", "trl"):
            try:
                kind = getattr(importlib.import_module(place), name)
                break
            except (ImportError, AttributeError, RuntimeError):
                continue
    if not hasattr(kind, method):
        pytest.skip(f"trl {TRL.__version__} has no {name}.{method} that can be imported")
    trainer = kind.__new__(kind)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    vars(trainer).update(accelerator=accelerator, aux_loss_enabled=False, is_encoder_decoder=False, pad_token_id=0)
    vars(trainer).update(state)
    return trainer


def _dpo(method="dpo_loss", kind="sigmoid", **state):
    args = SimpleNamespace(rpo_alpha=None, ld_alpha=None, use_liger_loss=False, use_liger_kernel=False)
    vars(args).update({name: state.pop(name) for name in list(state) if name == "rpo_alpha"})
    common = {"reference_free": False, "f_divergence_type": "reverse_kl", "f_divergence_params": None}
    whole = dict.fromkeys(("use_logits_to_keep", "padding_free", "use_weighting"), False)
    options = {"beta": 0.1, "label_smoothing": 0.0, "max_length": None, "loss_weights": None, **state}
    return _trainer("DPOTrainer", method, args=args, loss_type=[kind], **common, **whole, **options)


def _cpo(method="cpo_loss", kind="sigmoid", **state):
    options = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "alpha": 0.0, **state}
    return _trainer("CPOTrainer", method, loss_type=kind, label_pad_token_id=-100, padding_value=0, **options)


def _scores(count=4, pairs=9, seed=0):
    values = -8 + 4 * torch.randn(count, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(values)


def _same(ours, theirs, inputs):
    """Values and gradients agree, the latter for a cotangent that is different at each entry."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(0.5, 2, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    found, expected = (torch.autograd.grad((weight * loss).sum(), inputs, retain_graph=True) for loss in (ours, theirs))
    for mine, peer in zip(found, expected, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, peer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("kind", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, lambda *x, beta: dpo_loss(*x, beta=beta, reduction="none")),
        ("sigmoid", 0.0, lambda *x, beta: dno_loss(*x, eta=beta, reduction="none")),
        ("sigmoid", 0.2, lambda *x, beta: dpo_loss(*x, beta=beta, label_smoothing=0.2, reduction="none")),
        ("robust", 0.2, lambda *x, beta: robust_dpo_loss(*x, beta=beta, flip_rate=0.2, reduction="none")),
        ("robust", 0.0, lambda *x, beta: robust_dpo_loss(*x, beta=beta, flip_rate=0.0, reduction="none")),
        ("ipo", 0.0, lambda *x, beta: ipo_loss(*x, tau=beta, reduction="none")),
    ],
    ids=["dpo", "dno", "conservative", "robust", "robust-0", "ipo"],
)
def test_losses_of_scores_equal_dpo_trainer(kind, smoothing, loss, beta):
    inputs = [x.requires_grad_() for x in _scores()]
    theirs = _dpo(kind=kind, beta=beta, label_smoothing=smoothing).dpo_loss(*inputs, kind)[0]
    _same(loss(*inputs, beta=beta), theirs, inputs)


@pytest.mark.parametrize("shift", [-30.0, 30.0], ids=["kl-clamped", "kl-positive"])
def test_kto_equals_kto_trainer(shift):
    """TRL sorts chosen before rejected, and clamps the mean over mismatched pairs at 0 without gradient."""
    policy, ref = (x.requires_grad_() for x in _scores(2))
    kl_policy, kl_ref = (x.requires_grad_() for x in _scores(2, seed=1))
    desirable = torch.arange(9) % 3 != 1
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    trainer = _trainer("KTOTrainer", "kto_loss", beta=0.3, loss_type="kto", calculate_KL=True, **weights)
    theirs, *_, kl = trainer.kto_loss(
        policy[desirable], policy[~desirable], kl_policy + shift, ref[desirable], ref[~desirable], kl_ref
    )
    assert (kl == 0) == (shift < 0)
    point = (kl_policy + shift - kl_ref).mean()
    ours = kto_loss(policy, ref, desirable, kl=point, beta=0.3, reduction="none", **weights)
    _same(torch.cat([ours[desirable], ours[~desirable]]), theirs, [policy, ref])
    assert all(x is None for x in torch.autograd.grad(ours.sum(), [kl_policy, kl_ref], allow_unused=True))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_cpo_and_simpo_equal_cpo_trainer_on_scores(beta):
    inputs = [x.requires_grad_() for x in _scores(2)]
    theirs = _cpo(beta=beta).cpo_loss(*inputs)[0]
    _same(cpo_loss(*inputs, beta=beta, nll_weight=0, reduction="none"), theirs, inputs)
    # TRL gives `cpo_loss` means over tokens here: sums over lengths of 1 are such means.
    one = {"chosen_lengths": torch.ones(9), "rejected_lengths": torch.ones(9)}
    theirs = _cpo(kind="simpo", beta=beta, simpo_gamma=0.8).cpo_loss(*inputs)[0]
    _same(simpo_loss(*inputs, beta=beta, gamma=0.8, reduction="none", **one), theirs, inputs)


class _Bigrams(torch.nn.Module):
    """Logits of the next token, from the one before."""

    def __init__(self, classes=11, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(classes, classes, dtype=torch.float64, generator=generator))

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.table[input_ids])


_PROMPT, _CHOSEN, _REJECTED = [2, 2, 2], [6, 3, 1], [4, 5, 2]


def _tokens(lengths, low, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(low, 11, (length,), generator=generator) for length in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)


def _batch(low=1):
    """Three pairs of unequal lengths; `low` 1 has no token 0."""
    prompt, chosen, rejected = (
        _tokens(lengths, low, seed) for seed, lengths in enumerate([_PROMPT, _CHOSEN, _REJECTED])
    )
    batch = {"prompt_input_ids": prompt[0], "prompt_attention_mask": prompt[1]}
    for name, (ids, mask) in {"chosen": chosen, "rejected": rejected}.items():
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
    return batch


def _sequences(batch, side):
    """Prompt and response in one, with labels that leave out the prompt, as CPOTrainer's collator gives them."""
    ids = torch.cat([batch["prompt_input_ids"], batch[f"{side}_input_ids"]], 1)
    mask = torch.cat([batch["prompt_attention_mask"], batch[f"{side}_attention_mask"]], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : batch["prompt_input_ids"].shape[1]] = -100
    return ids, mask, labels


def _scored(model, batch):
    """Sums of log-probabilities and lengths of both sides, as trimtab counts them."""
    sums, lengths = [], []
    for side in ("chosen", "rejected"):
        ids, _, labels = _sequences(batch, side)
        scores = sequence_log_probs(model(ids).logits[:, :-1], labels[:, 1:])
        sums.append(scores.log_probs)
        lengths.append(scores.lengths)
    assert [x.tolist() for x in lengths] == [_CHOSEN, _REJECTED]
    return sums, lengths


def _run_dpo(model, batch, reference, **options):
    return getattr(_dpo(_WHOLE, model=model, **options), _WHOLE)(model, {**batch, **reference})[0]


def _references(sums):
    return {"ref_chosen_logps": sums[0].detach(), "ref_rejected_logps": sums[1].detach()}


def test_dpo_of_a_model_equals_dpo_trainer():
    model, batch = _Bigrams(), _batch(low=0)
    sums, _ = _scored(model, batch)
    reference, _ = _scored(_Bigrams(seed=1), batch)
    theirs = _run_dpo(model, batch, _references(reference), beta=0.3)
    _same(dpo_loss(*sums, *(x.detach() for x in reference), beta=0.3), theirs, [model.table])


def test_ipo_of_a_model_is_dpo_trainers_on_means_over_tokens():
    """Known difference: TRL divides each log-probability by its response's tokens first; on sums it is another loss."""
    model, batch = _Bigrams(), _batch(low=0)
    sums, lengths = _scored(model, batch)
    reference, _ = _scored(_Bigrams(seed=1), batch)
    sums += [x.detach() for x in reference]
    means = [x / length for x, length in zip(sums, lengths * 2, strict=True)]
    theirs = _run_dpo(model, batch, _references(means[2:]), kind="ipo", beta=0.3)
    _same(ipo_loss(*means, tau=0.3), theirs, [model.table])
    assert abs(ipo_loss(*sums, tau=0.3) / theirs - 1) > 0.1


def test_rpo_alpha_is_iterative_rpo_with_a_mean_over_all_tokens_of_the_batch():
    """Known difference: TRL's likelihood is sum log pi / sum |y_w|, the paper's a mean of log pi / |y_w|."""
    model, batch = _Bigrams(), _batch()
    sums, (long_w, _) = _scored(model, batch)
    reference, _ = _scored(_Bigrams(seed=1), batch)
    inputs = [*sums, *(x.detach() for x in reference)]
    theirs = _run_dpo(model, batch, _references(reference), beta=0.3, rpo_alpha=0.5)
    mean_length = long_w.double().mean().expand(3)
    _same(iterative_rpo_loss(*inputs, chosen_lengths=mean_length, beta=0.3, alpha=0.5), theirs, [model.table])
    _same(rpo_loss(*inputs, baseline_lengths=mean_length, beta=0.3, eta=0.5 / 0.3), theirs, [model.table])
    paper = iterative_rpo_loss(*inputs, chosen_lengths=long_w, beta=0.3, alpha=0.5)
    batch_mean, response_mean = -sums[0].sum() / long_w.sum(), -(sums[0] / long_w).mean()
    torch.testing.assert_close(paper - theirs, 0.5 * (response_mean - batch_mean), rtol=1e-10, atol=1e-12)
    assert (paper - theirs).abs() > 1e-3


def test_rpo_alpha_of_trl_leaves_out_the_token_0():
    """Known difference: TRL's likelihood takes id 0 for padding, also where it is a token of the response."""
    model, batch = _Bigrams(), _batch()
    batch["chosen_input_ids"][0, 1] = 0
    sums, (long_w, _) = _scored(model, batch)
    reference = _references(sums)
    theirs = _run_dpo(model, batch, reference, beta=0.3, rpo_alpha=0.5)
    dpo = dpo_loss(*sums, *reference.values(), beta=0.3)
    ids, _, labels = _sequences(batch, "chosen")
    without = sequence_log_probs(model(ids).logits[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] == 0, -100))
    assert without.lengths.sum() == long_w.sum() - 1
    _same(dpo - 0.5 * without.log_probs.sum() / without.lengths.sum(), theirs, [model.table])
    assert (theirs - (dpo - 0.5 * sums[0].sum() / long_w.sum())).abs() > 1e-3


def _run_cpo(model, batch, **options):
    inputs = {}
    for side in ("chosen", "rejected"):
        ids, mask, labels = _sequences(batch, side)
        inputs |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return getattr(_cpo(_WHOLE, **options), _WHOLE)(model, inputs)[0]


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_cpo_of_a_model_equals_cpo_trainer_with_a_mean_over_all_tokens_of_the_batch(weight):
    """Known difference: TRL's likelihood is sum log pi / sum |y_w|; the paper's is a sum a response."""
    model, batch = _Bigrams(), _batch(low=0)
    (chosen, rejected), (long_w, _) = _scored(model, batch)
    theirs = _run_cpo(model, batch, beta=0.3, cpo_alpha=weight)
    mean_length = long_w.double().mean().expand(3)
    ours = cpo_loss(chosen, rejected, chosen_lengths=mean_length, beta=0.3, nll_weight=weight)
    _same(ours, theirs, [model.table])
    if weight:
        response_mean = cpo_loss(chosen, rejected, chosen_lengths=long_w, beta=0.3, nll_weight=weight)
        paper = cpo_loss(chosen, rejected, beta=0.3, nll_weight=weight)
        assert (response_mean - theirs).abs() > 1e-3
        assert paper > 2 * theirs


def test_simpo_of_a_model_equals_cpo_trainer_without_its_likelihood():
    """Known difference: with `cpo_alpha` at its default of 1, TRL adds the mean likelihood over the batch's tokens."""
    model, batch = _Bigrams(), _batch(low=0)
    sums, lengths = _scored(model, batch)
    long = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
    ours = simpo_loss(*sums, beta=2.5, gamma=0.8, **long)
    options = {"kind": "simpo", "beta": 2.5, "simpo_gamma": 0.8}
    _same(ours, _run_cpo(model, batch, cpo_alpha=0.0, **options), [model.table])
    likelihood = -sums[0].sum() / lengths[0].sum()
    _same(ours + likelihood, _run_cpo(model, batch, cpo_alpha=1.0, **options), [model.table])


class _Scorer(torch.nn.Module):
    """What TRL 1.x asks of a model with a fused head: log-probabilities of labels, and quantities that it only logs."""

    def __init__(self, bigrams):
        super().__init__()
        self.bigrams = bigrams

    def forward(self, input_ids, labels, **_):
        log_probs = self.bigrams(input_ids).logits[:, :-1].log_softmax(-1)
        counts = labels[:, 1:] != -100
        chosen = log_probs.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        idle = torch.zeros_like(chosen).detach()
        return SimpleNamespace(log_probs=chosen * counts, entropy=idle, mean_logits=idle, is_top1=idle.bool())


def _run_current_dpo(model, batch, reference, kinds, weights=(1.0,), **options):
    """`DPOTrainer._compute_loss`, in which TRL 1.x has all its losses."""
    method, scorer = "_compute_loss", _Scorer(model)
    state = {"precompute_ref_logps": True, "ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
    state |= {"loss_types": kinds, "loss_weights": list(weights), "label_smoothing": 0.0, "model": scorer, **options}
    trainer = _trainer("DPOTrainer", method, _metrics=collections.defaultdict(_Lists), _total_train_tokens=0, **state)
    if "fused_lm_head" not in inspect.getsource(trainer._compute_loss):
        pytest.skip(f"trl {TRL.__version__} takes other outputs of a model")
    trainer._tp_size = 1
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics
    sides = [_sequences(batch, side) for side in ("chosen", "rejected")]
    width = max(ids.shape[1] for ids, _, _ in sides)
    ids, mask, labels = (
        torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in parts])
        for parts, fill in zip(zip(*sides, strict=True), (0, 0, -100), strict=True)
    )
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long(), **reference}
    return getattr(trainer, method)(scorer, inputs, False)


class _Lists(collections.defaultdict):
    def __init__(self):
        super().__init__(list)


@pytest.mark.parametrize(
    ("kind", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, lambda *x: dpo_loss(*x, beta=0.3)),
        ("sigmoid", 0.2, lambda *x: dpo_loss(*x, beta=0.3)),
        ("robust", 0.2, lambda *x: robust_dpo_loss(*x, beta=0.3, flip_rate=0.2)),
    ],
    ids=["dpo", "dpo-smoothing-ignored", "robust"],
)
def test_current_dpo_trainer(kind, smoothing, loss):
    """Known difference: TRL 1.x has no conservative form, its "sigmoid" does not look at the label smoothing."""
    model, batch = _Bigrams(), _batch(low=0)
    sums, _ = _scored(model, batch)
    reference = _references(_scored(_Bigrams(seed=1), batch)[0])
    theirs = _run_current_dpo(model, batch, reference, [kind], beta=0.3, label_smoothing=smoothing)
    _same(loss(*sums, *reference.values()), theirs, [model.table])


def test_current_dpo_trainer_has_ipo_on_means_over_tokens():
    model, batch = _Bigrams(), _batch(low=0)
    sums, lengths = _scored(model, batch)
    reference = _references(_scored(_Bigrams(seed=1), batch)[0])
    theirs = _run_current_dpo(model, batch, reference, ["ipo"], beta=0.3)
    means = [x / length for x, length in zip([*sums, *reference.values()], lengths * 2, strict=True)]
    _same(ipo_loss(*means, tau=0.3), theirs, [model.table])


def test_current_dpo_trainer_with_sft_is_iterative_rpo_with_a_mean_over_all_tokens_of_the_batch():
    """What `rpo_alpha` was, in TRL 1.x: and here tokens of id 0 do count."""
    model, batch = _Bigrams(), _batch(low=0)
    batch["chosen_input_ids"][0, 1] = 0
    sums, (long_w, _) = _scored(model, batch)
    reference = _references(_scored(_Bigrams(seed=1), batch)[0])
    theirs = _run_current_dpo(model, batch, reference, ["sigmoid", "sft"], (1.0, 0.5), beta=0.3)
    mean_length = long_w.double().mean().expand(3)
    ours = iterative_rpo_loss(*sums, *reference.values(), chosen_lengths=mean_length, beta=0.3, alpha=0.5)
    _same(ours, theirs, [model.table])
