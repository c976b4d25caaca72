"""Checkpoints: their files, configs, adapters and layouts, and loading that loses no weight unsaid."""
