"""Benchmarks: `python -m benchmarks.NAME [--record]`, one JSON object a line; `make bench` also sets the peers up."""
