"""How several processes share a run: torchrun starts them, and each answers its part of the questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def shared(number: int, command: Sequence[str]) -> list[str]:
    """Make the command line by which torchrun lets ``number`` processes share ``python -m eval COMMAND``."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m", __package__]
    return [sys.executable, "-m", *launch, *command]
