"""Conversations of the page, and the one model that they take turns at."""
