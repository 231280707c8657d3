"""python -m fastwgan, the same as fastwgan."""

import sys

from fastwgan.cli.main import main

sys.exit(main())
