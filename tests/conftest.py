"""Fixtures that several test files share."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from interpreter import quick_environment
from judge_server import JudgeServer, Reply
from mini_gemini import write_mini_gemini
from transformers import (
    PreTrainedModel,
)

from checkpoints import (
    edit_config,
    write_checkpoint,
    write_tokenizer,
    write_video_checkpoint,
)
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.tokenizer import load_tokenizer
from playground.scenes import make_test_set, write_parquet
from recorded import write_recorded_checkpoint

pytest_plugins = ["training_fixtures"]
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="visionzip-tests-")  # not among the user's data sets


def _once(write: Callable[..., Path], name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write`` into a folder of some name; the same arguments give the same folder."""
    folders: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items(), key=str))
        if key not in folders:
            folders[key] = write(tmp_path_factory.mktemp("checkpoint") / name, **options)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a random checkpoint in the original layout; the same arguments give the same folder."""
    return _once(write_checkpoint, "llava-v1.5-tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def recorded_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Folder in the original checkpoint format for a recorded model, with fields of its config replaced."""
    folders: dict[str, Path] = {}

    def make(model: str, overrides: dict[str, Any]) -> Path:
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp(f"llava-{Path(model).stem}")
        write_recorded_checkpoint(folders[model], model, overrides)
        return folders[model]

    return make


@pytest.fixture
def load(make_checkpoint):
    """``load_pretrained_model`` of such a checkpoint on the CPU: tokenizer, model, image processor, context length."""

    def make(**overrides: Any) -> tuple[Any, Any, Any, int]:
        return load_pretrained_model(str(make_checkpoint(**overrides)), device="cpu")

    return make


@pytest.fixture(scope="session")
def make_video_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a random Video-LLaVA in the original layout; the same arguments give the same folder."""
    return _once(write_video_checkpoint, "Video-LLaVA-tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def make_mgm(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a random Mini-Gemini in the original layout; the same arguments give the same folder."""
    return _once(write_mini_gemini, "MGM-tiny", tmp_path_factory)


@pytest.fixture
def load_mgm(make_mgm: Callable[..., Path]) -> Callable[..., Any]:
    """Such a model on the CPU."""
    return lambda **options: load_pretrained_model(str(make_mgm(**options)), device="cpu")[1]


@pytest.fixture
def copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint for this test alone, which may change it and the folder ``tower`` beside it."""

    def make(**options: Any) -> Path:
        source = make_checkpoint(**options)
        folder = shutil.copytree(source, tmp_path / "llava")
        shutil.copytree(source.with_name(source.name + "-tower"), tmp_path / "tower")
        edit_config(folder, mm_vision_tower=str(tmp_path / "tower"))
        return folder

    return make


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    """What users would read, from transformers too."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def publish(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], str]:
    """Puts a folder where a download from the hub would have, so that it is found by its hub name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(folder: Path, name: str) -> str:
        cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        folder.rename(cached / "snapshots" / ("0" * 40))
        return name

    return make


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a LLaVA's weights are read: what can be known before has to be said before."""
    read = PreTrainedModel._load_pretrained_model

    def guarded(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(model, LlavaMetaForCausalLM), "too late: the weights are being read"
        return read(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(guarded))


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment for scripts, whose Python starts at once."""
    with quick_environment(tmp_path_factory.mktemp("venv"), "eval.__main__") as folder:
        yield folder


@pytest.fixture(scope="session")
def quick_trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same for scripts that train, by torchrun too."""
    modules = ["torch.distributed.run", "llava.train.train", "llava.train.contrastive", "playground.llava_mini"]
    modules += ["deepspeed"] * (find_spec("deepspeed") is not None)
    with quick_environment(tmp_path_factory.mktemp("venv"), *modules) as folder:
        yield folder


@pytest.fixture
def quick_starts(quick_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts ``sys.executable`` gets that Python."""
    monkeypatch.setattr(sys, "executable", str(quick_python / "bin" / "python"))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """LLaVA's kind of tokenizer, by its ``legacy`` setting."""
    made = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, legacy=legacy)
        made[legacy] = load_tokenizer(folder)
    return made


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a test set of 280 questions about drawn scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_parquet(list(make_test_set(seed=5, per_type=40)), folder / "test.parquet")
    return folder


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Makes a disk end after so many bytes of any file, for this process and those that it starts."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge's waits, a hundred times shorter; a key, and no proxy in between."""
    monkeypatch.setattr("eval.scoring.endpoint._FIRST_WAIT", 0.005)
    monkeypatch.setattr("eval.scoring.endpoint._LONGEST_WAIT", 0.02)
    monkeypatch.setattr("eval.scoring.endpoint._RETRIES", 3)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeServer]]:
    """Starts an endpoint, to which OPENAI_BASE_URL points then."""
    running = []

    def start(reply: Callable[[dict[str, Any], int], Reply]) -> JudgeServer:
        running.append(JudgeServer(reply).__enter__())
        monkeypatch.setenv("OPENAI_BASE_URL", running[-1].url)
        return running[-1]

    yield start
    for server in running:
        server.__exit__()
