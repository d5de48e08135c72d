"""Configs: read, completed by short options, checked."""

from hgkd.config.checking import check_config
from hgkd.config.reading import read_config
from hgkd.config.short_options import SHORT_OPTIONS, apply_short_options, use_mixed_precision

__all__ = [
    "SHORT_OPTIONS",
    "apply_short_options",
    "check_config",
    "read_config",
    "use_mixed_precision",
]
