"""Names that are public API: the rooms of methods and the findings of the doctor."""

from __future__ import annotations

ROOMS: tuple[str, ...] = (
    "optim",
    "schedule",
    "layers",
    "losses",
    "policy",
    "data",
    "precision",
    "distributed",
    "adapt",
    "tune",
)
"""Packages under `trimtab` whose modules hold one method each, with its Card; those of `tune` go around whole runs."""

FINDINGS: dict[str, tuple[str, ...]] = {
    "fit and data": (
        "initial-loss-off",
        "no-learning",
        "plateau",
        "lr-too-low",
        "lr-too-high",
        "overfitting",
        "label-noise",
        "labels-unrelated",
        "inputs-unscaled",
        "double-softmax",
        "constant-output",
        "eval-mode-training",
        "small-batch-batchnorm",
        "source-imbalance",
        "train-eval-mismatch",
    ),
    "gradient flow": (
        "vanishing-gradient",
        "exploding-gradient",
        "gradient-spike",
        "loss-spike",
        "loss-divergence",
        "non-finite",
        "dead-units",
        "saturated-units",
        "frozen-parameters",
        "parameters-not-optimized",
        "gradients-not-zeroed",
        "clipping-dominates",
        "decay-dominates",
        "epsilon-dominates",
        "update-too-large",
        "update-too-small",
    ),
    "transformers": (
        "attention-logit-growth",
        "attention-entropy-collapse",
        "output-logit-drift",
        "attention-sink",
        "massive-activations",
        "residual-growth",
        "rank-collapse",
        "expert-collapse",
    ),
    "late training and geometry": (
        "softmax-collapse",
        "delayed-generalization",
        "edge-of-stability",
        "sharpness-above-stability",
        "lazy-training",
        "neural-collapse",
        "opposing-signals",
        "low-gradient-coherence",
    ),
    "precision": ("overflow", "underflow", "loss-scale-collapse", "quantization-outliers"),
    "post-training": (
        "policy-entropy-collapse",
        "kl-blow-up",
        "reward-dip",
        "length-collapse",
        "gradient-entanglement",
        "chosen-likelihood-drop",
        "zero-advantage-groups",
        "void-turns",
    ),
    "continual": ("stability-gap", "forgetting"),
}
"""Every finding's fixed name, by family."""

FINDING_NAMES: frozenset[str] = frozenset(name for family in FINDINGS.values() for name in family)
