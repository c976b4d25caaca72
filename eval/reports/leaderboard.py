"""``python -m eval leaderboard``: every method on both sets of scenes, as one table, one JSON file and one plot.

The answers are those of ``eval run scenes``, one run for each set, which lie below ``--runs`` and are gone on with when
the command is killed. Then each method's choosing is timed on one image, interleaved.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.commands.arguments import device_of
from llava.commands.screen import print_table, say
from llava.measure.meters.timing import time_interleaved
from llava.methods import METHODS
from llava.mm_utils import get_model_name_from_path
from llava.storage.files import write_atomically

from ..benchmarks import scenes
from ..config import RunConfig
from ..models import kind_of
from ..running.data import CLONE
from ..running.methods import plan
from ..running.runner import run
from ..running.setting import config_of
from ..sharing import shared
from .leaderboard_plot import draw
from .table import markdown, with_error

TOKENS = (48, 32, 16)
SEED = 777  # of the second set, on which nothing was tuned
ROUNDS = 101  # of the timing, which is a matter of milliseconds

Board = dict[str, Any]

_INSIDE = (
    "; fastv and sparsevlm: tokens left after their one cut inside the language model, before which its layers see all"
)
_RESIZE = "; resize: a smaller picture, with the visual tokens in brackets, as it has whole rows of them"
_CHOOSING = (
    "Choosing: one image at {} tokens, from what was read of the encoder, the fastest of "
    f"{ROUNDS} interleaved rounds, as others at work only add to it (on a CPU by one thread); '-': there is none "
    "before the language model. "
)


def default_methods() -> list[str]:
    """Every method of a LLaVA; of those that prune inside the language model only the reading of T that has one cut."""
    return [name for name, method in METHODS.items() if not name.endswith("-average") and not method.of_picture]


def leaderboard(args: argparse.Namespace) -> None:
    """Answer both sets of scenes with each method, and write ``leaderboard.md``, ``.json`` and ``.svg``.

    The sets are the one that the repository ships, and one of another seed, which is drawn first. A killed command
    goes on where it was.

    Raises:
        ValueError: this is no clone of the repository, or a run has failed; it has said why.
        ImportError: matplotlib is not installed.
        OSError: a file is missing or damaged.
    """
    import matplotlib  # noqa: F401, PLC0415 - an extra; said before the long work

    model = get_model_name_from_path(args.model_path)
    runs = Path(args.runs or Path("results", "leaderboard", model))
    config = replace(RunConfig.from_flags(args), batch_size=32)
    each = {
        name: replace(config, data=str(data), output=runs / name.replace(" ", "-"))
        for name, data in test_sets(runs).items()
    }
    processes = args.processes or default_processes()
    results = {name: _answer(name, own, processes) for name, own in each.items()}
    board = join(results, _time(each["shipped"]), args.tokens)
    folder = Path(args.output)
    write_atomically(folder / "leaderboard.json", json.dumps(board, indent=1) + "\n")
    write_atomically(folder / "leaderboard.svg", partial(draw, board))
    table = lines(board, "<br>")
    write_atomically(folder / "leaderboard.md", "\n".join([f"# {title(board)}\n", markdown(table), facts(board), ""]))
    shown = lines(board, " ")
    print_table(title(board), shown[0], shown[1:], left=shown[0][:1])
    say(facts(board), "dim")
    say(f"written: {folder / 'leaderboard.md'}, .json, .svg")


def test_sets(folder: Path) -> dict[str, Path]:
    """The files of the two sets by name; that of another seed is drawn into a folder if it is not there yet.

    Raises:
        ValueError: this is no clone of the repository.
    """
    if CLONE is None:
        raise ValueError("the leaderboard draws its scenes with playground/: run it in a clone of the repository")
    from playground.scenes import TEST_SET, make_test_set, write_parquet  # noqa: PLC0415 - of the repository alone

    other = folder / f"seed-{SEED}.parquet"
    if not other.is_file():
        write_parquet(list(make_test_set(seed=SEED)), other)
    return {"shipped": TEST_SET, f"seed {SEED}": other}


def _answer(name: str, config: RunConfig, processes: int) -> dict[str, Any]:
    """Let ``eval run`` answer a set, here or in several processes; returns its ``results.json``.

    Raises:
        ValueError: it has failed.
    """
    say(f"{name}: {config.data}", "bold")
    if processes == 1:
        with redirect_stdout(io.StringIO()):  # the board is printed instead of its table
            run(config)
    else:
        command = shared(processes, ["run", config.benchmark, *config.flags()])
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if status := subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise ValueError(f"the run on the set {name!r} ended with status {status}; what it said is above")
    return json.loads((config.output / "results.json").read_text(encoding="utf-8"))


def default_processes() -> int:
    """One for each GPU; without any, two where there are two cores, as a small model hardly gains from threads."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def _time(config: RunConfig) -> dict[tuple[str, int], float]:
    """Seconds that methods take to choose one image's tokens, by method and budget: the fastest round's."""
    kind = kind_of(config_of(config.model_path))
    template = config.conv_mode or ("vicuna_v1" if kind.takes_templates else None)
    model = kind.load(replace(config, device=device_of(config), conv_mode=template))
    (prompt,) = model.prepare(scenes.questions(Path(config.data))[:1])
    (loaded,) = model.visuals_of([prompt]).values()
    planned = plan(config.method, config.tokens, 1, None, config.positions, config.size_bias)
    runs = {each.name: each for each in planned if each.tokens and not each.inside}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for as little as this, to wake up others takes longer than the work
    try:
        with torch.inference_mode():
            ways = model.choosing(loaded, list(runs.values()))
            seconds = time_interleaved(ways, model.device, ROUNDS, "time, choosing") if ways else {}
    finally:
        torch.set_num_threads(threads)
    return {(runs[name].method, runs[name].tokens): min(own.total) for name, own in seconds.items()}


