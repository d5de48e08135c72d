"""``hgkd benchmark``, mm-style: ``python tools/benchmark.py --help``."""

from hgkd.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
