"""`python -m vggt_mv.cli`, for where the command is not on the path."""

import sys

from vggt_mv.cli.main import main

sys.exit(main())
