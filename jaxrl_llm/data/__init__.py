"""Rows from files and data sets, tokenised prompt batches, and the order in which they are used."""
