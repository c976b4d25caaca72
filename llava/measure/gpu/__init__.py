"""The command ``visionzip benchmark gpu``: its sections, its report, and what only a GPU can show."""
