"""`python -m odconv` is the command `odconv`."""

import sys

from odconv.app.cli import main

sys.exit(main())
