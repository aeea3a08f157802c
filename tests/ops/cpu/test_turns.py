"""Of several processes one compiles; where there can be no lock, each does."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from steadynorm.ops.cpu import turns
from steadynorm.ops.cpu.turns import turn

pytestmark = pytest.mark.skipif(turns.fcntl is None, reason="this system has no file locks")

HOLDER = """
import sys
from steadynorm.ops.cpu.turns import turn
with turn(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder(folder):
    """Another process in its turn for `kernel`, which ends at a line of input, and what it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "kernel"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def waiting_for(name: str) -> tuple[threading.Thread, threading.Event]:
    entered = threading.Event()

    def enter() -> None:
        with turn(name):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    return thread, entered


def test_a_turn_is_waited_for(holder):
    thread, entered = waiting_for("kernel")
    with turn("another kernel"):  # which nobody holds
        assert not entered.is_set()
    holder.stdin.write("go\n")
    holder.stdin.flush()
    thread.join(60)
    assert entered.is_set()
    assert holder.stdout.readline() == "left\n"


def test_a_process_that_dies_in_its_turn_holds_nobody_up(holder):
    thread, entered = waiting_for("kernel")
    holder.kill()
    thread.join(60)
    assert entered.is_set()


def test_patience_ends(holder, monkeypatch):
    monkeypatch.setattr(turns, "_PATIENCE", 0.05)
    with turn("kernel"):
        pass
    assert holder.poll() is None


def test_where_there_can_be_no_lock(folder, monkeypatch):
    (folder / "elsewhere").write_text("somebody's")
    (folder / f"steadynorm-{os.getuid()}.lock").symlink_to(folder / "elsewhere")
    with turn("kernel"):  # a link is not followed
        assert (folder / "elsewhere").read_text() == "somebody's"

    def unsupported(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(turns, "_opened", lambda: os.open(folder / "elsewhere", os.O_RDWR))
    monkeypatch.setattr(turns.fcntl, "lockf", unsupported)
    with turn("kernel"):
        pass
    monkeypatch.setattr(turns, "fcntl", None)
    with turn("kernel"):
        pass


def test_an_error_within_is_passed_on_and_ends_the_turn(folder):
    with pytest.raises(RuntimeError, match="cannot cache"), turn("kernel"):
        raise RuntimeError("cannot cache")
    thread, entered = waiting_for("kernel")
    thread.join(60)
    assert entered.is_set()
