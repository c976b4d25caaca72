"""Code blocks of README and docs, and the real parsers for the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_flags import training_parser

import eval.__main__
import llava.cli
import playground.scenes
from eval import launch
from llava.commands.parsers import Commands, parser_of, resolve

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Commands of other programs.
ELSEWHERE = (
    "pip install",
    "python3 -m venv",
    ".venv/bin/python -m pip install",
    ".venv-lmms/",
    "curl ",
    "vllm ",
    "lmms-eval ",
)


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language; of bash also the paragraphs that are indented by four."""
    text = page.read_text(encoding="utf-8")
    found = [textwrap.dedent(code) for _, name, code in FENCE.findall(text) if name == language]
    if language == "bash":
        indented = re.findall(r"(?<=\n\n)((?: {4}\S.*\n(?: {5,}.*\n)*)+)", FENCE.sub("", text))
        found += [textwrap.dedent(code) for code in indented]
    return found


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(code: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The commands of a block, each with the environment that stands before it."""
    code = re.sub(r"(^|\s)# .*$", "", code, flags=re.MULTILINE).replace("\\\n", " ")
    for line in re.findall(r"(?:'[^']*'|[^'\n])+", code):  # a quoted text may have several lines
        for part in re.split(r"\s&&\s", line):
            words = shlex.split(part)
            environment = {}
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0], re.DOTALL):
                name, _, value = words.pop(0).partition("=")
                environment[name] = value
            if words:
                yield environment, words


def parse(prog: str, known: Commands, words: list[str]) -> None:
    """Parse a command line as the program would, without running it."""
    assert words and words[0] in known, f"{prog} has no command {words[:1]}: {', '.join(known)}"
    target = (
        eval.__main__.COMMANDS if known is llava.cli.COMMANDS and words[0] == "eval" else resolve(known[words[0]][0])
    )
    if callable(target):
        parser_of(f"{prog} {words[0]}", target).parse_args(words[1:])
    else:
        parse(f"{prog} {words[0]}", target, words[1:])


def parse_script(script: str, words: list[str], environment: dict[str, str]) -> None:
    assert (ROOT / script).exists(), f"there is no {script}"
    match Path(script).name:
        case "visionzip.sh":
            parse("visionzip", llava.cli.COMMANDS, words)
        case "quickstart.sh":
            run = ["run", "scenes", "--model-path", "checkpoints/llava-mini", "--output", "results"]
            parse("eval", eval.__main__.COMMANDS, [*run, *words])
        case "test.sh":
            assert all((ROOT / word).exists() for word in words), words
        case "efficiency.sh" if words:
            parse("visionzip", llava.cli.COMMANDS, ["benchmark", "prefill", "--shape", "llava-next-mini", *words[1:]])
        case "serve.sh" | "serve_test.sh":
            pass  # their flags are those of another program
        case name if Path(script).parent.name == "eval":
            parse("eval", eval.__main__.COMMANDS, launch.arguments(Path(name).stem, words, environment))
        case _:
            flags = {word for word in words if word.startswith("--")}
            assert flags <= set(training_parser("llava.train.train")._option_string_actions), flags


def parse_command(environment: dict[str, str], words: list[str]) -> None:
    line = " ".join(words)
    if line.startswith(ELSEWHERE):
        return
    match words:
        case ["bash", script, *rest]:
            parse_script(script, rest, environment)
        case ["python", script, *_] if script.startswith(("scripts/", "examples/")):
            assert (ROOT / script).exists(), f"there is no {script}"
        case ["visionzip", *rest] | ["python", "-m", "llava.cli", *rest]:
            parse("visionzip", llava.cli.COMMANDS, rest)
        case ["python", "-m", "eval", *rest]:
            parse("python -m eval", eval.__main__.COMMANDS, rest)
        case ["python", "-m", "playground.ablation", *rest]:  # its parser is inside the function that runs it
            source = (ROOT / "playground/ablation.py").read_text(encoding="utf-8")
            assert {word for word in rest if word.startswith("--")} <= set(re.findall(r'"(--[\w-]+)"', source)), line
        case ["python", "-m", "playground.scenes", *rest]:
            parse("python -m playground.scenes", playground.scenes.COMMANDS, rest)
        case _:
            pytest.fail(f"this test does not know how to check {line!r}")
