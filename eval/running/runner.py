"""Runs a benchmark: each method at each budget over all questions, with one loaded model; then what the tokens cost.

Everything lies in one folder: ``answers/`` with a file per run in LLaVA's format (and what each process wrote, in
``parts/``), ``cost.json`` with the timings, ``results.json`` and ``table.md``. Run again, it does what is not there
yet, and a killed run goes on where it was. Started by ``torchrun`` or ``accelerate launch``, the processes share the
batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch

import visionzip
from llava.arguments import device_of
from llava.conversation import conv_mode_for
from llava.files import write_atomically
from llava.fingerprint import fingerprint
from llava.images import AS_STORED
from llava.measure.report import environment
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import TOWER_FIELDS
from llava.model.loading import checkpoint_path, find_file

from ..benchmark import Benchmark
from ..config import RunConfig
from ..models import kind_of
from ..models.base import Model, Prompt
from ..reading.fingerprint import checksum_of_bytes, contents_of
from ..reading.frames import check_context, frames_of, with_frames
from ..records import Answer, Question, Score, UnscoredError
from ..registry import BENCHMARKS
from ..reports.results import summarize
from ..reports.table import write_table
from ..scoring.judge import Judge
from ..scoring.matching import asked, shortfalls
from .answers import GO_ON, Given, Part, answers_file, as_answers, open_part, part_path
from .asking import World, answer_all, in_order, world
from .cost import covers, measure_cost, read_cost
from .data import CLONE, check_files, data_of, judge_of
from .methods import Run, plan


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
    contents = contents_of(questions)
    with ExitStack() as stack:
        parts = {}
        for each in runs:
            its = {"method": each.method, "tokens": each.tokens, "budget": each.budget, "seed": each.seed}
            its |= {"positions": each.positions, "size_bias": each.size_bias}
            path = part_path(folder, each.name, own.rank)
            parts[each] = stack.enter_context(open_part(path, {**setting, **its}, facts, config.skip_bad, contents))
        if own.rank == 0:
            _report_other_code(folder, parts, facts)
            _report_asked_again(parts, len(questions))
        load = _Loader(kind, config, questions, runs)
        if not all(place in part.given for part in parts.values() for place in range(len(questions))):
            answer_all(*load(), benchmark, parts, config.batch_size, own)
        own.wait()
        if own.rank > 0:
            return
        for part in parts.values():
            part.read()
        given = {each: {place: part.given[place] for place in range(len(questions))} for each, part in parts.items()}
        cost = read_cost(folder / "cost.json", setting)
        if cost is None or not covers(cost, given):
            cost = _measure(*load(), given)
            write_atomically(folder / "cost.json", json.dumps({"setting": setting, **cost}, indent=1), GO_ON)
        made = {each.name: part.made for each, part in parts.items()}
    model_name = get_model_name_from_path(config.model_path)
    answers = {each: as_answers(questions, found) for each, found in given.items()}
    limited = len(questions) < len(every)
    for each, found in answers.items():
        write_atomically(folder / "answers" / f"{each.name}.jsonl", answers_file(found, model_name, each.name), GO_ON)
    if benchmark.submit is not None and not limited:  # a server wants all answers
        submit_all(benchmark, answers, truth, folder / "submissions")
    scores = score_all(benchmark, answers, truth, judge, limited)
    incomplete = {each.name: notes for each, s in scores.items() if (notes := shortfalls(s.details, benchmark.missing))}
    errors = {each.name: _not_asked(questions, found) for each, found in given.items()}
    _report_incomplete(incomplete, errors)
    results = {
        "benchmark": benchmark.name,
        "model": model_name,
        "model_path": config.model_path,
        "model_base": config.model_base,
        "tuned": getattr(checkpoint, "visionzip", None) is not None,
        "data": data.name,
        "questions": len(questions),
        "of_questions": len(every),
        "limited": limited,
        "incomplete": incomplete,
        "not_asked": errors,
        "conv_mode": config.conv_mode,
        "images": AS_STORED,
        "positions": config.positions,
        "size_bias": config.size_bias,
        "batch_size": config.batch_size,
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
        self._arguments = kind, config, questions, runs
        self._ready: tuple[Model, list[Prompt]] | None = None

    def __call__(self) -> tuple[Model, list[Prompt]]:
        kind, config, questions, runs = self._arguments
        if self._ready is None:
            model = kind.load(config)
            for each in runs:  # what a method refuses, it refuses before the long work
                with model.attached(each):
                    pass
            prompts = in_order(model.prepare(questions))
            check_context(model.inner, prompts, runs)
            self._ready = model, prompts
        return self._ready


def _measure(model: Model, prompts: Sequence[Prompt], given: Mapping[Run, Mapping[int, Given]]) -> dict[str, Any]:
    """What the visual tokens of some answers cost, timed on the first image that can be read."""
    loaded = (next(iter(model.visuals_of([prompt]).values()), None) for prompt in prompts)
    image = next((one for one in loaded if one is not None and one.images), None)
    return measure_cost(model, round(fmean(prompt.text_tokens for prompt in prompts)), image, given)


def unscored(benchmark: Benchmark, judge: Judge | None) -> str | None:
    """Why answers are written, but not scored; None where they are."""
    if benchmark.score is None:
        return "its server scores"
    if not benchmark.judged or judge is not None:
        return None
    return f"give --judge MODEL{', or --judge exact for a proxy,' if benchmark.proxy else ''} to score it"


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


def submit_all(benchmark: Benchmark, answers: Mapping[Run, Sequence[Answer]], truth: Any, folder: Path) -> None:
    """Write what a server wants of some runs, each into a folder of its own."""
    for run, own in answers.items():
        print(f"for the server: {benchmark.submit(own, truth, folder / run.name)}", file=sys.stderr)


def score_all(
    benchmark: Benchmark, answers: Mapping[Run, Sequence[Answer]], truth: Any, judge: Judge | None, limited: bool
) -> dict[Run, Score]:
    """Scores of some runs, as far as they can be had here; of limited ones, over what was asked."""
    part_of = benchmark.asked or asked
    scores = {}
    for run, own in answers.items():
        if why := unscored(benchmark, judge):
            print(f"{run.name}: answers are written, not scored: {why}", file=sys.stderr)
            continue
        try:
            scores[run] = benchmark.score(own, part_of(own, truth) if limited else truth, judge)
        except UnscoredError as error:
            print(f"{run.name}: answers are written, not scored: {error}", file=sys.stderr)
    return scores


def explicit_budget(config: RunConfig, checkpoint: Any) -> tuple[int, int] | None:
    """K and M of ``--dominant`` and ``--contextual``, else, without ``--tokens``, the checkpoint's own.

    Raises:
        ValueError: only one of the two is given, no method that has a budget, or the checkpoint's own setting has no K
            and M.
    """
    given = config.dominant, config.contextual
    if given != (None, None):
        if None in given:
            raise ValueError(
                f"--dominant {given[0]} --contextual {given[1]}: give both, or --tokens for the paper's split"
            )
        if set(config.method) == {"vanilla"}:
            raise ValueError(
                f"--method vanilla keeps all visual tokens, but --dominant {given[0]} --contextual {given[1]} were "
                "given too: choose one"
            )
        visionzip.VisionZipConfig(*given)  # checks them
        return given
    own = getattr(checkpoint, "visionzip", None)
    if not own or config.tokens or set(config.method) == {"vanilla"}:
        return None
    setting = visionzip.VisionZipConfig.from_dict(own)
    if setting.keep is not None:
        raise ValueError(
            f"{config.model_path} has the setting method={setting.method!r} {setting} of its own: say what to run with "
            f"--method {setting.method} and --tokens, a number"
        )
    return setting.dominant, setting.contextual


def with_own_language(config: RunConfig, checkpoint: Any) -> RunConfig:
    """The same with the checkpoint's own positions and size bias where its own K and M are run, unless flags say."""
    stored = getattr(checkpoint, "visionzip", None)
    if not stored or config.tokens or config.dominant is not None or "visionzip" not in config.method:
        return config
    own = visionzip.VisionZipConfig.from_dict(stored)
    size_bias = own.size_bias if config.size_bias is None else config.size_bias
    return replace(config, positions=config.positions or own.positions, size_bias=size_bias)


