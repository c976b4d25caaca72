"""A run: which methods at which budgets, who asks what, where the answers lie, and what the tokens cost."""
