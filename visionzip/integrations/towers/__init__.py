"""Families whose vision tower has one size, as all LLaVAs of transformers: tokens are chosen before the projector."""
