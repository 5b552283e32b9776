"""python -m controlat."""

import sys

from controlat.cli import main

if __name__ == "__main__":
    sys.exit(main())
