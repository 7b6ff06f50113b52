"""Evaluation: statistics of comparisons."""
