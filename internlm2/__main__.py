"""python -m internlm2: see cli.py."""

import sys

from internlm2.cli import main

if __name__ == "__main__":
    sys.exit(main())
