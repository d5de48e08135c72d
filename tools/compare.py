"""``hgkd compare``, mm-style: ``python tools/compare.py --help``."""

from hgkd.cli.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
