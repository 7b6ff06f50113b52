"""AgentIF (Qi et al. 2025, arXiv:2505.16944): instruction following in agentic settings, from long system prompts with many constraints.

rows.py         the published rows, with and without outputs and scores, every dirty spot of theirs read and counted
sequences.py    a constraint's evaluation: gate, extract, question, code; the published reading beside the strict one
outcomes.py     what came of a constraint, also of one that a published file holds a score for
figures.py      CSR, ISR, by dimension, by type, meta, by length; the published way beside the strict ones; intervals
fresh.py        new rows of any length with checkers that are known (fresh_rules.py: the rules; fresh_text.py: their words)
"""
