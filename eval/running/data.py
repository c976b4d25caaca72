"""Where a benchmark's questions and truth come from, and by whom answers are judged, as the flags say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import COMMAND
from ..benchmark import Benchmark
from ..reading.tables import Tables
from ..records import Question
from ..scoring.judge import ATTEMPTS, EXACT, Judge, api_judge, exact_judge

_HERE = Path(__file__).resolve().parents[1]
CLONE = _HERE.parent if _HERE.name == "eval" else None
"""The repository's root; None of an installed package, which has another name."""

DATA_ROOT = (CLONE or Path()) / "playground" / "data" / "eval"


class Data:
    """A benchmark's questions, and what their answers are compared with.

    Args:
        benchmark: which.
        folder: LLaVA's folder.
        tables: rows from the hub or of parquet files; they come before the folder.
    """

    def __init__(self, benchmark: Benchmark, folder: Path, tables: Tables | None = None) -> None:
        self.benchmark = benchmark
        self.folder = folder
        self.tables = tables

    def questions(self) -> list[Question]:
        """All questions, in the order of the answers file."""
        benchmark = self.benchmark
        found = benchmark.from_folder(self.folder) if self.tables is None else benchmark.from_tables(self.tables)
        if not found:
            raise ValueError(f"{benchmark.name} has no questions in {self.name}: fetch the data again")
        return found

    def truth(self) -> Any:
        """What answers are compared with."""
        if self.tables is None:
            return self.benchmark.truth_from_folder(self.folder)
        return self.benchmark.truth_from_tables(self.tables)

    @property
    def name(self) -> str:
        """Where the data is from."""
        return str(self.folder) if self.tables is None else str(self.tables)


def data_of(benchmark: Benchmark, args: Any) -> Data:
    """The data that ``--data``, ``--data-root`` and ``--from-hub`` name.

    Raises:
        ValueError: the benchmark is not on the hub.
    """
    folder = Path(args.data) if args.data else Path(args.data_root or DATA_ROOT) / benchmark.folder
    if getattr(args, "from_hub", None) is None:
        return Data(benchmark, folder)
    if not benchmark.tables or benchmark.from_tables is None:
        raise ValueError(f"{benchmark.name} has no data set on the hub: leave --from-hub out, and see --data")
    source = copy_of(benchmark, args.from_hub) if args.from_hub else None
    return Data(benchmark, folder, Tables(benchmark.tables, source))


def copy_of(benchmark: Benchmark, folder: str) -> Path:
    """A benchmark's own copy of its data set in a folder with several (``DIR/lmms-lab/POPE``, ``DIR/POPE``), or DIR."""
    dataset = next(iter(benchmark.tables.values())).dataset
    inside = (Path(folder) / dataset, Path(folder) / dataset.rsplit("/", 1)[-1])
    return next((path for path in inside if path.is_dir()), Path(folder))


def judge_of(benchmark: Benchmark, name: str | None, cache: Path, attempts: int = ATTEMPTS) -> Judge | None:
    """The judge that ``--judge`` names: a model behind ``OPENAI_BASE_URL``, or ``exact``; None without one.

    Args:
        benchmark: that it judges.
        name: as the flag has it.
        cache: folder of its replies.
        attempts: ``--judge-attempts``, how often it is asked about one answer until a reply can be read.

    Raises:
        ValueError: there is no proxy for it, or no key.
    """
    if not benchmark.judged or name is None:
        return None
    if name != EXACT:
        return api_judge(name, cache, attempts=attempts)
    if not benchmark.proxy:
        raise ValueError(f"--judge exact: {benchmark.name} compares long answers, for which there is no proxy")
    return exact_judge()


def missing_files(questions: Sequence[Question]) -> tuple[list[str], int]:
    """Images and videos that are not where they should be, and how many files there should be."""
    paths = {visual.path: None for question in questions for visual in question.visuals if visual.path is not None}
    return [str(path) for path in paths if not path.is_file()], len(paths)


def check_files(questions: Sequence[Question]) -> None:
    """Check that the images and videos that are files are there.

    Raises:
        FileNotFoundError: some are not; the message counts them.
    """
    missing, number = missing_files(questions)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {number} images or videos are missing ({', '.join(missing[:3])}): "
            f"`{COMMAND} prepare` says where they come from; --skip-bad counts their questions as wrong instead"
        )
