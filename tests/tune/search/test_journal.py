"""The journal's lock frees itself when its holder dies, and a torn line is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trimtab.errors import RecordError
from trimtab.tune.search.journal import SharedLock, kernel, open_storage

pytest.importorskip("optuna")

HOLD = """
import sys, time
from pathlib import Path
from trimtab.tune.search.journal import SharedLock
SharedLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_only_one_holds_the_lock(tmp_path: Path) -> None:
    inside, most, total = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, total
        for _ in range(20):
            with SharedLock(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                total += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, total) == (1, 80)


def test_a_killed_holder_lets_go_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
        process.wait()
    assert os.path.lexists(tmp_path / "lock.link"), "it was killed while it held the link"
    began = time.monotonic()
    with SharedLock(tmp_path / "lock"):
        assert time.monotonic() - began < 5


def test_the_link_of_another_host_is_waited_for_and_broken_after_a_while(tmp_path: Path) -> None:
    os.symlink("another-kernel 1234", tmp_path / "lock.link")
    began = time.monotonic()
    with SharedLock(tmp_path / "lock", patience=0.5):
        assert 0.4 < time.monotonic() - began < 30
        assert os.readlink(tmp_path / "lock.link").startswith(kernel())
    assert not os.path.lexists(tmp_path / "lock.link")


def test_a_torn_line_is_cut_off_and_the_journal_goes_on(tmp_path: Path) -> None:
    first = open_storage(tmp_path)
    study = first.create_new_study([1], "one")  # type: ignore[list-item]
    first.set_study_user_attr(study, "kept", 1)
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"lost"')
    second = open_storage(tmp_path)
    assert second.get_study_user_attrs(study) == {"kept": 1}
    second.set_study_user_attr(study, "more", 2)
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert open_storage(tmp_path).get_study_user_attrs(study) == {"kept": 1, "more": 2}
    assert first.get_study_user_attrs(study) == {"kept": 1, "more": 2}


def test_what_is_no_journal_is_a_record_error(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("not\na journal\n")
    with pytest.raises(RecordError, match="not a readable journal"):
        open_storage(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot write"):
        open_storage(tmp_path / "file" / "below")


def test_a_lock_that_another_took_over_stays(tmp_path: Path) -> None:
    lock = SharedLock(tmp_path / "lock")
    lock.acquire()
    (tmp_path / "lock.link").unlink()
    os.symlink("elsewhere 1", tmp_path / "lock.link")
    lock.release()
    assert os.readlink(tmp_path / "lock.link") == "elsewhere 1"


@pytest.mark.parametrize("line", ["garbage", '{"op_code": 99}', "[1, 2]"])
def test_a_line_that_is_none_of_the_journals_is_a_record_error(tmp_path: Path, line: str) -> None:
    open_storage(tmp_path)
    (tmp_path / "journal.log").write_text(f"{line}\n{line}\n")
    with pytest.raises(RecordError, match=r"journal\.log is not a readable journal"):
        open_storage(tmp_path).get_all_studies()
