"""SAERL's data operations: features, diversity, difficulty, quality, schedule, and the curated set that they make.

Every module is usable alone; `pipeline.curate` runs them all.
"""
