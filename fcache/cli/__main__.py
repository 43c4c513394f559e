"""`python -m fcache.cli`: the command line where no script is installed."""

import sys

from fcache.cli.app import main

sys.exit(main())
