"""`python -m ratioctl` is the same as `ratioctl`."""

import sys

from ratioctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
