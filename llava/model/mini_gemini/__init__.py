"""Mini-Gemini: its two towers, and patch info mining."""
