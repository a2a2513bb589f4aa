"""`python -m symile_dist` is `symile-dist`."""

import sys

from symile_dist.cli import main

sys.exit(main())
