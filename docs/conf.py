"""Sphinx configuration: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))

from hub_gateway import __version__  # noqa: E402

project = "Hub Gateway"
author = "The Hub Gateway developers"
copyright = "2026, the Hub Gateway developers"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton", "sphinxcontrib.mermaid", "generated_reference"]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
# Copying a command must not copy its prompt.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
# A diagram is drawn by the reader's browser; the text of it is in the page for everybody else.
mermaid_output_format = "raw"

html_theme = "pydata_sphinx_theme"
html_title = "Hub Gateway"
html_theme_options = {"navigation_with_keys": False, "show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}
html_sidebars = {"index": [], "explanation/decisions": ["sidebar-nav-bs"]}
