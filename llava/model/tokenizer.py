"""Tokenizers that give the ids LLaVA's checkpoints were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

_SPACE = "▁"  # SentencePiece's


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint: folder or hub name.

    LLaVA tokenizes with SentencePiece's own Llama class (``use_fast=False``). transformers 5 has only a rebuilt one,
    which leaves out the prefix space before a text that starts with a space, and the beginning-of-sequence token where
    no ``tokenizer_config.json`` asks for it. Both are put back, for the old and the new (``legacy: false``) behaviour.

    Raises:
        OSError: there is no tokenizer.
    """
    settings = _settings(path)
    if settings.get("tokenizer_class", "LlamaTokenizer") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return AutoTokenizer.from_pretrained(path)
    if not settings and _file(path, "tokenizer.model") is None:
        return AutoTokenizer.from_pretrained(path)
    legacy = settings.get("legacy")
    legacy = True if legacy is None else legacy
    tokenizer = LlamaTokenizer.from_pretrained(
        path, legacy=legacy, add_bos_token=settings.get("add_bos_token", True), padding_side="right"
    )
    tokenizer.init_kwargs["legacy"] = legacy  # transformers would not save it
    _restore_prefix_space(tokenizer, legacy)
    return tokenizer


def _file(path: str | Path, name: str) -> str | None:
    return cached_file(
        str(path),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _settings(path: str | Path) -> dict[str, Any]:
    file = _file(path, "tokenizer_config.json")
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