def template_for(model_path: str, benchmark: Benchmark) -> str:
    """The template that the evaluation scripts of LLaVA and Video-LLaVA use for a checkpoint.

    That of its name; of the two of Vicuna the one that the benchmark names (LLaVA's chat takes ``llava_v1``).
    """
    mode = conv_mode_for(get_model_name_from_path(model_path))
    return benchmark.conv_mode if mode in ("llava_v1", "vicuna_v1") else mode


def config_of(model_path: str) -> Any:
    """A checkpoint's ``config.json``.

    Raises:
        FileNotFoundError: it has none.
    """
    config = find_file(checkpoint_path(model_path, "--model-path"), "config.json")
    if config is None:
        raise FileNotFoundError(f"--model-path {model_path} has no config.json: give a checkpoint's folder or hub name")
    return SimpleNamespace(**json.loads(Path(config).read_text(encoding="utf-8")))


def setting_of(
    config: RunConfig, benchmark: Benchmark, checkpoint: Any, kind: type[Model], questions: Sequence[Question]
) -> dict[str, Any]:
    """Everything that decides the answers of all runs; it is written into their files and must not change in them."""
    towers = [getattr(checkpoint, field, None) for field in TOWER_FIELDS]
    # Where a tower has no folder, its weights are in the checkpoint, or its name (in the config) says enough.
    parts = [config.model_path, config.model_base, *(tower for tower in towers if tower and Path(tower).is_dir())]
    return {
        "benchmark": benchmark.name,
        "model": fingerprint(*filter(None, parts)),
        "bits": 8 if config.load_8bit else 4 if config.load_4bit else None,
        "device": config.device.split(":")[0],
        "frames": frames_of(questions),
        "first_prompt": kind.first_prompt(questions[0], config, checkpoint),
        "max_new_tokens": benchmark.max_new_tokens,
        "data": checksum_of(questions),
    }


def checksum_of(questions: Sequence[Question]) -> str:
    """A checksum of what some questions ask, and of the names of their images."""
    facts = [[q.id, q.text, [Path(visual.key).name for visual in q.visuals]] for q in questions]
    return checksum_of_bytes(json.dumps(facts).encode())


def git_commit() -> str:
    """The repository's commit, with ``-dirty`` where files differ from it; elsewhere the version, as ``v0.1.0``."""
    version = f"v{visionzip.__version__}"
    if CLONE is None:  # a folder around an installed package may be a repository, too
        return version
    command = ["git", "-C", str(CLONE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version
