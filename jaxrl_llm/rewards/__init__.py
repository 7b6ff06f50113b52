"""Rewards: what a response is worth, as Verdicts. Nothing here imports JAX.

verdict.py      Status, Verdict, RewardInput, reward_values
registry.py     rewards by name; scoring a batch so that an exception becomes an ERROR verdict
maths.py        answers of maths problems: exact, numeric, then symbolic equality
symbolic.py     the worker processes behind the symbolic check (symbolic_worker.py), with a hard time limit
sandbox/        where Python of a data set or of a model runs: closed off from the host, limited, a fresh process each time
constraints.py  rules that a text must follow, by name; the table is constraint_rules.py, the counting text_measures.py
"""
