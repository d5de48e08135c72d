"""Hooks of a run; :mod:`hgkd.training` registers them."""
