"""Rows of data sets, from files to batches of tokens."""
