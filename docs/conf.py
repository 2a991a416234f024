"""How Sphinx builds the documentation site: `make docs`; docs/decisions/0012-documentation-site.md says why so."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import overlayfs

project = "overlayfs"
html_show_copyright = False
release = version = overlayfs.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Pages are read in the repository too: ordinary links, to the anchors that GitHub makes of headings.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings write `name`, as Markdown does

highlight_language = "text"  # of blocks that name none: diagrams, formats, output

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


# Pages at the root of the repository have a page on the site, whose text they are; links lead there.
ROOT = Path(__file__).resolve().parents[1]
INCLUDED = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "security": "SECURITY.md"}


def _include(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give an included page its text, and lead links to included pages to those of the site."""
    if docname in INCLUDED:
        path = ROOT / INCLUDED[docname]
        app.env.note_dependency(str(path))
        source[0] = path.read_text().replace("](docs/", "](")
    for page, name in INCLUDED.items():
        source[0] = re.sub(rf"\]\((?:\.\./)*{name}", f"]({page}.md", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _include)
