"""Benchmarks: ``python -m eval list | prepare | run | score | table``, from the repository's root.

A benchmark is data, prompt and score, in one file that the registry names; one runner and one table serve all of them.
"""
