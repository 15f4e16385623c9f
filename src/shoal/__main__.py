"""``python -m shoal`` is the command ``shoal``."""

import sys

from shoal.cli import main

if __name__ == "__main__":  # a worker's process imports this file too
    sys.exit(main())
