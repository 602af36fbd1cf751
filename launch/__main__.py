"""`python -m launch` and `torchrun … -m launch` are the `selfsight` command."""

import sys

from launch.cli import main

sys.exit(main())
