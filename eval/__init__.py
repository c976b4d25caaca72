"""Benchmarks: ``visionzip eval list | methods | prepare | run | leaderboard | …``, at the root ``python -m eval``.

A benchmark is data, prompt and score, in one file that the registry names; one runner and one table serve all of them.
Installed, the package is ``visionzip_eval`` (setup.py says why), so that its modules name each other relatively.
"""

COMMAND = "python -m eval" if __name__ == "eval" else "visionzip eval"
"""What a user has typed, for messages."""
