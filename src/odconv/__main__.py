"""`python -m odconv` is the command `odconv`."""

import sys

from odconv.cli import main

sys.exit(main())
