"""``python -m hgkd COMMAND``, and ``torchrun -m hgkd COMMAND``."""

import sys

from hgkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
