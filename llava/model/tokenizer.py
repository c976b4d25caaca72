"""Tokenizers that give the ids LLaVA's checkpoints were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from llava.model.checkpoints.files import find_file

_SPACE = "▁"  # SentencePiece's
_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint: folder or hub name.

    LLaVA tokenizes with SentencePiece's own Llama class (``use_fast=False``). transformers 5 has only a rebuilt one,
    which leaves out the prefix space before a text that starts with a space, and the beginning-of-sequence token where
    no ``tokenizer_config.json`` asks for it. Both are put back, for the old and the new (``legacy: false``) behaviour.

    Raises:
        OSError: there is no tokenizer, or a damaged one.
    """
    if not any(find_file(path, name) for name in _FILES):  # transformers would make an empty one
        raise OSError(
            f"{path} has no tokenizer: it needs {' or '.join(_FILES)}, as its language model has; copy it there"
        )
    try:
        return _load(path)
    except Exception as error:  # each format has its own
        raise OSError(
            f"cannot read the tokenizer in {path}: a file is damaged or was not fully downloaded; download it again. "
            f"({error})"
        ) from error


def _load(path: str | Path) -> PreTrainedTokenizerBase:
    settings = _settings(path)
    is_llama = settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not is_llama and ("tokenizer_class" in settings or find_file(path, "tokenizer.model") is None):
        return AutoTokenizer.from_pretrained(path)
    legacy = settings.get("legacy")
    legacy = True if legacy is None else legacy
    tokenizer = LlamaTokenizer.from_pretrained(
        path, legacy=legacy, add_bos_token=settings.get("add_bos_token", True), padding_side="right"
    )
    tokenizer.init_kwargs["legacy"] = legacy  # transformers would not save it
    _restore_prefix_space(tokenizer, legacy)
    return tokenizer


def _settings(path: str | Path) -> dict[str, Any]:
    file = find_file(path, "tokenizer_config.json")
    return json.loads(Path(file).read_text()) if file else {}


def _restore_prefix_space(tokenizer: LlamaTokenizer, legacy: bool) -> None:
    """Put a space before the text, whatever it starts with: the whole text, or (legacy) also after special tokens."""
    backend = tokenizer.backend_tokenizer
    to_space = normalizers.Replace(" ", _SPACE)
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_space])
        backend.pre_tokenizer = None
        return
    # Metaspace adds no prefix to a text that starts with its mark. The normalizer leaves no plain space, so with the
    # plain space as its mark the first one always adds it, and the second turns it into SentencePiece's.
    backend.normalizer = to_space
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
        ]
    )
