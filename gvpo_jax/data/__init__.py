"""Rows of data, groups of completions on the host, and the batch that the devices are given."""
