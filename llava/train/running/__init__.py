"""How a training runs: the Trainer and what it refuses to save, checkpoints, and what a run leaves."""
