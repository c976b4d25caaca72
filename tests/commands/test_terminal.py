"""What users see: tables, progress and the chat, in a real terminal (a pty) and in a log."""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from checkpoints import picture
from llava.model.tokenizer import load_tokenizer
from llava.serve.cli import _Wrapped

ROOT = Path(__file__).parents[2]
CHAT = ["-m", "llava.cli", "chat", "--model-path", str(ROOT / "checkpoints/llava-mini"), "--device", "cpu"]


class Terminal:
    """A Python program in a terminal of its own."""

    def __init__(self, *words: str, columns: int = 80, **environment: str) -> None:
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.process, self.screen = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would the chat
            settings = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
            settings |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
            os.execve(sys.executable, [sys.executable, *words], settings)
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def until(self, wanted: str, seconds: float = 90) -> str:
        """Read on to some text; what came up to it."""
        end, start = time.monotonic() + seconds, len(self.seen)
        while wanted not in self.seen[start:]:
            assert time.monotonic() < end, f"no {wanted!r} in {self.seen[start:]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.seen += self._decoder.decode(os.read(self.screen, 1))
        return self.seen[start:]

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def interrupt(self) -> str:
        """Press Ctrl-C, again where it was lost (Python misses it as readline sets up); what comes up to the prompt."""
        for _ in range(4):
            self.type("\x03")
            try:
                return self.until("USER: ", seconds=20)
            except AssertionError:
                continue
        raise AssertionError(f"Ctrl-C does nothing: {self.seen!r}")

    def status(self) -> int:
        """Read to its end, and wait for it."""
        try:
            while data := os.read(self.screen, 4096):
                self.seen += self._decoder.decode(data)
        except OSError:  # Linux' end of a pty
            pass
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_chat_in_a_terminal(tmp_path: Path):
    """Wrong commands are refused, and Ctrl-C cancels a line or an answer while the session lives on."""
    picture(0).save(tmp_path / "cube.png")
    long = ["--temperature", "100", "--max-new-tokens", "1500"]  # nearly all words are as likely: it does not stop soon
    chat = Terminal(*CHAT, "--image", str(tmp_path / "cube.png"), *long, columns=60)
    chat.until("USER: ")
    chat.type("/imag cube.png\n")
    assert "unknown command '/imag': did you mean '/image'? There are" in chat.until("USER: ")
    chat.type("/nothing\n")
    assert "unknown command '/nothing'; There are /image," in chat.until("USER: ")
    chat.type("/help\n")
    shown = chat.until("USER: ")
    assert all(f"{name} " in shown for name in ("/image", "/video", "/reset", "/help", "/exit"))
    chat.type("half a line")
    chat.until("half a line")
    chat.interrupt()
    chat.type("What is shown?\n")
    chat.until("ASSISTANT: ")
    chat.until(" ")  # it is under way
    assert "cancelled: the conversation is as it was before this line" in chat.interrupt()
    chat.type("1/2 of it?\n")  # no command
    chat.until("ASSISTANT: ")
    chat.interrupt()
    chat.type("/exit\n")
    assert chat.status() == 0
    assert "Traceback" not in chat.seen


def test_ctrl_c_leaves_the_images_and_the_end_of_input_ends(tmp_path: Path):
    picture(0).save(tmp_path / "cube.png")
    chat = Terminal(*CHAT, "--image", str(tmp_path / "cube.png"), "--temperature", "0", NO_COLOR="1")
    chat.until("USER: ")
    time.sleep(0.5)  # a signal between the prompt and the reading is seen with the next key only
    chat.type("\x03")
    chat.until("USER: ")
    chat.type("What is shown?\n")
    assert "(64 visual), 0 cached" in chat.until("USER: ")
    chat.type("\x04")
    assert chat.status() == 0
    assert "\x1b" not in chat.seen.split("VisionZip 54 + 10")[1]  # below the bar of the weights


TABLE = """
from llava.commands.screen import print_table, progress, say
columns = ["way", "visual tokens", *(f"column {n}" for n in range(10))]
rows = [["vanilla", "144"] + ["12.5 ms"] * 10, ["zipped [x]", "48"] + ["1.0"] * 10]
print_table("a [bold] title", columns, rows, ["way"])
say("word " * 40)
with progress(3, "work", "things") as bar:
    bar.update(3)
"""


@pytest.mark.parametrize("columns", [60, 100, 119, 160])
def test_tables_fit_the_terminal(columns: int):
    terminal = Terminal("-c", TABLE, columns=columns)
    assert terminal.status() == 0
    table, bar = terminal.seen.split("work:", 1)
    lines = re.sub("\x1b\\[[0-9;]*m", "", table).splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0] == "a [bold] title" and ("┃" in table) == (columns == 160)
    if columns < 160:
        assert lines[1] == "vanilla" and lines[2].startswith("  visual tokens 144 · column 0 12.5 ms ·")
        assert "zipped [x]" in lines
    assert "3/3" in bar and "\r" in bar


def test_tables_and_progress_in_a_log():
    """A table is as wide as it is, progress is lines, and nothing has escape codes or carriage returns."""
    wide = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    for environment, is_table in ((wide, True), ({**wide, "COLUMNS": "80"}, False)):
        done = subprocess.run(
            [sys.executable, "-c", TABLE], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
        )
        assert ("┃ column 7 ┃" in done.stdout) == is_table and ("  visual tokens 144 · " in done.stdout) != is_table
        assert ("word " * 40).strip() in done.stdout  # a sentence is a line, for grep
        assert done.stderr == "work: 3/3 things, 0 s\n"
        assert not {"\x1b", "\r"} & set(done.stdout + done.stderr)


def test_words_wrap(capsys):
    """An answer that comes token by token breaks between words where the terminal ends, and nowhere in a log."""
    tokenizer = load_tokenizer(ROOT / "checkpoints/llava-mini")
    text = "a small red ring at the top left, a large blue square at the bottom and a striped background. " * 3
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    for width in (24, 60, None):
        console = Console(file=io.StringIO(), force_terminal=width is not None, width=width)
        streamer = _Wrapped(tokenizer, console)
        streamer.begin("ASSISTANT: ")
        streamer.put(torch.zeros(1, 5, dtype=torch.long))  # the prompt
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        shown = capsys.readouterr().out
        assert shown.replace("\n", " ").strip() == f"ASSISTANT: {text.strip()}"
        lines = shown.removesuffix("\n").split("\n")
        assert width is None or (max(map(len, lines)) <= width and not any(line.endswith(" ") for line in lines))
        full = [len(one) + 1 + len(other.split()[0]) > width for one, other in pairwise(lines)]
        assert len(lines) == 1 if width is None else all(full)
