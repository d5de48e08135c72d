"""Whole jobs, called from Python: what the commands of :mod:`hgkd.cli` do once their arguments are read."""
