"""What every command is made of: parsers, hints for typing errors, errors in one line. Needs neither torch nor rich."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from llava.storage.files import WriteError, full_disk

AddArguments = Callable[[argparse.ArgumentParser], None]
# Name to what it is and one line about it. What it is: further commands, or a function that adds the flags to a parser
# and sets its default `run` to the command; or "module:name" of either, which is imported when the command is called.
Commands = Mapping[str, tuple["str | AddArguments | Commands", str]]

_SECTION = re.compile(r"\n\s*(Args|Returns|Raises|Yields|Attributes):\s*\n.*", re.DOTALL)


def run_commands(
    prog: str, commands: Commands, words: Sequence[str], description: str, version: Callable[[], str] | None = None
) -> int:
    """Run one of several commands.

    Args:
        prog: what the user types before its name.
        commands: all there are.
        words: the command line after ``prog``.
        description: what they are, for ``--help``.
        version: says the version, if ``--version`` is a flag.

    Returns:
        The exit status: 2 for bad input, as argparse has it, and 130 when interrupted.
    """
    name = words[0] if words else None
    if name in commands:
        target, summary = commands[name]
        target = resolve(target)
        if isinstance(target, Mapping):
            return run_commands(f"{prog} {name}", target, words[1:], summary)
        parser = parser_of(f"{prog} {name}", target)
        args = parser.parse_args(list(words[1:]))
        return run_command(parser.prog, args.run, args)
    width = max(map(len, commands)) + 4
    lines = [f"  {each:<{width - 2}}{summary}" for each, (_, summary) in commands.items()]
    listed = "\n".join(["commands:", *lines, "", f"{prog} COMMAND --help says more of each"])
    overview = Parser(prog, usage=f"{prog} COMMAND …", description=description, epilog=listed)
    if version is not None:
        shown = {"action": "store_true", "default": argparse.SUPPRESS}
        overview.add_argument("--version", help="print the version and end", **shown)
    if name is None:
        overview.error(f"give a command, one of {', '.join(commands)} ({prog} --help says what they do)")
    if not name.startswith("-"):
        overview.error(f"unknown command {name!r}{hint(name, commands)}")
    if overview.parse_args(list(words)):  # --help has ended it, so it is --version
        print(f"{prog} {version()}")
    return 0


def resolve(target: str | AddArguments | Commands) -> AddArguments | Commands:
    """What a command is, imported if only its place is given."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parser_of(prog: str, add_arguments: AddArguments) -> Parser:
    """The parser of one command; its description is the command's docstring.

    Args:
        prog: how the command is called.
        add_arguments: adds its flags, and sets the parser's default ``run`` to the command.
    """
    parser = Parser(prog)
    add_arguments(parser)
    parser.description = parser.description or description_of(parser.get_default("run"))
    return parser


def description_of(command: Callable[..., Any]) -> str:
    """What a docstring says, without its sections on arguments and errors."""
    return _SECTION.sub("", inspect.getdoc(command) or "").strip()


