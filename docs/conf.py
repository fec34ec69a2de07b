"""Configuration of Sphinx: ``make docs`` builds the site from the Markdown files of this folder."""

import logging
import warnings
from importlib.metadata import version as installed_version

warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.WARNING)

# before autodoc imports what needs megatron-core, which cannot be imported without a GPU otherwise
import mimo_strategy  # noqa: E402, F401

project = "mimo-strategy"
author = "The mimo-strategy authors"
project_copyright = "2026, the mimo-strategy authors"
version = release = installed_version("mimo-strategy")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

# links to headings as GitHub makes them
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autoclass_content = "class"
napoleon_use_rtype = False

html_theme = "furo"
html_title = "mimo-strategy"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
