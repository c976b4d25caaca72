"""Training: the vision tower against captions, and LLaVA's two stages."""
