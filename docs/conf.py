"""How Sphinx builds the site: `make docs`."""

import gc
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]  # the package as it is in this checkout, and our extensions

from jaxfed import __version__ as version  # noqa: E402

project = "jaxfed"
copyright = "the jaxfed authors, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "figures",
    "generated",
]
quick = tags.has("quick")  # noqa: F821, which Sphinx defines
if quick:
    gc.disable()  # nodes refer to each other, so that looking for cycles among them takes a quarter of a short build
else:
    extensions.append("sphinx.ext.viewcode")
exclude_patterns = ["_build", "_ext", "_static"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make docs` says -D nb_execution_mode=force
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # runs/ of the notebooks is not left here

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = not quick  # it parses the source of every function
napoleon_numpy_docstring = False
default_role = "code"
python_maximum_signature_line_length = 88

html_title = f"jaxfed {version}"
if quick:  # the theme writes the whole contents beside every page
    html_theme, html_sidebars = "basic", {"**": []}
else:
    html_theme = "sphinx_book_theme"
    html_theme_options = {
        "show_toc_level": 2,
        "home_page_in_toc": True,
        "use_download_button": False,
        "use_fullscreen_button": False,
    }
html_copy_source = False
