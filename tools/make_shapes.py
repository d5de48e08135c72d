"""``hgkd make-shapes``, mm-style: ``python tools/make_shapes.py --help``."""

from hgkd.cli.make_shapes import main

if __name__ == "__main__":
    raise SystemExit(main())
