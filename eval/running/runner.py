"""Runs a benchmark: each method at each budget over all questions, with one loaded model; then what the tokens cost.

Everything lies in one folder: ``answers/`` with a file per run in LLaVA's format (and what each process wrote, in
``parts/``), ``cost.json`` with the timings, ``results.json`` and ``table.md``. Run again, it does what is not there
yet, and a killed run goes on where it was. Started by ``torchrun`` or ``accelerate launch``, the processes share the
batches.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import visionzip
from llava.commands.arguments import device_of
from llava.images import AS_STORED
from llava.measure.report import environment
from llava.mm_utils import get_model_name_from_path
from llava.storage.files import write_atomically

from ..benchmark import Benchmark
from ..config import RunConfig
from ..models import kind_of
from ..models.base import Model, Prompt
from ..reading.fingerprint import contents_of
from ..reading.frames import check_context, with_frames
from ..records import Answer, Question
from ..registry import BENCHMARKS
from ..reports.results import summarize
from ..reports.table import write_table
from ..scoring.matching import shortfalls
from .answer_files import answers_file
from .answers import GO_ON, Given, Part, as_answers, open_part, part_path
from .asking import World, answer_all, in_order, world
from .cost import covers, measure_cost, read_cost
from .data import check_files, data_of, judge_of
from .methods import Run, plan, trained_setting
from .scoring import score_all, submit_all, unscored
from .setting import config_of, explicit_budget, git_commit, setting_of, template_for, with_own_language


def run(config: RunConfig) -> None:
    """Answer a benchmark's questions with each method at each budget, and write a table of scores and cost.

    Raises:
        ValueError: a flag, the data or the model is not as it should be, or the output folder has answers of another
            setting. Whatever can be known before the model is loaded is said before.
        OSError: a file is missing or damaged.
    """
    benchmark, own, checkpoint = BENCHMARKS[config.benchmark], world(), config_of(config.model_path)
    kind = kind_of(checkpoint)
    config = with_own_language(_completed(config, benchmark, own, kind), checkpoint)
    budget = explicit_budget(config, checkpoint)
    runs = plan(config.method, config.tokens, config.seeds, budget, config.positions, config.size_bias)
    data = data_of(benchmark, config)
    every = with_frames(data.questions(), config.frames)
    questions = every[: config.limit]
    if not config.skip_bad:
        check_files(questions)
    folder, facts = config.output, {**environment(config.device), "git_commit": git_commit()}
    judge = judge_of(benchmark, config.judge, folder / "judged", config.judge_attempts)
    truth = data.truth() if benchmark.submit or not unscored(benchmark, judge) else None
    setting = setting_of(config, benchmark, checkpoint, kind, every)
    load = _Loader(kind, config, questions, runs)
    answered = _answer(config, benchmark, own, questions, load, setting, facts)
    if answered is None:
        return
    given, cost, made = answered
    limited = len(questions) < len(every)
    answers = {each: as_answers(questions, found) for each, found in given.items()}
    _write_answers(folder, answers, get_model_name_from_path(config.model_path))
    if benchmark.submit is not None and not limited:  # a server wants all answers
        submit_all(benchmark, answers, truth, folder / "submissions")
    scores = score_all(benchmark, answers, truth, judge, limited)
    incomplete = {each.name: notes for each, s in scores.items() if (notes := shortfalls(s.details, benchmark.missing))}
    errors = {each.name: _not_asked(questions, found) for each, found in given.items()}
    _report_incomplete(incomplete, errors)
    results = {
        **_what_ran(config, benchmark, checkpoint),
        "data": data.name,
        "questions": len(questions),
        "of_questions": len(every),
        "limited": limited,
        "incomplete": incomplete,
        "not_asked": errors,
        "processes": own.size,
        "judge": None if judge is None else judge.model,
        "setting": setting,
        "environment": facts,
        "visionzip": visionzip.__version__,
        **summarize(scores, given, cost),
        "cost": cost,
        "answers_made": made,
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1), GO_ON)
    write_table(folder)


def _answer(
    config: RunConfig,
    benchmark: Benchmark,
    own: World,
    questions: Sequence[Question],
    load: _Loader,
    setting: Mapping[str, Any],
    facts: dict[str, Any],
) -> tuple[dict[Run, dict[int, Given]], dict[str, Any], dict[str, Any]] | None:
    """Ask what has no answer yet, and time what the tokens cost.

    Returns:
        By run, what was given for each place; the cost; and what the answers were made with, by the run's name. None in
        all processes but the first, which alone goes on.
    """
    places = range(len(questions))
    with ExitStack() as stack:
        parts = _open_parts(stack, config, load.runs, own.rank, setting, facts, contents_of(questions))
        if own.rank == 0:
            _report_other_code(config.output, parts, facts)
            _report_asked_again(parts, len(questions))
        if not all(place in part.given for part in parts.values() for place in places):
            answer_all(*load(), benchmark, parts, config.batch_size, own)
        own.wait()
        if own.rank > 0:
            return None
        for part in parts.values():
            part.read()
        given = {each: {place: part.given[place] for place in places} for each, part in parts.items()}
        cost = _cost(config.output / "cost.json", setting, load, given)
        return given, cost, {each.name: part.made for each, part in parts.items()}


def _what_ran(config: RunConfig, benchmark: Benchmark, checkpoint: Any) -> dict[str, Any]:
    """What a result file says of the model and of how it was asked."""
    return {
        "benchmark": benchmark.name,
        "model": get_model_name_from_path(config.model_path),
        "model_path": config.model_path,
        "model_base": config.model_base,
        "tuned": getattr(checkpoint, "visionzip", None) is not None,
        "conv_mode": config.conv_mode,
        "images": AS_STORED,
        "positions": config.positions,
        "size_bias": config.size_bias,
        "batch_size": config.batch_size,
    }


def _open_parts(
    stack: ExitStack,
    config: RunConfig,
    runs: Sequence[Run],
    rank: int,
    setting: Mapping[str, Any],
    facts: dict[str, Any],
    contents: Sequence[str],
) -> dict[Run, Part]:
    """This process's part of each run, open until ``stack`` is closed."""
    parts = {}
    for each in runs:
        its = {"method": each.method, "tokens": each.tokens, "budget": each.budget, "seed": each.seed}
        its |= {"positions": each.positions, "size_bias": each.size_bias}
        path = part_path(config.output, each.name, rank)
        parts[each] = stack.enter_context(open_part(path, {**setting, **its}, facts, config.skip_bad, contents))
    return parts


