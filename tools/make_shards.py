"""``hgkd make-shards``, mm-style: ``python tools/make_shards.py --help``."""

from hgkd.cli.make_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
