"""The Triton kernels of cut cross-entropy against the loss of all logits in float64: in the interpreter, and on a GPU.

Whether kernels are interpreted is settled when Triton is imported, so a process of its own computes all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

ALL = {"label_smoothing": 0.1, "z_loss": 0.02, "soft_cap": 2.0}
_SHAPE = (70, 72, 140)
"""Tokens, width, classes: two blocks of each or more, the last of them not full."""
# name: sizes, dtypes of hidden and weight, bias, options
CASES = {
    "plain": (_SHAPE, "float32", "float32", True, {}),
    "smoothing": (_SHAPE, "float32", "float32", True, {"label_smoothing": 0.2}),
    "z": (_SHAPE, "float32", "float32", True, {"z_loss": 0.05}),
    "cap": (_SHAPE, "float32", "float32", True, {"soft_cap": 1.5}),
    "all": (_SHAPE, "float32", "float32", True, ALL),
    "all, no bias": (_SHAPE, "float32", "float32", False, ALL),
    "one range of classes": ((70, 8, 300), "float32", "float32", True, ALL),
    "two ranges of classes": ((70, 8, 500), "float32", "float32", True, ALL),
    "float16": (_SHAPE, "float16", "float16", True, ALL),
    "bfloat16": (_SHAPE, "bfloat16", "bfloat16", True, ALL),
    "bfloat16, plain": (_SHAPE, "bfloat16", "bfloat16", False, {}),
    "two dtypes": (_SHAPE, "bfloat16", "float32", True, {}),
    "transposed weight": (_SHAPE, "float32", "float32", True, {}),
    "banned classes": (_SHAPE, "float32", "float32", True, {}),
    "large logits": (_SHAPE, "float32", "float32", False, {}),
    "small gradients": (_SHAPE, "float16", "float16", False, {}),
    "full blocks": ((64, 64, 128), "float32", "float32", True, {}),
    "one token": ((1, 5, 7), "float32", "float32", True, ALL),
    "one class": ((3, 1, 1), "float32", "float32", True, {}),
    "no token": ((0, 5, 7), "float32", "float32", True, {}),
    "all ignored": ((4, 5, 7), "float32", "float32", True, {"z_loss": 0.1}),
}
_PROGRAMS = {"one range of classes": 1, "two ranges of classes": 4}


def _inputs(name):
    (tokens, width, classes), hidden_dtype, weight_dtype, bias, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).mul(0.5).to(getattr(torch, hidden_dtype))
    weight = torch.randn(classes, width, generator=generator).mul(0.5).to(getattr(torch, weight_dtype))
    offset = torch.randn(classes, generator=generator).to(getattr(torch, weight_dtype)) if bias else None
    targets = torch.randint(classes, (tokens,), generator=generator)
    coefficients = torch.randn(tokens, generator=generator)
    if name == "all ignored":
        targets[:] = -100
    else:
        targets[1::5] = -100
    if name == "banned classes":  # a padded vocabulary, of which a whole block is banned
        offset[:130] = -torch.inf
        targets = torch.where(targets < 0, targets, targets.clamp(min=130))
    if name == "large logits":
        hidden *= 1e4
    if name == "small gradients":  # in scores they are about 1e-6, which float16 holds to a few per cent
        coefficients *= 1e-4
    if name == "transposed weight":
        weight = weight.T.contiguous().T
    return hidden, weight, offset, targets, coefficients


def _dense(hidden, weight, bias, targets, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    """Loss of each token from all logits, by torch's cross-entropy."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    values = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return values + z_loss * logits.logsumexp(-1).square() * (targets != -100)


def _kernels(name, device):
    """Losses of the tokens and gradients by the kernels; for one case also the mean, and each gradient alone."""
    from trimtab.losses import _head_triton, linear_cross_entropy

    _head_triton._PROGRAMS = _PROGRAMS.get(name, 512)
    *inputs, targets, coefficients = (None if value is None else value.to(device) for value in _inputs(name))
    leaves = [value.requires_grad_() for value in inputs if value is not None]
    options = {"backend": "auto" if device == "cuda" else "triton", **CASES[name][-1]}
    values = linear_cross_entropy(*inputs[:2], targets, inputs[2], reduction="none", **options)
    found = {"values": values, "gradients": torch.autograd.grad(values, leaves, coefficients, retain_graph=True)}
    if name == "all":
        found["again"] = torch.autograd.grad(values, leaves, coefficients)
        found["mean"] = linear_cross_entropy(*inputs[:2], targets, inputs[2], **options)
        found["alone"] = [torch.autograd.grad(found["mean"], leaf, retain_graph=True)[0] for leaf in leaves]
    node = values.grad_fn
    while node.next_functions and "CutCrossEntropy" not in type(node).__name__:
        node = node.next_functions[0][0]
    found["values"], found["mean"] = [values], [found["mean"]] if "mean" in found else []
    return {key: [each.detach().cpu() for each in each_of] for key, each_of in found.items()} | {
        "node": type(node).__name__
    }


