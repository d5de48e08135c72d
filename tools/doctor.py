"""``hgkd doctor``, mm-style: ``python tools/doctor.py --help``."""

from hgkd.cli.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
