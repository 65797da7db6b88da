"""Checkpoints: safetensors for tensors, JSON for the rest, written atomically, read without pickle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import RecordError, UsageError, reason
from trimtab.scalars import to_local_full

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_LEFTOVER_AGE = 3600.0
"""Seconds after which what a killed process left half written or half deleted is cleared away."""


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as `FOLDER/checkpoints/step-NNNNNNNN` and return that path.

    `state` may nest dicts (with string or integer keys), lists, tuples, tensors, strings, numbers, booleans and None:
    what a model's, an optimizer's and a scheduler's `state_dict` hold. Dtype and shape of every tensor are kept. The
    checkpoint appears under its name only when it is whole and on disk; the newest `keep` are kept. A second checkpoint
    of a step gets the name `step-NNNNNNNN.1` and so on, as no file system replaces a folder at once.

    Raises:
        RecordError: if the folder cannot be written or `state` holds something else; nothing that was there is lost.
        UsageError: if `step` is negative or `keep` is below 1.
    """
    if step < 0 or keep < 1:
        raise UsageError(f"a checkpoint needs step >= 0 and keep >= 1, got step {step} and keep {keep}.")
    home = Path(folder) / "checkpoints"
    partial = home / f".partial-{step:08d}-{os.getpid()}"
    tensors: dict[str, Tensor] = {}
    try:
        tree = _flatten(state, tensors)
        home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, "state": tree}))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        final = _free_name(home, step)
        partial.rename(final)
        _sync(home)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"cannot write a checkpoint in {home}: {reason(error)}.") from error
    _tidy(home, keep)
    return final


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return _checkpoints(Path(folder) / "checkpoints")


def load_checkpoint(path: str | Path) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint: its step and its state, every tensor with the dtype and shape it had.

    Raises:
        RecordError: if it is missing or damaged.
    """
    path = Path(path)
    try:
        tensors = load_file(path / "tensors.safetensors")
        document = json.loads((path / "state.json").read_text())
        return int(document["step"]), _restore(document["state"], tensors)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise RecordError(f"{path} is not a readable checkpoint: {reason(error)}.") from error


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor by a reference and each dict by its items, so that JSON keeps key types and order."""
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        whole = to_local_full(value.detach())
        if whole.layout != torch.strided or whole.is_quantized:
            raise RecordError(f"a checkpoint holds dense tensors, got one with layout {whole.layout}: make it dense.")
        # A copy of each: safetensors refuses tensors that share storage, as tied weights and views do.
        tensors[key] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
        return {_TENSOR: key}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise RecordError(f"a checkpoint's keys are strings or integers, got {key!r}.")
        return {_ITEMS: [[key, _flatten(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [_flatten(entry, tensors) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecordError(f"a checkpoint holds tensors and plain values, got {type(value).__name__}.")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(entry, tensors) for entry in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_restore(entry, tensors) for entry in value[_TUPLE])
        return {key: _restore(entry, tensors) for key, entry in value[_ITEMS]}
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(home: Path) -> list[Path]:
    """Return the whole checkpoints in a folder, oldest first."""
    found = [path for path in home.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=_order)


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise RecordError(f"{path} is not a checkpoint: its name is not step-NNNNNNNN.")
    return int(match.group(1)), int(match.group(2) or 0)


def _free_name(home: Path, step: int) -> Path:
    taken = [_order(path)[1] for path in home.glob(f"step-{step:08d}*") if _NAME.fullmatch(path.name)]
    return home / (f"step-{step:08d}.{max(taken) + 1}" if taken else f"step-{step:08d}")


def _tidy(home: Path, keep: int) -> None:
    """Delete all but the newest checkpoints of `keep` steps, and old leftovers; a failure to delete is no failure."""
    newest: dict[int, Path] = {step_of(path): path for path in _checkpoints(home)}
    kept = {newest[step] for step in sorted(newest)[-keep:]}
    for path in _checkpoints(home):
        if path not in kept:
            with contextlib.suppress(OSError):
                # Renamed first: a half-deleted checkpoint must not look like one.
                trash = home / f".trash-{path.name}-{os.getpid()}"
                path.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
    for path in (*home.glob(".partial-*"), *home.glob(".trash-*")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name.

    Raises:
        RecordError: if the name is not a checkpoint's.
    """
    return _order(path)[0]


def rng_state() -> dict[str, Any]:
    """Return the state of torch's random generators, of the CPU and of every accelerator in use."""
    devices = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    for index, device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device, index)