def _compile(target):
    """Compile the kernels for a GPU that need not be there."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trimtab.losses import _head_triton

    dtype, half = (tl.bfloat16, True) if target == "90" else (tl.float32, False)
    constants = {
        "bias": None, "cap": None, "DTYPE": dtype, "PRECISION": "ieee", "WIDEN": False,
        "TOKENS": 64, "CLASSES": 128, "WIDTH": 64 if half else 32,
    }  # fmt: skip
    types = dict.fromkeys(("hidden", "weight", "bias"), "*bf16" if half else "*fp32")
    types |= dict.fromkeys(("lse", "chosen", "total", "share", "gradient", "bias_gradient"), "*fp32")
    types |= {"labels": "*i64", **dict.fromkeys(("smoothing", "z", "cap"), "fp32")}
    for kernel in (_head_triton._forward_kernel, _head_triton._hidden_kernel, _head_triton._weight_kernel):
        fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
        if half:  # with all that can be left out
            del fixed["bias"], fixed["cap"]
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
        built = triton.compile(
            ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", int(target), 32), options={"num_warps": 8}
        )
        # What a GPU of that kind has for a program.
        print(kernel.__name__, built.metadata.shared <= 160 * 1024, len(built.asm["cubin"]) > 0)


def _run(*arguments, interpret="0"):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=_GPU)])
def found(request, tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("kernels") / "found.pt"
    _run(request.param, str(path), interpret=str(int(request.param == "cpu")))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_loss_of_all_logits(found, name):
    """Values to float32's precision of sums, gradients to that and the rounding to their own dtype, which is all."""
    hidden, weight, bias, targets, coefficients = _inputs(name)
    leaves = [value for value in (hidden, weight, bias) if value is not None]
    exact = [value.double().requires_grad_() for value in leaves]
    expected = _dense(*exact, *([] if bias is not None else [None]), targets, **CASES[name][-1])
    mine = found[name]
    assert mine["node"] == "TritonCutCrossEntropyBackward"
    torch.testing.assert_close(mine["values"][0].double(), expected.detach(), rtol=3e-6, atol=3e-6)
    gradients = torch.autograd.grad(expected, exact, coefficients.double())
    for leaf, gradient, dense in zip(leaves, mine["gradients"], gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        scale = float(dense.abs().max()) if dense.numel() else 0.0
        rounding = 0.5 * torch.finfo(leaf.dtype).eps
        least = rounding * torch.finfo(leaf.dtype).smallest_normal
        torch.testing.assert_close(gradient.double(), dense, rtol=rounding + 1e-6, atol=2e-6 * scale + least)


def test_mean_and_each_gradient_alone(found):
    hidden, weight, bias, targets, _ = _inputs("all")
    exact = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    expected = _dense(*exact, targets, **ALL).sum() / (targets != -100).sum()
    torch.testing.assert_close(found["all"]["mean"][0].double(), expected.detach(), rtol=3e-6, atol=0)
    for mine, dense in zip(found["all"]["alone"], torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), dense, rtol=1e-5, atol=1e-7)


def test_results_are_the_same_in_every_run(found):
    for one, other in zip(found["all"]["gradients"], found["all"]["again"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("target", ["80", "90"])
def test_kernels_compile_for_gpus(target):
    """The interpreter takes what the compiler refuses: variables that change their type, for one."""
    pytest.importorskip("triton")
    lines = _run("compile", target).splitlines()
    assert [line.split() for line in lines] == [
        [kernel, "True", "True"] for kernel in ("_forward_kernel", "_hidden_kernel", "_weight_kernel")
    ]


def test_tensors_that_kernels_do_not_take():
    pytest.importorskip("triton")
    assert "needs tensors on a GPU, got cpu" in _run("refused")
    assert "computes in float32, got torch.float64" in _run("refused", interpret="1")


def _refused():
    from trimtab.errors import UsageError
    from trimtab.losses import linear_cross_entropy

    hidden, weight = torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    try:
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), backend="triton")
    except UsageError as error:
        print(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        warnings.simplefilter("ignore")
        _compile(sys.argv[2])
    elif sys.argv[1] == "refused":
        _refused()
    else:
        torch.save({case: _kernels(case, sys.argv[1]) for case in CASES}, sys.argv[2])
