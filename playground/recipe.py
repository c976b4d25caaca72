"""What the recipes of both embedded models share: the steps of their scripts, and the record of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.commands.parsers import Parser
from llava.train.running.run import plot_losses

Step = tuple[str, Callable[[Path, Path], None], str]
"""A step's name, its function of what it reads and the folder that it writes, and what it reads in words."""


def run_step(description: str | None, steps: Sequence[Step]) -> int:
    """Run the step that the command line names; the exit status."""
    parser = Parser(description=description)
    named = parser.add_subparsers(required=True, metavar="STEP")
    for name, function, source in steps:
        step = named.add_parser(name, help=function.__doc__)
        step.add_argument("source", type=Path, help=source)
        step.add_argument("out", type=Path, help="folder to write")
        step.set_defaults(run=function)
    args = parser.parse_args()
    args.run(args.source, args.out)
    return 0


def write_record(run: Path, stages: Sequence[str], folder: Path) -> None:
    """Write what is known of a run's training: ``losses.png``, and ``training.json`` with facts of each stage."""
    records = {stage: json.loads((run / stage / "run.json").read_text()) for stage in stages}
    plot_losses({stage: record["losses"] for stage, record in records.items()}, folder / "losses.png")
    facts = {
        stage: {
            "seconds": int((run / f"done-{stage}").read_text().split()[0]),
            "steps": record["losses"][-1]["step"],
            "images_seen": record["losses"][-1]["step"] * record["batch_per_step"],
            **{key: record[key] for key in ("pair_accuracy", "versions") if key in record},
        }
        for stage, record in records.items()
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
