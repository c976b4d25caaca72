"""What the page shows, as HTML and as JSON."""
