"""``python -m pipelines`` is the console script ``hashbridge``."""

import sys

from pipelines.cli import main

sys.exit(main())
