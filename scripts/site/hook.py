"""MkDocs' hook: files outside docs/ that pages link to are pages too, so that one link serves the site and GitHub.

Markdown is shown as it is, code in a block, a folder as a list of its files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#\s]+)(?=[)#])")
OUTSIDE = "source/"  # of the site: what is not in docs/
CODE = {".py", ".sh", ".json", ".toml", ".txt", ".cff"}  # shown on a page; pictures, notebooks and the like stay files


def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to, and what that links to."""
    todo = [page.src_uri for page in files.documentation_pages()]
    while todo:
        page = todo.pop()
        for link in LINK.findall(files.get_file_from_path(page).content_string):
            uri = linked(page, link)
            if uri is not None and files.get_file_from_path(uri) is None:
                files.append(file := outside(config, uri))
                todo += [uri] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between docs/ and the rest lead where the site has them; of the rest, the search finds CONTRIBUTING."""
    own = page.file.src_uri
    if own.startswith(OUTSIDE) and own != f"{OUTSIDE}CONTRIBUTING.md":
        page.meta["search"] = {"exclude": True}

    def moved(link: re.Match[str]) -> str:
        uri = linked(own, link[1])
        return link[1] if uri is None else os.path.relpath(uri, Path(own).parent)

    return LINK.sub(moved, markdown)


def linked(page: str, link: str) -> str | None:
    """Where the site has what a page links to; None if that is no file, or the page is one of code."""
    source = origin(page)
    target = (source.parent / link).resolve()
    if source.suffix not in (".md", "") or not target.is_relative_to(ROOT) or not target.exists():
        return None
    return place(target)


def place(file: Path) -> str:
    """Where the site has a file of the repository."""
    if file.is_relative_to(ROOT / "docs"):
        return file.relative_to(ROOT / "docs").as_posix()
    ending = "/index.md" if file.is_dir() else ".md" if file.suffix in CODE else ""
    return OUTSIDE + file.relative_to(ROOT).as_posix() + ending


def origin(uri: str) -> Path:
    """The file that a page of the site shows; of a folder, ``index.md`` in it, which is not there."""
    if not uri.startswith(OUTSIDE):
        return ROOT / "docs" / uri
    own = ROOT / uri.removeprefix(OUTSIDE)
    return own.with_suffix("") if own.with_suffix("").suffix in CODE else own


def outside(config: Any, uri: str) -> File:
    """What the site has of a file or folder that is not in docs/."""
    file = origin(uri)
    if file.suffix not in CODE and file.exists():
        return File.generated(config, uri, abs_src_path=str(file), inclusion=InclusionLevel.NOT_IN_NAV)
    if file.exists():
        text = file.read_text(encoding="utf-8")
        content = f"# {file.relative_to(ROOT)}\n\n````{file.suffix[1:]}\n{text}````\n"
    else:
        names = sorted(own.name for own in file.parent.iterdir() if own.suffix in CODE | {".md", ".ipynb"})
        content = f"# {file.parent.relative_to(ROOT)}\n\n" + "\n".join(f"- [{name}]({name})" for name in names)
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
