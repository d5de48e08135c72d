"""``hgkd evaluate``, mm-style: ``python tools/evaluate.py --help``."""

from hgkd.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
