"""Parameters that one call can update: same group, dtype, device, step and treatment."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trimtab.optim._sharding import Shard

if TYPE_CHECKING:
    from trimtab.optim.chain import Chain


@dataclass
class Bucket:
    """Parameters updated together, and what their update needs.

    Attributes:
        shards: the parameters.
        group: their group's options.
        step: the step about to be taken.
        form: how their moments are kept.
        kinds: each transform's kind for them.
        dtype: of the computation.
    """

    shards: list[Shard]
    group: dict[str, Any]
    step: int
    form: str
    kinds: tuple[Hashable, ...]
    dtype: torch.dtype


def group(chain: Chain, shards: Sequence[Shard]) -> list[Bucket]:
    """Return the parameters in buckets; where whole tensors matter, those of one shape share a bucket."""
    whole = not all(transform.elementwise for transform in chain.transforms)
    found: dict[Hashable, Bucket] = {}
    for shard in shards:
        options = chain.param_groups[shard.group]
        p = shard.value
        kinds = tuple(transform.kind(shard.parameter, options) for transform in chain.transforms)
        shape = p.shape if whole else None
        mesh = None if shard.mesh is None else (id(shard.mesh), str(getattr(shard.parameter, "placements", "")))
        key = (shard.group, p.dtype, p.device, shard.step, shard.form, kinds, shape, mesh)
        if key not in found:
            dtype = torch.promote_types(p.dtype, torch.float32)
            found[key] = Bucket([], options, shard.step, shard.form, kinds, dtype)
        found[key].shards.append(shard)
    return list(found.values())
