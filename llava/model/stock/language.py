"""The language model of a stock LLaVA: a model of transformers that is given embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visionzip.integrations.calls import SIZES
from visionzip.language.pruning import is_pruned


class Language(nn.Module):
    """What :class:`LlavaMetaForCausalLM` is mixed into: a transformers model that is given embeddings."""

    def __init__(self, native: Any) -> None:
        super().__init__()
        self.native = native

    def forward(self, visual_mask: Tensor | None = None, token_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own forward.

        ``visual_mask`` (B, L) is for FastV and SparseVLM, where one is on it; ``token_sizes`` (B, L) for a size bias.
        """
        return self.native(**kwargs, **self._for_hooks(visual_mask, token_sizes))

    def generate(self, visual_mask: Tensor | None = None, token_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own ``generate``; ``visual_mask`` and ``token_sizes`` as in :meth:`forward`."""
        return self.native.generate(**kwargs, **self._for_hooks(visual_mask, token_sizes))

    def _for_hooks(self, visual_mask: Tensor | None, token_sizes: Tensor | None) -> dict[str, Any]:
        """Both as arguments of the model inside, which takes them only for what hangs on it."""
        masks = {} if visual_mask is None or not is_pruned(self) else {"visual_mask": visual_mask}
        return masks if token_sizes is None else {**masks, "mm_encoder_outputs": {SIZES: token_sizes}}
