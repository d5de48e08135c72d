"""``hgkd test``, mm-style: ``python tools/test.py --help``."""

from hgkd.cli.test import main

if __name__ == "__main__":
    raise SystemExit(main())
