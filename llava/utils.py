"""A name that LLaVA's scripts import."""


def disable_torch_init() -> None:
    """Nothing to disable: transformers 5 does not initialise weights that it is about to load."""
