"""Asking a model single questions."""
