"""``python -m mimo_strategy``: the same as ``mimo``."""

import sys

from mimo_strategy.cli.main import main

sys.exit(main())
