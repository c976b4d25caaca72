"""The site of docs/: its navigation, its reference, and that it builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import visionzip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, as scripts/docs.sh builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation():
    def pages(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        return [page for entry in entries for part in entry.values() for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_the_forms_for_issues_are_as_github_reads_them():
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert form["name"] and form["description"] and isinstance(form["labels"], list)
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields) > 2
        for field in form["body"]:
            assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"} and field["attributes"]["label"]


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/reference/visionzip.md").read_text(encoding="utf-8")
    for name in visionzip.__all__:
        assert re.search(rf"^::: visionzip\.{name}$|`visionzip\.{name}`", text, re.MULTILINE), name


def test_the_site_has_docstrings_and_links_to_them(site: Path):
    page = (site / "reference/visionzip.html").read_text(encoding="utf-8")
    assert "Let a model see only K dominant and M contextual visual tokens" in page
    assert re.search(r'href="[^"]*#visionzip\.[\w.]*unzip"[^>]*><code>unzip</code>', page)  # was :func:`unzip`
    assert "_merge" in (site / "source/visionzip/compress.py.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe|link(?! rel="canonical"))[^>]* (?:src|href)="(\w+:)?//', page.read_text()
        )
        assert not loaded, page
