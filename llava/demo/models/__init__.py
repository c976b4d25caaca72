"""Models of the page: what it asks of each family."""
