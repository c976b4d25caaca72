"""Benchmarks' data as they are on disk and on the hub: questions, images, frames of videos, and their checksums."""
