"""What becomes of prompts when images are shortened: runs of placeholders, and tokens that a KV cache holds already."""
