"""Sphinx' configuration: `make docs` builds the pages of this folder, and takes a warning for an error."""

import os

from torch_adadelta import __version__

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "torch_adadelta"
author = "the authors of torch_adadelta"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# In docstrings, `this` is code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "none"  # the signatures show them
autodoc_member_order = "bysource"

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"torch_adadelta {release}"
