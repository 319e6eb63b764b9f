"""Configure Sphinx for the user guide: ``sphinx-build -W -n python/guide build/guide``. Needs no network."""

from __future__ import annotations

import pkgutil
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import orepa

project = "orepa-kernels"
author = "The orepa-kernels authors"
project_copyright = author
version = release = orepa.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
nitpicky = True
suppress_warnings = ["config.cache"]

# --- Markdown ---------------------------------------------------------------------------------------------------------

myst_heading_anchors = 3  # the anchors of GitHub
highlight_language = "text"

# --- docstrings -------------------------------------------------------------------------------------------------------

default_role = "py:obj"  # for names in single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch, for `train` and other methods
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False  # an entry of "Args" may name several arguments
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

# Links to other projects are not checked: their inventories would need the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|os|typing)\..*"),
    (r"py:class", r"Tensor|Module|Conv2d|Any|Callable|Mapping"),  # short names in signatures
    (r"py:class", r"Policy|Choice|Term"),  # Sphinx 8.1 does not know type aliases as classes
    (r"py:(class|exc)", r"str|int|float|bool|tuple|list|dict|object|None|[A-Z]\w*Error"),
]


def _unknown_name(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Leave names unlinked that the guide does not document; fail if a name of this project does not exist.

    Names of other projects (``nn.Conv2d``) and commands (``orepa train``) are in single backticks too.
    """
    target = node.get("reftarget", "")
    if node.get("reftype") != "obj":
        return None
    if target.startswith(("orepa.", "orepa_kernels.")):
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError):
            return None
    return content


def setup(app: Sphinx) -> None:
    """Register the handler; Sphinx calls this first."""
    app.connect("missing-reference", _unknown_name)


# --- HTML -------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"orepa-kernels {release}"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
