"""Sphinx's settings for the site. `make docs` builds it from a copy of this folder (medv/companion/site)."""

import importlib.util
import re
from pathlib import Path

import medv

project, author, release = "medv", "The medv authors", medv.__version__
copyright = "the medv authors, Apache-2.0. Not for clinical use"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]

# Notebooks are shown as they are: nothing is executed, and no script of a widget is fetched.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Parameters", "Parameters"  # the only cells that are folded
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

# One file of MathJax with all that it needs: pictures of formulas, no fonts, no network.
MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg-full.js"
mathjax_path = MATHJAX.name

html_theme = "furo"
html_title = f"medv {release}"
html_static_path = ["static", str(MATHJAX)]
html_css_files = ["results.css", "site.css"]
html_extra_path = ["extra"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "native"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks; to Sphinx, a star or an underscore at a word's end is markup."""
    parts = re.split(r"(``?[^`]+``?)", "\n".join(lines))
    for place, part in enumerate(parts):
        if part.startswith("`") and place % 2:
            parts[place] = f"``{part.strip('`')}``" + ("\\ " if parts[place + 1][:1].isalnum() else "")
        else:
            part = re.sub(r"\||(?m:(?<!^)\*(?! ))|(?<=\w)_\b", lambda found: f"\\{found[0]}", part)
            parts[place] = part
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_rst)
