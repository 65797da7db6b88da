"""Papers that more than one rule rests on."""

from __future__ import annotations

from trimtab.card import Paper

WORTSMAN = Paper("Small-scale proxies for large-scale Transformer training instabilities", 2023, arxiv="2309.14322")
ZHAI = Paper("Stabilizing Transformer Training by Preventing Attention Entropy Collapse", 2023, arxiv="2303.06296")
DEHGHANI = Paper("Scaling Vision Transformers to 22 Billion Parameters", 2023, arxiv="2302.05442")
KIMI = Paper("Kimi K2: Open Agentic Intelligence", 2025, arxiv="2507.20534")
PALM = Paper("PaLM: Scaling Language Modeling with Pathways", 2022, arxiv="2204.02311")
PRIETO = Paper("Grokking at the Edge of Numerical Stability", 2025, arxiv="2501.04697")
SPAM = Paper("SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025, arxiv="2501.06842")
OLMO2 = Paper("2 OLMo 2 Furious", 2024, arxiv="2501.00656")
MOLYBOG = Paper("A Theory on Adam Instability in Large-Scale Machine Learning", 2023, arxiv="2304.09871")
PASCANU = Paper("On the difficulty of training Recurrent Neural Networks", 2012, arxiv="1211.5063")
GLOROT = Paper(
    "Understanding the difficulty of training deep feedforward neural networks",
    2010,
    code="https://proceedings.mlr.press/v9/glorot10a.html",
)
BENGIO = Paper("Practical recommendations for gradient-based training of deep architectures", 2012, arxiv="1206.5533")
SMITH = Paper("Cyclical Learning Rates for Training Neural Networks", 2015, arxiv="1506.01186")
DYING_RELU = Paper("Dying ReLU and Initialization: Theory and Numerical Examples", 2019, arxiv="1903.06733")
AUTOTRAINER = Paper(
    "AUTOTRAINER: An Automatic DNN Training Problem Detection and Repair System",
    2021,
    doi="10.1109/ICSE43902.2021.00043",
)
DEEPDIAGNOSIS = Paper(
    "DeepDiagnosis: Automatically Diagnosing Faults and Recommending Actionable Fixes in Deep Learning Programs",
    2021,
    arxiv="2112.04036",
)
MIXED_PRECISION = Paper("Mixed Precision Training", 2017, arxiv="1710.03740")
RECIPE = Paper("A Recipe for Training Neural Networks", 2019, code="https://karpathy.github.io/2019/04/25/recipe/")
CS231N = Paper(
    "CS231n: Neural Networks Part 3, Learning and Evaluation",
    2015,
    code="https://cs231n.github.io/neural-networks-3/",
)