def join(
    results: Mapping[str, Mapping[str, Any]], choosing: Mapping[tuple[str, int], float], tokens: Sequence[int]
) -> Board:
    """Put the results of both sets into one board, the best method first, ready for JSON.

    Args:
        results: ``results.json`` of a run on each set.
        choosing: seconds by method and budget.
        tokens: the budgets.

    Returns:
        ``methods`` (each with ``scores`` by set and budget: accuracy and its standard error in percent, what it is
        ahead of VisionZip, paired, in points; ``choosing_ms`` by budget, None inside the language model), and facts.
    """
    methods = {}
    for name in dict.fromkeys(row["method"] for row in next(iter(results.values()))["rows"]):
        scores = {each: _scores(found, name, tokens) for each, found in results.items()}
        every = [entry["accuracy"] for of_set in scores.values() for entry in of_set.values()]
        times = {}
        for budget in tokens if name != "vanilla" else ():
            seconds = choosing.get((name, budget))
            times[str(budget)] = None if seconds is None else 1e3 * seconds
        about = {"summary": METHODS[name].summary, "paper": METHODS[name].paper}
        methods[name] = {**about, "mean": statistics.fmean(every), "choosing_ms": times, "scores": scores}
    first = next(iter(results.values()))
    best = sorted(methods, key=lambda name: (name != "vanilla", -methods[name]["mean"]))
    return {
        "model": first["model"],
        "tokens": list(tokens),
        "patches": max(row["visual_tokens"] for row in first["rows"]),
        "questions": {name: found["questions"] for name, found in results.items()},
        "limited": any(found["limited"] for found in results.values()),
        "seeds": max(len(row["seeds"]) for row in first["rows"]),
        "environment": first["environment"],
        "visionzip": first["visionzip"],
        "methods": {name: methods[name] for name in best},
    }


def _scores(results: Mapping[str, Any], method: str, tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """One method's scores on one set, by the budget's digits; vanilla's are the same at all."""
    rows = {row["tokens"]: row for row in results["rows"] if row["method"] == method}
    behind = {(entry["tokens"], entry["minus"]): entry for entry in results["differences"]}
    found = {}
    for budget in tokens:
        row, entry = rows[None if method == "vanilla" else budget], behind.get((budget, method))
        ahead = entry and {"points": -entry["difference"], "standard_error": entry["standard_error"]}
        own = {"accuracy": row["score"], "standard_error": row["standard_error"], "ahead_of_visionzip": ahead}
        found[str(budget)] = {**own, "visual_tokens": row["visual_tokens"], "by_type": row["parts"]}
    return found


def title(board: Board) -> str:
    """What the table is about."""
    return f"Scenes: {board['model']}{' (partial)' if board['limited'] else ''}"


def lines(board: Board, between: str) -> list[list[str]]:
    """Header and rows: accuracy at each budget on each set, what it is ahead of VisionZip, and the time of choosing.

    Args:
        board: from :func:`join`.
        between: stands between the two figures of a cell.
    """
    budgets, sets = [str(number) for number in board["tokens"]], list(board["questions"])
    header = ["method", *(f"{budget} tokens, {name}" for budget in budgets for name in sets)]
    found = [[*header, "choosing, ms"] if _is_timed(board) else header]
    for name, method in board["methods"].items():
        cells = []
        for budget in budgets:
            for each in sets:
                entry = method["scores"][each][budget]
                text = with_error(entry["accuracy"], entry["standard_error"])
                if ahead := entry["ahead_of_visionzip"]:
                    text += f"{between}({with_error(ahead['points'], ahead['standard_error'], '+')})"
                cells.append(text)
        if _is_timed(board):
            times = [method["choosing_ms"].get(budget) for budget in budgets]
            cells.append(" / ".join(f"{ms:.2g}" for ms in times if ms is not None) or "-")
        found.append([_label(board, name), *cells])
    return found


def _is_timed(board: Board) -> bool:
    """Whether choosing was timed, which is known of LLaVA's own models."""
    return any(ms is not None for method in board["methods"].values() for ms in method["choosing_ms"].values())


def _label(board: Board, name: str) -> str:
    """A method's name, with its visual tokens where they are not the budget's."""
    if name == "vanilla":
        return f"{name} ({board['patches']:.4g})"
    if name == "resize":
        entries = next(iter(board["methods"][name]["scores"].values())).values()
        return f"{name} ({' / '.join(format(entry['visual_tokens'], '.4g') for entry in entries)})"
    return name


def facts(board: Board) -> str:
    """What the figures are and how they came about."""
    where, questions = board["environment"], " and ".join(f"{n} ({name})" for name, n in board["questions"].items())
    has, budgets = board["methods"].keys(), " / ".join(map(str, board["tokens"]))
    return (
        f"Exact match in percent on {questions} questions, ± standard error by bootstrap over questions; in brackets "
        "points ahead of visionzip at the same budget, paired by question; best mean first. "
        f"vanilla has all {board['patches']:.4g} visual tokens at each budget"
        f"{'; random: mean of ' + str(board['seeds']) + ' seeds' if 'random' in has else ''}"
        f"{_RESIZE if 'resize' in has else ''}{_INSIDE if has & {'fastv', 'sparsevlm'} else ''}. "
        f"{_CHOOSING.format(budgets) if _is_timed(board) else ''}"
        f"`python -m eval leaderboard`, {where['date']}, {where['device']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['git_commit']}."
    )
