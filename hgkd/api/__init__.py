"""Whole jobs, called from Python; the commands of :mod:`hgkd.cli` read arguments and call them."""
