"""What a visitor's browser sends."""