def _cost(
    path: Path, setting: Mapping[str, Any], load: _Loader, given: Mapping[Run, Mapping[int, Given]]
) -> dict[str, Any]:
    """What the visual tokens cost: as the file says, if it is of these answers; else measured, and written there."""
    cost = read_cost(path, setting)
    if cost is None or not covers(cost, given):
        cost = _measure(*load(), given)
        write_atomically(path, json.dumps({"setting": setting, **cost}, indent=1), GO_ON)
    return cost


def _write_answers(folder: Path, answers: Mapping[Run, Sequence[Answer]], model: str) -> None:
    for each, found in answers.items():
        write_atomically(folder / "answers" / f"{each.name}.jsonl", answers_file(found, model, each.name), GO_ON)


def _completed(config: RunConfig, benchmark: Benchmark, own: World, kind: type[Model]) -> RunConfig:
    """The same with what was left open: the template that goes with the model's name, and this process's device."""
    device = device_of(config)
    if own.size > 1 and config.device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    conv_mode = config.conv_mode
    if kind.takes_templates:
        conv_mode = conv_mode or template_for(config.model_path, benchmark)
    elif conv_mode is not None:
        raise ValueError(
            f"--conv-mode {conv_mode}: {config.model_path} has a chat template of its own, so leave the flag out"
        )
    return replace(config, device=device, conv_mode=conv_mode)


class _Loader:
    """Loads the model and makes the prompts when they are asked for the first time."""

    def __init__(
        self, kind: type[Model], config: RunConfig, questions: Sequence[Question], runs: Sequence[Run]
    ) -> None:
        self._arguments = kind, config, questions
        self.runs = runs
        self._ready: tuple[Model, list[Prompt]] | None = None

    def __call__(self) -> tuple[Model, list[Prompt]]:
        kind, config, questions = self._arguments
        if self._ready is None:
            model = kind.load(config)
            model.trained = trained_setting(config_of(config.model_path))
            for each in self.runs:  # what a method refuses, it refuses before the long work
                with model.attached(each):
                    pass
            prompts = in_order(model.prepare(questions))
            check_context(model.inner, prompts, self.runs)
            self._ready = model, prompts
        return self._ready


def _measure(model: Model, prompts: Sequence[Prompt], given: Mapping[Run, Mapping[int, Given]]) -> dict[str, Any]:
    """What the visual tokens of some answers cost, timed on the first image that can be read."""
    loaded = (next(iter(model.visuals_of([prompt]).values()), None) for prompt in prompts)
    image = next((one for one in loaded if one is not None and one.images), None)
    return measure_cost(model, round(fmean(prompt.text_tokens for prompt in prompts)), image, given)


def _report_other_code(folder: Path, parts: Mapping[Run, Part], facts: Mapping[str, Any]) -> None:
    if earlier := {str(part.made.get("git_commit")) for part in parts.values()} - {str(facts["git_commit"])}:
        print(
            f"{folder} has answers of other code (commit {', '.join(sorted(earlier))}), which stay: delete it to "
            "answer all again",
            file=sys.stderr,
        )


def _report_asked_again(parts: Mapping[Run, Part], questions: int) -> None:
    for each, part in parts.items():
        missing = questions - len(part.given)
        if part.changed:
            print(
                f"{each.name}: {len(part.changed)} of {questions} questions are asked again, as their images or videos "
                "are not those that were answered about",
                file=sys.stderr,
            )
        if part.damaged and missing:
            print(
                f"{each.name}: damaged and left out: {'; '.join(part.damaged)}. Their questions are asked again; the "
                f"other {len(part.given)} answers stay",
                file=sys.stderr,
            )


def _not_asked(questions: Sequence[Question], given: Mapping[int, Given]) -> list[dict[str, Any]]:
    return [{"question_id": questions[p].id, "error": one.error} for p, one in given.items() if one.error]


def _report_incomplete(incomplete: Mapping[str, Sequence[str]], errors: Mapping[str, Sequence[Any]]) -> None:
    for name, sentences in incomplete.items():
        print(f"{name} is incomplete: {'; '.join(sentences)}", file=sys.stderr)
    if any(errors.values()):
        name, own = max(errors.items(), key=lambda item: len(item[1]))
        first = "{question_id}: {error}".format(**own[0])
        print(
            f"{name}: {len(own)} questions could not be asked and count as wrong, the first is {first} (without "
            "--skip-bad they are asked again)",
            file=sys.stderr,
        )
