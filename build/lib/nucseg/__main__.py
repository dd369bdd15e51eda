"""``python -m nucseg`` runs the command line."""

import sys

from nucseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
