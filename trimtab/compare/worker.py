"""A worker process: takes orders from its standard input, one JSON line each, and answers in kind.

It lives only as long as the process that started it: the end of its input, or a change of parent, ends it at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from trimtab.compare.store import write_json
from trimtab.errors import RunFailedError, TrimtabError

_REPORT_EVERY = 0.1
"""Seconds between two progress messages."""


def main(folder: str) -> None:
    """Serve orders until the parent is gone. `python -c` calls this; see `trimtab.compare.pool`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_first()
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    source, answers = _private_channels()
    threading.Thread(target=_listen, args=(source, orders), daemon=True).start()
    threading.Thread(target=_stay_with, args=(os.getppid(),), daemon=True).start()
    home = Path(folder)
    send = _sender(answers)
    send({"type": "ready"})
    while True:
        _serve(orders.get(), home, send)


def _serve(order: dict[str, Any], home: Path, send: Callable[[dict[str, Any]], None]) -> None:
    key = order["key"]
    own = home / "runs" / key
    last = 0.0

    def report(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_EVERY:
            last = time.monotonic()
            send({"type": "moved", "key": key, "step": step, "loss": loss})

    try:
        # What an earlier attempt left there has no result: start clean.
        shutil.rmtree(own, ignore_errors=True)
        module, _, function = order["task"].partition(":")
        task = getattr(importlib.import_module(module), function)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)
        result = task(order["arguments"], own, report)
        write_json(home / "jobs" / f"{key}.json", {**order, "result": result})
    except Exception as error:  # whatever a job raises is its result, not the end of the worker
        traceback.print_exc()
        ours = isinstance(error, TrimtabError)
        text = " ".join(str(error).split())
        send(
            {
                "type": "failed",
                "key": key,
                "usage": ours and not isinstance(error, RunFailedError),
                "message": text if ours and text else f"{type(error).__name__}: {text}",
            }
        )
    else:
        send({"type": "done", "key": key})


def _private_channels() -> tuple[TextIO, TextIO]:
    """Keep the pipes for ourselves: what a job prints goes to the log, what it reads is empty."""
    source = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    return source, answers


def _sender(answers: TextIO) -> Callable[[dict[str, Any]], None]:
    def send(message: dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(message) + "\n")
            answers.flush()
        except OSError:
            os._exit(1)

    return send


def _listen(source: TextIO, orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in source:
        orders.put(json.loads(line))
    os._exit(0)


def _stay_with(parent: int) -> None:
    """Leave when the parent is gone even if another of its children still holds our input open."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def _die_first() -> None:
    """Where memory runs out, let the system take a worker, which is replaced, before the process that waits for it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
