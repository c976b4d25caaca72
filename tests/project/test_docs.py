"""What README and docs say holds: links lead somewhere, commands parse, code imports, figures are those measured."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from documented import ROOT, blocks, commands, parse_command, prose

import eval.__main__
import llava.cli
from eval.registry import BENCHMARKS
from visionzip.integrations import REGISTRY
from visionzip.methods import METHODS

PAGES_OUTSIDE = "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"
PAGES = [
    *(ROOT / name for name in PAGES_OUTSIDE),
    *sorted((ROOT / "checkpoints").glob("*/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_short_and_the_two_commands_are_in_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 150
    assert {"bash scripts/quickstart.sh", "bash scripts/test.sh"} <= set(
        "\n".join(blocks(PAGES[0], "bash")).splitlines()
    )


# --- links ---


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@each_page
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


# --- commands ---


@each_page
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]):
    for code in blocks(page, "bash"):
        for environment, words in commands(code):
            try:
                parse_command(environment, words)
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")


@each_page
def test_commands_in_sentences_exist(page: Path):
    """Those in backticks: the script, module or subcommand."""
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        match text.split():
            case ["bash", script, *_]:
                assert (ROOT / script).exists(), text
            case ["python", "-m", "eval", name, *_]:
                assert name in (*eval.__main__.COMMANDS, "…"), text
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), text
            case ["visionzip", name, *_]:
                assert name in (*llava.cli.COMMANDS, "COMMAND", "…"), text


def test_all_commands_are_documented():
    table = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert not [name for name in llava.cli.COMMANDS if f"`visionzip {name}" not in table]
    rows = [line for line in table.splitlines() if line.startswith("| `visionzip benchmark")]
    assert not [name for name in llava.cli.BENCHMARKS if f"{name}`" not in "".join(rows)]


# --- code ---


@each_page
def test_code_compiles_and_imports_what_it_names(page: Path):
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def test_architecture_names_functions_where_they_are():
    """In a row of its tables: what is in backticks stands in one of the files that the row links to."""
    page = ROOT / "docs/architecture.md"
    checked = 0
    for row in re.findall(r"^\|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE):
        files = [page.parent / link for link in re.findall(r"\]\(([^)]+\.py)\)", row)]
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]{3,})`", row) if files else []:
            assert re.search(rf"\b{name}\b", text), f"{name} is in none of {[file.name for file in files]}"
            checked += 1
    assert checked > 20


def test_the_benchmark_of_the_reference_works(tmp_path: Path):
    (code,) = blocks(ROOT / "docs/reference/eval.md", "python")
    exec(code, benchmark := {})
    lines = [
        {"question_id": "a", "image": "a.jpg", "text": "Is it?"},
        {"question_id": "b", "image": "b.jpg", "text": "?"},
    ]
    truth = [{"question_id": "a", "answer": "yes"}, {"question_id": "b", "answer": "no"}]
    for name, rows in (("questions", lines), ("truth", truth)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = benchmark["BENCHMARK"]
    assert [question.id for question in own.from_folder(tmp_path)] == ["a", "b"]
    answers = [benchmark["Answer"]("a", "Yes"), benchmark["Answer"]("b", "yes")]
    assert own.score(answers, own.truth_from_folder(tmp_path), None).score == 50


# --- what there is ---


def test_every_method_family_and_benchmark_is_described():
    methods = anchors(ROOT / "docs/methods.md")
    words = {word for anchor in methods for word in re.split(r"-(?=random|uniform|pool|contextual|no-)", anchor)}
    assert {*METHODS, "fastv", "sparsevlm"} <= words | methods
    models = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    entries = [
        entry for name, entry in REGISTRY.items() if name.startswith(("transformers.models", "llava.model.llava"))
    ]
    families = {name.split(" (")[0] for entry in entries for name in re.split(", | and ", entry.family)}
    assert not [family for family in families if family not in models]
    benchmarks = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert not [name for name in BENCHMARKS if f"`{name}`" not in benchmarks]


# --- figures ---


def table_behind(page: str, mark: str) -> list[list[str]]:
    """Cells of the table behind ``<!-- figures: mark -->``, without its head."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = text.split(f"<!-- figures: {mark} -->\n", 1)[1].splitlines()
    rows = lines[2 : next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def leaderboard() -> dict:
    file = ROOT / "docs/measured/leaderboard.json"
    if not file.exists():
        pytest.skip("docs/measured/leaderboard.json is not there: python -m eval leaderboard writes it")
    return json.loads(file.read_text(encoding="utf-8"))["methods"]


def test_readme_has_the_leaderboards_figures():
    board = leaderboard()
    for names, _, *figures in table_behind("README.md", "docs/measured/leaderboard.json"):
        scores = board[re.findall(r"`([\w-]+)`", names)[0]]["scores"]["shipped"]
        expected = [f"{scores[t]['accuracy']:.1f} ± {scores[t]['standard_error']:.1f}" for t in ("48", "32", "16")]
        assert figures == expected, names


def test_results_are_the_leaderboards():
    """By type of question too: other runs of the same answers."""
    board, checked = leaderboard(), 0
    for row in re.findall(
        r"^\| ([a-z-]+)(?: \d+\+\d+)? \| (\d+) \| (.*) \|$", (ROOT / "docs/results.md").read_text(), re.M
    ):
        scores = board[row[0]]["scores"]["shipped"].get(row[1], board[row[0]]["scores"]["shipped"]["48"])
        cells = row[2].split(" | ")
        assert cells[:7] == [f"{value:.1f}" for value in scores["by_type"].values()], row[:2]
        assert cells[7] == f"{scores['accuracy']:.1f} ± {scores['standard_error']:.1f}", row[:2]
        checked += 1
    assert checked == 13 + 12 + 10


def test_results_have_the_small_qwens_figures():
    file = "docs/measured/qwen-mini/leaderboard.json"
    scores = {
        (name, f"{entry['visual_tokens']:.0f}"): entry
        for name, method in json.loads((ROOT / file).read_text(encoding="utf-8"))["methods"].items()
        for entry in method["scores"]["shipped"].values()
    }
    for page in ("docs/results.md", "checkpoints/qwen-mini/README.md"):
        for label, *figures in table_behind(page, file):
            entry = scores[tuple(label.split(", "))]
            expected = [f"{value:.1f}" for value in entry["by_type"].values()]
            assert figures == [*expected, f"{entry['accuracy']:.1f} ± {entry['standard_error']:.1f}"], (page, label)
    assert len(table_behind("docs/results.md", file)) == len(scores)


def test_readme_has_the_measured_speeds():
    measured = (ROOT / "docs/efficiency.md").read_text(encoding="utf-8").splitlines()
    for name, _, *figures in table_behind("README.md", "docs/efficiency.md"):
        assert any(all(f"| {figure} |" in line for figure in figures) for line in measured), name


def test_budgets_have_the_papers_figures():
    tables = {table["number"]: table for table in json.loads((ROOT / "eval/reports/paper.json").read_text())["tables"]}
    columns = ("FastV", "SparseVLM", "VisionZip", "VisionZip‡")
    for number, _, tokens, *figures in table_behind("docs/budgets.md", "eval/reports/paper.json"):
        averages = {(str(row["tokens"]), row["label"]): row["average"] for row in tables[int(number)]["rows"]}
        assert figures == [averages.get((tokens, label), "") for label in columns], (number, tokens)
    rows = {row["label"]: row for row in tables[16]["rows"]}
    for name, memory, average in table_behind("docs/budgets.md", "eval/reports/paper.json table 16 memory"):
        row = rows[name.split(",")[0]]
        assert (memory, average) == (row["values"][0], row["average"]), name
