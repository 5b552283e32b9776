"""python -m controlat."""

import sys

from controlat.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
