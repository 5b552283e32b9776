"""Evaluating a user's network without changing it: frozen weights, one mode, counted evaluations."""
