"""The same as `jaxfed reproduce`."""

import sys

from jaxfed.cli import main

sys.argv[1:1] = ["reproduce"]
main()
