"""How Sphinx builds the pages: `make docs` runs it from the repository's root, without network.

The source folder is the repository, so a link between two files leads to the same place on the
site, in a checkout and on a forge. Notebooks are shown with their stored outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import loopscope  # noqa: E402

project = "loopscope"
author = "the loopscope contributors"
version = release = loopscope.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "site_pages"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "*.md", "benchmarks/RESULTS.md"]
exclude_patterns = [
    "README.md",
    ".*",
    "out",
    "build",
    "dist",
    "loopscope",
    "tests",
    "**/__pycache__",
]

myst_heading_anchors = 3
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "image/png", 0)]  # a figure's picture, before its script

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style"), ("Sources", "notes_style")]
# plotly's own form of a figure is left out, as its picture is shown
suppress_warnings = ["mystnb.unknown_mime_type"]
default_role = "code"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_title = f"loopscope {release}"
html_copy_source = html_show_copyright = False
toc_object_entries = False  # each public call has a heading of its own
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
