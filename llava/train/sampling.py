"""``--group_by_modality_length``: LLaVA's order of the data, in which little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def group_by_modality_length(
    lengths: Sequence[int], batch_size: int, chunks: int, generator: torch.Generator
) -> list[int]:
    """An order of the samples in which those with an image and those of text only come in batches of their own.

    Each kind is shuffled and cut into large batches, of ``chunks`` batches each. Inside a large batch samples go by
    length, the longest first, and are dealt out so that its batches are about as long as each other. The large batches
    come in random order; what is left of both kinds makes a last one, which is mixed.

    Args:
        lengths: of each sample, negative for text only.
        batch_size: of one process in one step.
        chunks: how many batches make one update: processes times accumulation steps.
        generator: of the shuffling.

    Returns:
        Places of all samples, each once. Source: LLaVA.
    """
    size = batch_size * chunks
    whole: list[list[int]] = []
    rest: list[int] = []
    for is_kind in (True, False):
        places = torch.tensor([place for place, length in enumerate(lengths) if (length > 0) == is_kind])
        shuffled = places[torch.randperm(len(places), generator=generator)].tolist()
        complete = len(shuffled) - len(shuffled) % size
        whole += [shuffled[start : start + size] for start in range(0, complete, size)]
        rest += shuffled[complete:]
    order = [whole[number] for number in torch.randperm(len(whole), generator=generator).tolist()]
    if rest:
        order.append(rest)
    sizes = [abs(length) for length in lengths]
    return [place for large in order for batch in deal(large, sizes, chunks) for place in batch]


def deal(places: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Share samples out, the longest first, each to the batch that is shortest so far and has room."""
    places = sorted(places, key=lambda place: lengths[place], reverse=True)
    if len(places) % chunks:
        return [places[number::chunks] for number in range(chunks)]
    batches: list[list[int]] = [[] for _ in range(chunks)]
    loads = [0.0] * chunks
    for place in places:
        shortest = loads.index(min(loads))
        batches[shortest].append(place)
        loads[shortest] += lengths[place]
        if len(batches[shortest]) == len(places) // chunks:
            loads[shortest] = float("inf")
    return batches


class ModalityLengthSampler(Sampler[int]):
    """:func:`group_by_modality_length`, in another order in each epoch and in the same one in each process.

    Args:
        lengths: as there, as are ``batch_size`` and ``chunks``.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, chunks: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.chunks = chunks
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; accelerate's data loader calls it, also in a run that goes on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(group_by_modality_length(self.lengths, self.batch_size, self.chunks, generator))
