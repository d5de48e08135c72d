"""``hgkd replay``, mm-style: ``python tools/replay.py --help``."""

from hgkd.cli.replay import main

if __name__ == "__main__":
    raise SystemExit(main())
