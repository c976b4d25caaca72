"""``python -m eval run NAME`` with its flags from the environment: what the scripts in ``scripts/eval`` start.

=======================  ================================================================  =========================
MODEL_PATH               checkpoint, folder or hub name                                    liuhaotian/llava-v1.5-7b;
                                                                                           about videos
                                                                                           LanguageBind/Video-LLaVA-7B
METHOD                   vanilla, visionzip, …; several with spaces between                vanilla, or visionzip if
                                                                                           there is a budget
DOMINANT, CONTEXTUAL     VisionZip's budget, per image, tile or frame
DATA_ROOT                folder with the benchmarks' data                                  playground/data/eval
FROM_HUB                 1: the Hugging Face data set; else a local copy of it, or a
                         folder with copies of several
OUTPUT                   folder of the results                                             results/NAME/MODEL/METHOD
CUDA_VISIBLE_DEVICES     several: each answers a share of the questions
PROCESSES                how many processes answer                                         one for each such device
=======================  ================================================================  =========================

Further arguments are flags of ``python -m eval run``, and come last, so that they count.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .sharing import shared

_FLAGS = {"DOMINANT": "--dominant", "CONTEXTUAL": "--contextual", "DATA_ROOT": "--data-root"}

_VIDEO = ("activitynet", "msrvtt", "msvd", "tgif")


def arguments(name: str, more: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Arguments of ``python -m eval`` for a benchmark; a variable that is empty counts as not set."""
    given = {key: value for key, value in environment.items() if value}
    model = given.get("MODEL_PATH", "LanguageBind/Video-LLaVA-7B" if name in _VIDEO else "liuhaotian/llava-v1.5-7b")
    budget = [given[key] for key in ("DOMINANT", "CONTEXTUAL") if key in given]
    methods = given.get("METHOD", "visionzip" if budget else "vanilla").split()
    place = "-".join([*methods, *(["+".join(budget)] if budget else [])])
    output = given.get("OUTPUT", str(Path("results", name, Path(model).name, place)))
    flags = ["--model-path", model, "--method", *methods, "--output", output]
    for key, flag in _FLAGS.items():
        flags += [flag, given[key]] if key in given else []
    if "FROM_HUB" in given:
        flags += ["--from-hub", *([] if given["FROM_HUB"] == "1" else [given["FROM_HUB"]])]
    return ["run", name, *flags, *more]


def processes(environment: Mapping[str, str]) -> int:
    """How many processes share the questions.

    Raises:
        ValueError: ``PROCESSES`` is no number of at least 1.
    """
    devices = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    wanted = environment.get("PROCESSES") or str(len(devices) or 1)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"PROCESSES={wanted}: it must be a number of processes, at least 1")
    return int(wanted)


def main(argv: Sequence[str]) -> int:
    """Run a benchmark, in this process or in several; returns the exit status."""
    name, *more = argv or ["--help"]
    try:
        number = processes(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    command = arguments(name, more, os.environ)
    if number > 1:
        os.execv(sys.executable, shared(number, command))
    from .__main__ import main as evaluate  # noqa: PLC0415 - slow to import, and several processes do so themselves

    return evaluate(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
