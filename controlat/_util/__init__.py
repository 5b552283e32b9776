"""Utilities of all parts: files, random numbers, checks, registries, texts, processes."""
