"""Every flag of every command, by introspection: defaults in --help, one spelling, numbers that are numbers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eval.__main__
import llava.cli
import playground.scenes
from checkpoints import picture
from llava.commands.parsers import Commands, Parser, parser_of, resolve, run_command
from llava.eval.run_llava import add_question_arguments, eval_model
from llava.model.checkpoints.loading import check_device
from llava.serve.cli import add_chat_arguments
from llava.train import contrastive
from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.running.run import TrainingArguments, TrainingParser
from llava.train.train import main as train

TRAININGS = {
    "llava.train.train": (ModelArguments, DataArguments, LlavaTrainingArguments),
    "llava.train.contrastive": (contrastive.TowerArguments, TrainingArguments),
}
# What one flag means has one name; these are accepted, but never the one in --help.
OLD = {"--methods", "--batch-sizes", "--out", "--new-tokens", "--image-file", "--top_p", "--num_beams"}
OLD |= {"--max_new_tokens"}


def walk(prog: str, commands: Commands) -> Iterator[Parser]:
    for name, (target, _) in commands.items():
        found = resolve(target)
        if isinstance(found, dict):
            yield from walk(f"{prog} {name}", found)
        else:
            yield parser_of(f"{prog} {name}", found)


def own_parsers() -> list[Parser]:
    return [
        *walk("visionzip", llava.cli.COMMANDS),
        *walk("python -m eval", eval.__main__.COMMANDS),
        *walk("python -m playground.scenes", playground.scenes.COMMANDS),
        parser_of("llava.serve.cli", add_chat_arguments),
        parser_of("llava.eval.run_llava", add_question_arguments),
    ]


def training_parser(name: str) -> TrainingParser:
    return TrainingParser(TRAININGS[name], name, None)


def flags_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def is_number(action: argparse.Action) -> bool:
    try:
        return isinstance(action.type("1.5"), float)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return False


def long_name(action: argparse.Action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999", "x"])
def test_no_flag_takes_what_is_no_finite_number(bad: str):
    numbers = [(parser.prog, action) for parser in own_parsers() for action in flags_of(parser) if is_number(action)]
    assert {long_name(action) for _, action in numbers} >= {"--temperature", "--top-p"}
    for prog, action in numbers:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is no (finite )?number"):
            action.type(bad)
            pytest.fail(f"{prog} {action.option_strings} takes {bad}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_neither_does_a_snippet(bad: float):
    """LLaVA's own way to ask, an object of attributes, which no parser has seen."""
    asked = {"model_path": "m", "image_file": "i", "sep": ",", "num_beams": 1, "max_new_tokens": 1, "query": ""}
    for temperature, top_p, said in ((bad, None, f"temperature={bad} is "), (0.5, bad, f"top_p={bad} is not above 0")):
        with pytest.raises(ValueError, match=said):
            eval_model(argparse.Namespace(**asked, temperature=temperature, top_p=top_p))


