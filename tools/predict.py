"""``hgkd predict``, mm-style: ``python tools/predict.py --help``."""

from hgkd.cli.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
