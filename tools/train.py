"""``hgkd train``, mm-style: ``python tools/train.py --help``."""

from hgkd.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