def test_ctrl_c_ends_a_command_in_one_line(capsys):
    def stopped(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    evaluation = next(parser for parser in own_parsers() if parser.prog == "python -m eval run")
    assert run_command("eval", stopped, argparse.Namespace(interrupted=evaluation.get_default("interrupted"))) == 130
    assert run_command("other", stopped, argparse.Namespace()) == 130
    assert capsys.readouterr().err.split("\n") == [
        "",
        "eval: interrupted: the same command goes on from here",
        "",
        "other: interrupted",
        "",
    ]


@pytest.mark.parametrize("name", TRAININGS)
def test_no_training_takes_what_is_no_finite_number(name: str, tmp_path: Path):
    parser = training_parser(name)
    needed = {"model_name_or_path": "m", "data_path": "d", "image_folder": "i", "output_dir": str(tmp_path)}
    known = {action.dest for action in flags_of(parser)}
    words = [word for key, value in needed.items() if key in known for word in (f"--{key}", value)]
    parser.parse_args_into_dataclasses([*words, "--use_cpu", "True"])
    numbers = [action for action in flags_of(parser) if is_number(action)]
    assert len(numbers) > 8 and {"learning_rate", "warmup_steps"} <= {action.dest for action in numbers}
    for action in numbers:
        for bad in ("nan", "-inf"):
            with pytest.raises(ValueError, match=f"--{action.dest} {bad} is no finite number"):
                parser.parse_args_into_dataclasses([*words, f"{long_name(action)}={bad}", "--use_cpu", "True"])


def all_parsers() -> list[argparse.ArgumentParser]:
    return [*own_parsers(), *map(training_parser, TRAININGS)]


def test_help_shows_every_default(monkeypatch: pytest.MonkeyPatch):
    """And says of each command what it does, without the sections of docstrings that are for programmers."""
    monkeypatch.setenv("COLUMNS", "80")
    for parser in all_parsers():
        text = parser.format_help()
        assert "Raises:" not in text and "Args:" not in text, parser.prog
        formatter = parser._get_formatter()
        for action in flags_of(parser):
            shown = formatter._expand_help(action)
            assert "(default: " in shown or "(required)" in shown, (parser.prog, action.option_strings, shown)
            assert action.required or action.nargs == 0 or str(Path.home()) not in shown
        if parser.prog not in TRAININGS:
            assert parser.description, parser.prog
            assert max(map(len, text.splitlines())) <= 80, parser.prog


def test_what_means_the_same_is_spelt_the_same():
    spelt: dict[str, str] = {}
    for parser in own_parsers():
        for action in flags_of(parser):
            first, *others = action.option_strings
            others = [name for name in others if name != first.replace("--", "--no-", 1)]  # a switch and its opposite
            assert first not in OLD and set(others) <= OLD, (parser.prog, action.option_strings)
            for name in others:
                assert spelt.setdefault(name, first) == first
            if first == "--tokens":
                assert "visual tokens to keep per " in action.help
    assert set(spelt) == OLD
    assert not set(spelt) & {name for parser in own_parsers() for name in map(long_name, flags_of(parser))}


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (llava.cli.main, ["chta"], "visionzip: unknown command 'chta': did you mean 'chat'?"),
        (llava.cli.main, ["Chat2"], "did you mean 'chat'?"),
        (llava.cli.main, ["frobnicate"], "unknown command 'frobnicate'; There are chat, demo, visualize, "),
        (llava.cli.main, [], "visionzip: give a command, one of chat, demo, visualize, "),
        (llava.cli.main, ["--verison"], "unknown flag --verison: did you mean --version?"),
        (llava.cli.main, ["benchmark"], "visionzip benchmark: give a command, one of tower, "),
        (llava.cli.main, ["benchmark", "towr"], "visionzip benchmark: unknown command 'towr': did you mean 'tower'?"),
        (llava.cli.main, ["benchmark", "prefill", "--shape", "llava-nxt-7b"], "did you mean 'llava-next-7b'?"),
        (
            llava.cli.main,
            ["benchmark", "prefill", "--method", "fast-v"],
            "argument --method: unknown name 'fast-v': did",
        ),
        (llava.cli.main, ["benchmark", "prefill", "--metod", "fastv"], "unknown flag --metod: did you mean --method?"),
        (llava.cli.main, ["benchmark", "prefill", "fastv"], "visionzip benchmark prefill: fastv: nothing takes"),
        (llava.cli.main, ["benchmark", "prefill", "--rounds", "2.5"], "argument --rounds: '2.5' is no whole number"),
        (llava.cli.main, ["chat"], "visionzip chat: the following arguments are required: --model-path"),
        (llava.cli.main, ["chat", "--model-pth", "m"], "unknown flag --model-pth: did you mean --model-path?\n"),
        (llava.cli.main, ["chat", "--kep", "4"], "flag --kep: did you mean --keep? (missing: --model-path)"),
        (
            llava.cli.main,
            ["chat", "--model-path", "m", "--temperature", "nan"],
            "--temperature: nan is no finite number",
        ),
        (llava.cli.main, ["convert", "a", "b", "--to", "transformer"], "did you mean 'transformers'?"),
        (eval.__main__.main, ["rn"], "python -m eval: unknown command 'rn': did you mean 'run'?"),
        (eval.__main__.main, ["run", "GQA2"], "did you mean 'gqa'? There are activitynet, gqa, "),
        (eval.__main__.main, ["prepare", "texvqa"], "did you mean 'textvqa'?"),
        (eval.__main__.main, ["score", "popee"], "did you mean 'pope'?"),
    ],
)
def test_a_typing_error_is_one_line_that_helps(main, words: list[str], said: str, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out
    assert shown.err.count("\n") == 1 and "usage" not in shown.err


def test_help_needs_no_torch():
    """Help comes at once; the whole of a command is imported when it is called."""
    code = (
        "import sys\nfrom llava.cli import main\n"
        "for words in (['--help'], ['benchmark', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert not end.code\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in [*llava.cli.COMMANDS, *llava.cli.BENCHMARKS])


@pytest.mark.parametrize("device", ["foo", "meta", "xla", "cuda:99"])
def test_devices_that_are_none(device: str, make_checkpoint, tmp_path: Path, scenes_data: Path, capsys):
    """All commands say the same, before the model is loaded."""
    given = ["--model-path", str(make_checkpoint()), "--device", device]
    picture(0).save(tmp_path / "cube.png")
    said = set()
    for main, words in (
        (llava.cli.main, ["chat", *given]),
        (llava.cli.main, ["visualize", *given, "--image", str(tmp_path / "cube.png")]),
        (llava.cli.main, ["benchmark", "tower", "--device", device]),
        (llava.cli.main, ["benchmark", "memory", *given, "--tokens", "6"]),
        (eval.__main__.main, ["run", "scenes", *given, "--data", str(scenes_data), "--output", str(tmp_path / "out")]),
    ):
        assert main(words) == 2
        said.add(capsys.readouterr().err.splitlines()[-1].partition(": ")[2])
    assert len(said) == 1 and said.pop().startswith(f"--device {device} ")
    with pytest.raises(ValueError, match=rf"device='{device}' (is no device|was asked for but)"):
        check_device(device)


def test_folders_that_are_not_there(make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """What can only be a folder is not looked for on the hub, by any command; the one beside it is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llava-mini").symlink_to(make_checkpoint())
    wrong, right = "models/llava-minu", "models/llava-mini"
    for main, words in (
        (llava.cli.main, ["chat", "--model-path", wrong]),
        (llava.cli.main, ["chat", "--model-path", right, "--model-base", wrong]),
        (llava.cli.main, ["benchmark", "generate", "--model-path", wrong, "--tokens", "6"]),
        (llava.cli.main, ["merge", "--model-path", wrong, "--model-base", right, "--output", "out"]),
        (llava.cli.main, ["merge", "--model-path", right, "--model-base", wrong, "--output", "out"]),
        (llava.cli.main, ["convert", wrong, "out", "--to", "transformers"]),
        (eval.__main__.main, ["run", "scenes", "--model-path", wrong, "--output", "out"]),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "there is no folder models/llava-minu: did you mean models/llava-mini?" in err, words
        assert err.count("\n") == 1
    for flag in ("--model_name_or_path", "--vision_tower"):
        words = ["--model_name_or_path", right, "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
        monkeypatch.setattr(sys, "argv", ["train", *words, flag, wrong])
        assert train() == 2
        assert "did you mean models/llava-mini?" in capsys.readouterr().err
