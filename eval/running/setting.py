"""What decides a run's answers, as flags and checkpoint have it: template, budget, positions, and a note of it all."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import visionzip
from llava.conversation import conv_mode_for
from llava.mm_utils import get_model_name_from_path
from llava.model.checkpoints.configs import TOWER_FIELDS
from llava.model.checkpoints.files import checkpoint_path, find_file
from llava.storage.fingerprint import fingerprint

from ..benchmark import Benchmark
from ..config import RunConfig
from ..models.base import Model
from ..reading.fingerprint import checksum_of_bytes
from ..reading.frames import frames_of
from ..records import Question
from .data import CLONE


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
