"""``hgkd export``, mm-style: ``python tools/export.py --help``."""

from hgkd.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
