"""The same as `jaxfed launch`."""

import sys

from jaxfed.cli import main

sys.argv[1:1] = ["launch"]
main()
