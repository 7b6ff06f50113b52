"""Rewards: what a response is worth, as Verdicts. Nothing here imports JAX.

verdict.py      Status, Verdict, RewardInput, reward_values
registry.py     rewards by name; scoring a batch so that an exception becomes an ERROR verdict
maths.py        answers of maths problems: exact, numeric, then symbolic equality
symbolic.py     the worker processes behind the symbolic check (symbolic_worker.py), with a hard time limit
sandbox/        where Python of a data set or of a model runs: closed off from the host, limited, a fresh process each time
constraints/    constraints that a text must follow, by name, and the reward that reads them from a row
text_measures.py  words, sentences and whether a text is English: what several constraints count
judge.py        a language model behind a chat server as a judge: questions, majority of votes, pairs in both orders
verif.py        VerIF: rules and a judge as one reward; what a row asks for is read by verinstruct.py
chat.py         the client of any OpenAI-compatible server; its HTTP is chat_wire.py, its answers on disk chat_cache.py, and the failures that a
                run bears chat_budget.py
"""