def run_command(name: str, command: Callable[[Any], Any], args: Any) -> int:
    """Run a command; bad input becomes one line on standard error and exit status 2, as argparse has it.

    Args:
        name: the command's, which begins that line.
        command: is called with ``args``.
        args: the parsed flags; ``interrupted``, if it is one of them, is said when Ctrl-C ends the command.

    Returns:
        The exit status; 130 when interrupted.
    """
    # Bars that redraw themselves fill a log with thousands of characters in one line.
    if not sys.stderr.isatty() and (bars := sys.modules.get("transformers.utils.logging")):
        bars.disable_progress_bar()
    try:
        command(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(
            f"{name}: {error}{_cure(error)}\n"
        )  # in one piece: other processes say the same at the same time
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{name}: {getattr(args, 'interrupted', 'interrupted')}\n")
        return 130
    return 0


def _cure(error: Exception) -> str:
    """What a library's own error leaves unsaid: what to install, or where there is no room."""
    if full_disk(error) and not isinstance(error, WriteError):  # such as under a model that is fetched
        from huggingface_hub.constants import HF_HOME  # noqa: PLC0415 - slow to import

        return f" (in the output, in {HF_HOME} or in {tempfile.gettempdir()}): make room there"
    if not isinstance(error, ModuleNotFoundError):
        return ""
    library = (error.name or "").partition(".")[0]
    with suppress(metadata.PackageNotFoundError):  # run from a folder that was never installed
        for needed in metadata.requires("llava-visionzip") or []:
            if (found := re.fullmatch(r'([\w-]+).*extra == "(\w+)"', needed)) and found[1] == library:
                return f': pip install "llava-visionzip[{found[2]}]"'
    return ""


def hint(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: the one that was probably meant, if any, and all there are."""
    known = list(known)
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    guess = f": did you mean {by_lower[close[0]]!r}?" if close else ";"
    return f"{guess} There {'are' if len(known) > 1 else 'is'} {', '.join(known)}" if known else guess


def finite(text: str) -> float:
    """A flag's number, neither infinite nor NaN; argparse reports the error."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def positive(text: str) -> int:
    """A flag's whole number of at least 1; argparse reports the error."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


class Help(argparse.HelpFormatter):
    """``--help`` with every default, one spelling of each flag (the others are accepted), and paragraphs."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        short = [name for name in action.option_strings if not name.startswith("--")]
        long = next(name for name in action.option_strings if name.startswith("--"))
        values = "" if action.nargs == 0 else f" {self._format_args(action, self._metavar(action))}"
        return ", ".join([*short, long]) + values

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        name = action.metavar or ("NAME" if action.choices is not None else default_metavar)  # they are in the help
        return lambda size: name if isinstance(name, tuple) else (name,) * size

    def _metavar(self, action: argparse.Action) -> str:
        return self._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, note, default = (action.help or "").partition("(default: ")
        text, default = text.strip(), note + default
        if action.choices is not None and action.metavar is None:
            names = ", ".join(map(str, action.choices)).replace("%", "%%")
            text = f"{text}: {names}" if text else names
        if action.option_strings and action.default is not argparse.SUPPRESS and not default:
            default = "(required)" if action.required else f"(default: {_shown(action.default)})"
        return f"{text} {default}".strip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = inspect.cleandoc(text).split("\n\n")
        is_code = re.compile("^ ", re.MULTILINE).search
        return "\n\n".join(each if is_code(each) else "\n".join(self._split_lines(each, width)) for each in paragraphs)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default in ([], ""):
        return "none"
    values = default if isinstance(default, list | tuple) else [default]
    return " ".join(map(str, values)).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, and which name may have been meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **kwargs})
        self._unknown: list[str] = []  # flags on the command line that is parsed

    def error(self, message: str) -> Any:
        """Say one line and end with status 2; the flags are in ``--help``."""
        if self._unknown and message.startswith("the following arguments are required: "):
            # argparse looks for these first; one of them may be the very flag that is misspelt
            line, meant = self._refusal(self._unknown[0])
            missing = [name for name in message.partition(": ")[2].split(", ") if meant not in name.split("/")]
            message = f"{line} (missing: {', '.join(missing)})" if missing else line
        self.refuse(re.sub(r"(--[\w-]+)(/--?[\w-]+)+", r"\1", message))  # one spelling of each flag

    def refuse(self, line: str) -> None:
        """End with a line."""
        self.exit(2, f"{self.prog}: {line}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over."""
        names = (word.partition("=")[0] for word in (sys.argv[1:] if args is None else args))
        self._unknown = [
            name for name in names if name.startswith("--") and not any(flag.startswith(name) for flag in self._flags)
        ]
        found, rest = super().parse_known_args(args, namespace)
        if flags := [word.partition("=")[0] for word in rest if word.startswith("-")]:
            self.error(self._refusal(flags[0])[0])
        if rest:
            self.error(f"{' '.join(rest)}: nothing takes these words ({self.prog} --help says what there is)")
        return found, rest

    @property
    def _flags(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def _refusal(self, flag: str) -> tuple[str, str]:
        """What is said of an unknown flag, and the one that was probably meant, "" if none is alike."""
        meant = next(iter(difflib.get_close_matches(flag, self._flags, n=1)), "")
        guess = f"did you mean {meant}?" if meant else f"{self.prog} --help lists those there are"
        return f"unknown flag {flag}: {guess}", meant

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown name {value!r}{hint(str(value), map(str, action.choices))}")
