"""Commands of hgkd, a file each: ``hgkd NAME``, ``python -m hgkd NAME``, or ``python tools/NAME.py``."""
