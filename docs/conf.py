"""Sphinx' configuration: `make docs` builds the pages of this folder, and takes a warning for an error."""

import os

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from torch_adadelta import __version__

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "torch_adadelta"
author = "the authors of torch_adadelta"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
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
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Formulas become MathML, which a browser draws by itself: no script has to come from a network."""

    def inline(translator, node):
        translator.body.append(convert(node.astext()))
        raise SkipNode

    def display(translator, node):
        aligned = rf"\begin{{align*}}{node.astext()}\end{{align*}}"
        translator.body.append(f'<div class="math">{convert(aligned, display="block")}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (display, None))
