"""``python -m pipelines`` is the console script ``hashbridge``."""

import sys

from pipelines.console.cli import main

sys.exit(main())
