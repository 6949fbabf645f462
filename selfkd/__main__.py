"""`python -m selfkd` is the same command as `selfkd`."""

import sys

from selfkd.cli.main import main

sys.exit(main())
