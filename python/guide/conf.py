"""Sphinx configuration of the user guide: ``sphinx-build -W -n python/guide build/guide``. It needs no network."""

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

myst_heading_anchors = 3  # so that links to a section work as on GitHub
highlight_language = "text"

# --- docstrings -------------------------------------------------------------------------------------------------------

default_role = "py:obj"  # docstrings put names in single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # `train` and the like are torch's
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False  # "Args: in_channels, out_channels: as for Conv2d" is one entry for several names
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

# There is no inventory of other projects to link into: that would need the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|os|typing)\..*"),
    (r"py:class", r"Tensor|Module|Conv2d|Any|Callable|Mapping"),  # in signatures, which name them as the sources do
    (r"py:class", r"Policy|Choice|Term"),  # type aliases, which are no classes to Sphinx 8.1
    (r"py:(class|exc)", r"str|int|float|bool|tuple|list|dict|object|None|[A-Z]\w*Error"),
]


def _unknown_name(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Names in docstrings that are not of this project (``nn.Conv2d``), or no names (``orepa train``), stay unlinked.

    So do this project's own that are not on the API page; they must exist, though.
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
    """What Sphinx calls first."""
    app.connect("missing-reference", _unknown_name)


# --- HTML -------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"orepa-kernels {release}"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
