"""What a user gets from `pip install .`: the packages, whole, away from the repository, and a command that runs."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from contextlib import suppress
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from visionzip import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"visionzip": "visionzip", "llava": "llava", "visionzip_eval": "eval"}  # as installed: where its sources are
NAME = "llava-visionzip"
EXTRAS = frozenset(
    {"", "dev", "quant", "train", "eval", "figures", "video", "demo", "docs"}
)  # "flash" is built for a GPU

# Prints the files of the packages as installed, and the version that is recorded.
WHERE = (
    "import json\n"
    "from importlib.metadata import version\n"
    "from importlib.util import find_spec\n"
    f"print(json.dumps([*(find_spec(name).origin for name in {list(PACKAGES)}), version({NAME!r})]))"
)


def run(*command: str | Path, cwd: Path, typed: str = "") -> str:
    """Output of a command that knows nothing of the repository: it runs elsewhere and without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_of_packages() -> set[str]:
    """Every module, markers of typed packages, the paper's figures, the page's files, as the wheel should name them."""
    return {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for pattern in ("*.py", "py.typed", "paper.json", "demo/assets/*")
        for path in (ROOT / folder).rglob(pattern)
    }


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, by way of the sdist, of a copy of the tree: an old build/ or egg-info would add files to it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES.values(), "tests", "playground", "scripts"):  # the last three must not get in
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "data"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    assert len(list(out.glob("llava_visionzip-*.tar.gz"))) == 1
    (built,) = out.glob("llava_visionzip-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, which borrows the dependencies of the running one."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, symlinks=True)
    python = place / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=place)
    # A directory named in a .pth file comes after the environment's own, and the .pth files in it are not read: the
    # editable install's has no effect.
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    borrowed = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (own / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return place


def test_wheel_holds_every_module_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files_of_packages()


def test_wheel_metadata(wheel: Path):
    metadata = metadata_of(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert not any("torchvision" in requirement for requirement in metadata.get_all("Requires-Dist"))
    with zipfile.ZipFile(wheel) as archive:
        files = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(files["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert "visionzip = llava.cli:main" in archive.read(files["entry_points.txt"]).decode()


def test_the_installed_packages_are_found(installed: Path):
    """That they import is shown by the command, which does its work."""
    *modules, recorded = json.loads(run(installed / "bin/python", "-c", WHERE, cwd=installed))
    for module in modules:
        assert Path(module).resolve().is_relative_to(installed.resolve())
    assert recorded == __version__


def test_installed_command_does_its_work(installed: Path, tmp_path: Path):
    """The main job, from the wheel alone and from elsewhere: the model and the data are files that flags name."""
    visionzip, model = installed / "bin/visionzip", ("--model-path", ROOT / "checkpoints/llava-mini", "--device", "cpu")
    data = ("--data", ROOT / "playground/data/eval/scenes/test.parquet", "--limit", "8")
    said = run(visionzip, "eval", "run", "scenes", *model, *data, "--tokens", "48", "--output", "out", cwd=tmp_path)
    assert "visionzip 40+8" in said
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in results["rows"]] == ["vanilla", "visionzip"]
    assert results["rows"][0]["score"] > 80 and results["questions"] == 8
    # The code's version, and not the commit of a repository that the environment may lie in.
    assert results["environment"]["git_commit"] == f"v{__version__}"
    picture = ("--image", ROOT / "examples/scene.jpg", "--temperature", "0")
    said = run(visionzip, "chat", *model, *picture, cwd=tmp_path, typed="What color is the ring?\n")
    assert "yellow" in said


def test_editable_install_is_this_tree(tmp_path: Path):
    """What scripts/test.sh installs: away from the root, the packages are still this tree's, at this tree's version."""
    # Asked there too, whether it is one: at the root, an egg-info that a build left would answer.
    script = (
        "import json\n"
        "from importlib.metadata import distributions\n"
        "urls = [d.read_text('direct_url.json') or '{}' for d in distributions(name='llava-visionzip')]\n"
        "print(json.dumps([json.loads(url) for url in urls]))"
    )
    urls = json.loads(run(sys.executable, "-c", script, cwd=tmp_path))
    if not any(url.get("dir_info", {}).get("editable") for url in urls):
        pytest.skip("not an editable install")
    *modules, recorded = json.loads(run(sys.executable, "-c", WHERE, cwd=tmp_path))
    assert [Path(module).resolve() for module in modules] == [ROOT / name / "__init__.py" for name in PACKAGES.values()]
    assert recorded == __version__


def test_constraints_pin_every_requirement(wheel: Path):
    """What scripts/test.sh installs, and what that needs in turn, has its tested version, inside the range."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    to_do = [(requirement, EXTRAS) for requirement in metadata_of(wheel).get_all("Requires-Dist")]
    seen = set()
    while to_do:
        text, extras = to_do.pop()
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        # a CUDA build of torch names the exact versions of its libraries itself
        if not wanted or name.startswith(("nvidia-", "cuda-", "triton")) or (name, text, extras) in seen:
            continue
        seen.add((name, text, extras))
        assert name in pins, f"constraints.txt has no {requirement}"
        assert requirement.specifier.contains(pins[name]), (
            f"constraints.txt has {name}=={pins[name]}, not {requirement}"
        )
        with suppress(PackageNotFoundError):  # an extra that this environment lacks
            to_do += [(needed, frozenset(requirement.extras | {""})) for needed in requires(name) or []]
    assert {"torch", "transformers", "peft", "bitsandbytes", "pytest", "sympy"} <= {name for name, *_ in seen}
