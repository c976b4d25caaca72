"""Locks: one process at a time, and nothing left of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava.storage.lock import locked_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import runpy
import sys
from pathlib import Path
locked_folder = runpy.run_path("llava/storage/lock.py")["locked_folder"]  # alone: the package takes seconds
with locked_folder(Path(sys.argv[1]), "--output"):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_folder_is_for_one_process_at_a_time(is_killed: bool, tmp_path: Path):
    """Another is told; when the first has ended, killed or not, it is free, and what was made for it alone is gone."""
    folder = tmp_path / "new/run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with (
            pytest.raises(BlockingIOError, match=r"another process is writing to .*run: wait for it, or .*--output"),
            locked_folder(folder, "--output"),
        ):
            pytest.fail("both have it")
        if is_killed:
            holder.kill()
    with locked_folder(folder, "--output"):
        assert folder.is_dir()
    assert not list(tmp_path.rglob("run.lock")) and folder.exists() == is_killed


def test_what_is_in_a_folder_stays(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="lost"), locked_folder(tmp_path / "run", "--output"):
        (tmp_path / "run/result").write_text("it")
        raise FileNotFoundError("lost")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
