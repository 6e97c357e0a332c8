"""python -m jaxfed"""

from jaxfed.cli import main

main()
