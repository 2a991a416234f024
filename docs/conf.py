"""How Sphinx builds the documentation site: `make docs`; docs/decisions/0012-documentation-site.md says why so."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "overlayfs"
author = "the overlayfs developers"
release = re.search(r'^VERSION = "(.*)"', (ROOT / "cli/version.py").read_text(), re.MULTILINE)[1]  # type: ignore[index]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = False  # docstrings name types by their short names

# Pages are read in the repository too: ordinary links, to the anchors that GitHub makes of headings.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.xref_missing"] if False else []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings write `name`, as Markdown does

html_theme = "furo"
html_title = "overlayfs"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []

# The prompt is shown and not copied; what a command prints is not copied either.
copybutton_prompt_text = r"[$#] "
copybutton_prompt_is_regexp = True
