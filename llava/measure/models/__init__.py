"""Models of random weights that are measured."""
