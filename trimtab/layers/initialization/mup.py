"""muP, the maximal update parametrisation: the best learning rate of a narrow model is that of the wide ones.

Under the standard parametrisation a step of Adam moves activations the more, the wider the network. muP scales
initialisation, learning rates, output and attention by the width relative to a base model, so that every layer moves by
the same amount at every width. With n~ = fan-in / base fan-in of a weight (table 8 of the paper, relative to the base):

    weights          variance        multiplier     Adam's rate     SGD's rate
    input, vectors   as the base's   1              lr              lr * fan-out / base fan-out
    hidden           base's / n~     1              lr / n~         lr * (fan-out / base fan-out) / n~
    output           as the base's   1 / n~         lr              lr * n~

    attention = softmax( q·k sqrt(d_base) / d ),  d the width of a head

A dimension is infinite ("hidden" has two, the others one) where the model's parameter differs from the base's. Weight
decay is divided by the factor of the rate, so that decoupled decay lr * weight_decay is the same at every width.

Yang et al. 2021 (arXiv:2203.03466), table 8, definition 4.1 and appendix B; the authors' package `mup` 1.0.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.layers._attention_sites import _used_without_call
from trimtab.layers._sharding import is_sharded
from trimtab.layers.initialization._infinite_shape import (
    MupShape,
    biases,
    embeddings,
    infinite_shapes,
    init_law,
    is_fan_in_bias,
    layer_weights,
    std_ratio,
)
from trimtab.layers.initialization._query_scale import query_sites, scale_queries, zero_queries

__all__ = ["MupShape", "apply_mup", "mup_factors", "mup_groups", "mup_param_groups", "mup_shapes"]

_KINDS = ("adam", "sgd")
_LAWS = ("auto", "fan_in", "xavier", "constant")
_RECORD = "mup_record"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def apply_mup(
    model: nn.Module,
    base: nn.Module,
    *,
    init: str = "auto",
    rescale: bool = True,
    attention: bool = True,
    queries: Mapping[str, int] | None = None,
    readouts: Sequence[str] = (),
    output_mult: float = 1.0,
    readout_zero_init: bool = False,
    query_zero_init: bool = False,
) -> dict[str, str]:
    """Put a freshly built model into muP, relative to a base model; at the base's width nothing changes.

    The initialisation is rescaled in place, the input of output layers is multiplied by `output_mult` / n~, and queries
    by sqrt(d_base / d). Learning rates come from `mup_param_groups` or `mup_groups`. Names, shapes and state_dict stay:
    a checkpoint is loaded into a model that was built and put into muP in the same way. Apply it after every change of
    the model (and of the base alike), before `fully_shard`, DDP or torch.compile.

    Args:
        model: built by the same code as `base`, at another width, with its initial weights.
        base: the model whose learning rate and other settings were tuned; may be on the meta device.
        init: the law of the initial weights: `"fan_in"` (torch's own), `"xavier"`, `"constant"` (GPT-2's N(0, 0.02))
            or `"auto"`, which reads it from each weight.
        rescale: whether to rescale the weights; False for weights that were trained under muP.
        attention: whether to scale queries; False for attention that has its factor 1 / d already.
        queries: modules whose whole output are queries, with their number of heads, where attention has unknown names.
        readouts: names of the output layers; default the layers from an infinite dimension to a finite one. At the
            width of the base no dimension is infinite: there `output_mult` and `readout_zero_init` need the names.
        output_mult: constant factor of the output, tuned like a learning rate, above 0.
        readout_zero_init: whether output layers start at 0, which the paper recommends (appendix D.2).
        query_zero_init: whether queries start at 0, which the paper recommends (appendix D.2).

    Returns:
        What was changed, by module.

    Raises:
        UsageError: if an argument breaks its rule, base and model do not match, or a layer cannot be put into muP.

    Example:
        >>> def build(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))
        >>> model = build(256)
        >>> changes = apply_mup(model, build(64))
        >>> optimizer = torch.optim.AdamW(mup_param_groups(model, lr=0.01), lr=0.01)
        >>> {group["lr"]: len(group["params"]) for group in optimizer.param_groups}
        {0.01: 5, 0.0025: 1}

    References:
        Yang et al. 2021, arXiv:2203.03466; https://github.com/microsoft/mup.
    """
    choose("init", init, _LAWS)
    if not 0 < output_mult < float("inf"):
        raise UsageError(f"output_mult must be above 0, got {output_mult}: 1 is the default.")
    if any(_RECORD in vars(part) for part in model.modules()):
        raise UsageError("mup: the model is in muP already: build it anew, or load its weights into it.")
    if is_sharded(model):
        raise UsageError("mup: the model is sharded already: apply it before fully_shard.")
    if (rescale or readout_zero_init or query_zero_init) and any(p.is_meta for p in model.parameters()):
        raise UsageError("mup: the model has no weights yet: build it off the meta device, or pass rescale=False.")
    shapes = infinite_shapes(model, base)
    outputs = _readouts(model, base, readouts)
    if not outputs and (readout_zero_init or output_mult != 1):
        raise UsageError("mup: no output layer is found by its shape: name it, as in readouts=['head'].")
    sites = query_sites(model, base, queries or {}) if attention else []
    if readout_zero_init and (shared := embeddings(model) & _weights(model, outputs)):
        raise UsageError(f"mup: the output layer shares {min(shared)!r} with an embedding, which must not start at 0.")

    changes: dict[str, list[str]] = {}
    for name, (factor, law) in (_init_factors(model, base, shapes, init) if rescale else {}).items():
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
        owner, _, leaf = name.rpartition(".")
        changes.setdefault(owner, []).append(f"{leaf} times {factor:.4g} ({law} initialisation)")
    for name, width_mult in outputs.items():
        module = model.get_submodule(name)
        if readout_zero_init:
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)
            changes.setdefault(name, []).append("starts at 0")
        if output_mult != width_mult:
            module.mup_input_scale = output_mult / width_mult  # type: ignore[assignment]
            module.register_forward_pre_hook(_scale_input, with_kwargs=True)
            changes.setdefault(name, []).append(f"input times {output_mult / width_mult:.4g}")
    for site in sites:
        if query_zero_init:
            zero_queries(site)
            changes.setdefault(site.name, []).append("queries start at 0")
        if site.scale != 1:
            scale_queries(model, site)
            changes.setdefault(site.name, []).append(f"queries times {site.scale:.4g}")
    setattr(model, _RECORD, shapes)
    for name, shape in shapes.items():
        if shape.factor("adam") != 1:
            changes.setdefault(name.rpartition(".")[0], []).append(f"Adam's rate times {shape.factor('adam'):.4g}")
    return {name: "; ".join(what) for name, what in changes.items()} or {"": "as it was: it has the base's width"}


def mup_shapes(model: nn.Module) -> dict[str, MupShape]:
    """Return each parameter's shape, base shape and role, by its name in a model that is in muP, wrapped or not.

    Raises:
        UsageError: if the model is not in muP.
    """
    for prefix, module in model.named_modules():
        if (record := vars(module).get(_RECORD)) is not None:
            start = f"{prefix}." if prefix else ""
            return {start + name: shape for name, shape in record.items()}
    raise UsageError("the model is not in muP: call apply_mup(model, base) first.")


def mup_factors(model: nn.Module, kind: str = "adam") -> dict[str, float]:
    """Return the factor of the learning rate of each parameter, by name.

    Args:
        model: in muP.
        kind: `"adam"` for optimizers whose step does not depend on the gradient's size (Adam, Lion, RMSprop), `"sgd"`
            for those whose step is proportional to it.

    Returns:
        Factors of the rate of a model of the base's width.

    Raises:
        UsageError: if the model is not in muP, or the kind is unknown.
    """
    choose("kind of optimizer", kind, _KINDS)
    return {name: shape.factor(kind) for name, shape in mup_shapes(model).items()}


def mup_groups(
    model: nn.Module,
    groups: Iterable[Any],
    kind: str = "adam",
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split parameter groups by the factor of their learning rate.

    A group's `lr` is multiplied by the factor and its `weight_decay` divided by it, which keeps decoupled decay
    lr * weight_decay the same at every width. Everything else is kept, lists with one entry for each parameter too.

    Args:
        model: in muP; may be wrapped, sharded or compiled.
        groups: groups as torch's optimizers take them, or parameters, or pairs of name and parameter.
        kind: see `mup_factors`.
        lr: rate of groups without one.
        weight_decay: decay of groups without one; None leaves it to the optimizer, undivided.

    Returns:
        Groups with `lr`, in the order of their parameters.

    Raises:
        UsageError: if the model is not in muP, a group has no rate, or a parameter came into the model afterwards.
    """
    factors = {_plain(name): factor for name, factor in mup_factors(model, kind).items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given = list(groups)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    found: list[dict[str, Any]] = []
    for group in given:
        rate = group.get("lr", lr)
        if rate is None:
            raise UsageError("mup: a group has no learning rate: give it one, or pass lr.")
        decay = group.get("weight_decay", weight_decay)
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        # Lists beside the parameters, such as their names, are split with them.
        beside = [key for key, value in group.items() if isinstance(value, list) and len(value) == len(entries)]
        parts: dict[float, dict[str, Any]] = {}
        for place, entry in enumerate(entries):
            factor = factors.get(_plain(names.get(id(entry[1] if isinstance(entry, tuple) else entry), "")))
            if factor is None:
                name = names.get(id(entry[1] if isinstance(entry, tuple) else entry), "a parameter")
                raise UsageError(f"mup: {name} was not in the model when it was put into muP: apply muP last.")
            if factor not in parts:
                parts[factor] = {**group, **{key: [] for key in beside}, "params": [], "lr": rate * factor}
                if decay is not None:
                    parts[factor]["weight_decay"] = decay / factor
            for key in {*beside, "params"}:
                parts[factor][key].append(entry if key == "params" else group[key][place])
        found += parts.values()
    return found


def mup_param_groups(
    model: nn.Module, *, lr: float, optimizer: str = "adam", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return a model's trainable parameters as groups with the learning rates of muP.

    Args:
        model: in muP.
        lr: rate that a model of the base's width would have.
        optimizer: `"adam"` or `"sgd"`, see `mup_factors`.
        weight_decay: the same.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return mup_groups(model, [{"params": trained}], optimizer, lr=lr, weight_decay=weight_decay)


def _plain(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _init_factors(
    model: nn.Module, base: nn.Module, shapes: Mapping[str, MupShape], init: str
) -> dict[str, tuple[float, str]]:
    """Return by what to multiply each parameter, and the law that its initial values follow."""
    bases = dict(base.named_parameters())
    drawn = layer_weights(model) - embeddings(model)
    beside = biases(model)
    found: dict[str, tuple[float, str]] = {}
    for name, parameter in model.named_parameters():
        shape = shapes[name]
        if name in beside:
            weight = shapes[beside[name]]
            # Torch draws a bias within 1 / sqrt(fan-in of the weight): it must not shrink with the width.
            law = init if init != "auto" else "fan_in" if is_fan_in_bias(parameter, weight) else "constant"
            factor = 1 / std_ratio("fan_in", weight) if law == "fan_in" else 1.0
        elif shape.role in ("vector", "finite") or (shape.role != "hidden" and name not in drawn):
            continue
        else:
            law = init if init != "auto" else init_law(parameter, shape, bases[name])
            # Where the values are from here: those of the base times what the law makes of the width.
            factor = (shape.width_mult**-0.5 if shape.role == "hidden" else 1.0) / std_ratio(law, shape) if law else 1.0
        if abs(factor - 1) > 1e-12:
            found[name] = factor, law
    return found


def _readouts(model: nn.Module, base: nn.Module, named: Sequence[str]) -> dict[str, float]:
    """Return n~ of every output layer: those named, or those that map from an infinite dimension to a finite one."""
    found: dict[str, float] = {}
    bases = dict(base.named_modules())
    for name, module in model.named_modules():
        other = bases.get(name)
        if other is None or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)):
            continue
        (out, fan_in, *_), (base_out, base_in, *_) = module.weight.shape, other.weight.shape
        reads = out == base_out and fan_in != base_in and not isinstance(module, nn.modules.conv._ConvTransposeNd)
        if not reads and name not in named:
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf and _used_without_call(model.get_submodule(parent), leaf):
            raise UsageError(f"mup: the model hands {name}.weight to F.linear: give the output a layer of its own.")
        if name in named or (not named and not isinstance(module, nn.Embedding)):
            found[name] = fan_in / base_in
        elif not isinstance(module, nn.Embedding):
            raise UsageError(f"mup: {name!r} maps from an infinite dimension to a finite one: name it in readouts too.")
    if missing := sorted(set(named) - set(found)):
        raise UsageError(f"mup: readouts names {missing[0]!r}, which is no linear or convolutional layer of the model.")
    return found


def _weights(model: nn.Module, modules: Iterable[str]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names.get(id(model.get_submodule(module).weight), "") for module in modules}


def _scale_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an output layer: it survives state_dict, deepcopy, torch.compile and FSDP."""
    if args:
        return (args[0] * module.mup_input_scale, *args[1:]), kwargs
    return args, {name: value * module.mup_input_scale for name, value in kwargs.items()}


def _apply(model: nn.Module, *, base: nn.Module, **options: Any) -> dict[str, str]:
    """Put a model into muP relative to `base`; options as those of `apply_mup`."""
    return apply_mup(model, base, **options)


CARD = Card(
    name="mup",
    room="layers",
    summary="maximal update parametrisation: learning rates tuned on a narrow model hold for wide ones",
    paper=Paper(
        "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
        2021,
        arxiv="2203.03466",
        code="https://github.com/microsoft/mup",
    ),
    equation=(
        "n~ = fan-in / base fan-in: hidden weights var / n~ and Adam's lr / n~; output times 1 / n~, its init as the "
        "base's; attention q·k sqrt(d_base) / d; SGD's lr * fan-out~ (input, vectors), lr * n~ (output)"
    ),
    claim=(
        "The optimum learning rate, and other settings, of a small model are those of a wide one: a tuned 40M model's "
        "settings, used at once on 6.7B parameters (GPT-3), outperform the published ones at 7 % of the cost of tuning."
    ),
    acts_on="model",
    entry="trimtab.layers.initialization.mup:apply_mup",
    defaults=(
        Default("init", "auto", "ours: read from each weight; the authors' set_base_shapes assumes fan-in laws"),
        Default("rescale", True, "authors' code, set_base_shapes(rescale_params=True)"),
        Default("output_mult", 1.0, "authors' code, MuReadout(output_mult=1.0)"),
        Default(
            "readout_zero_init", False, "authors' code, MuReadout(readout_zero_init=False); the paper advises True"
        ),
        Default("query_zero_init", False, "authors' code leaves it to the user; the paper advises True (appendix D.2)"),
    ),
    verified={
        "equation": (
            "tests/layers/initialization/test_mup.py::test_table_8",
            "tests/layers/initialization/test_mup.py::test_initialisation_has_the_variance_of_table_8",
            "tests/layers/initialization/test_mup.py::test_attention_logits_scale_with_one_over_d",
        ),
        "reference": (
            "tests/layers/initialization/test_mup_reference.py::test_equals_the_mup_package",
            "tests/layers/initialization/test_mup_reference.py::test_equals_what_the_mup_package_gave",
        ),
        "claim": ("tests/tune/scaling/test_coordinates.py::test_mup_is_flat_and_standard_grows",),
    },
    deviations=(
        "Which dimensions are infinite is read from one base model: those that differ; the package takes a third model "
        "(delta) where base and target may share a size. Where they do, every multiplier is 1 and both give the same.",
        "The package assumes fan-in laws (torch's own) and leaves others to mup.init; here the law is read from each "
        "weight, and a constant standard deviation (GPT-2's) becomes what mup.init.normal_ gives.",
        "The package's set_base_shapes also multiplies a readout's weight that is shared with an embedding by "
        "sqrt(n~); here a shared table keeps its values, as table 8 gives it a constant variance.",
        "Attention is scaled by sqrt(d_base) / d through its queries, where the authors ask the user to write 8 / d. "
        "nn.MultiheadAttention, which has no place for it, becomes trimtab's subclass of it.",
        "Learning rates are factors by name of the parameter, not attributes of it: they survive deepcopy, sharding "
        "and checkpoints.",
        "Apply it after other changes of the model (qk-norm), made to the base as well: a norm that comes later undoes "
        "the scale of the queries. mup_groups refuses parameters that came later.",
    ),
    apply=_apply,
)
