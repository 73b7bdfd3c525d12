"""``python -m benchmarks.cpu``: see pyquant.bench.cpu."""

import sys

from pyquant.bench.cpu import main

if __name__ == "__main__":
    sys.exit(main())
