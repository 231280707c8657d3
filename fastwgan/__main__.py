"""python -m fastwgan, the same as fastwgan."""

import sys

from fastwgan.cli import main

sys.exit(main())
