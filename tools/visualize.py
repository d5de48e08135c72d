"""``hgkd visualize``, mm-style: ``python tools/visualize.py --help``."""

from hgkd.cli.visualize import main

if __name__ == "__main__":
    raise SystemExit(main())
