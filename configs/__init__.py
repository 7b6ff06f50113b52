"""Configurations, one module a verb or experiment: `get_config(variant=None)` returns a commented ConfigDict."""
