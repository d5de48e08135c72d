"""``hgkd demo``, mm-style: ``python tools/demo.py --help``."""

from hgkd.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
