"""Settings of the book: Sphinx, MyST notebooks, formulas as MathML, nothing from elsewhere."""

from docutils import nodes
from latex2mathml.converter import convert

project = "Reverse Stable Diffusion: the research companion"
author = copyright = ""
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_title = project
html_static_path = ["book.css", "book.js"]
html_css_files, html_js_files = ["book.css"], ["book.js"]
html_domain_indices = False
html_show_search_summary = False  # a page that lies in a file may not read others
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0)]  # explorers, before their text
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_default_options = {"exclude-members": "set_fit_request, set_predict_request"}
autodoc_typehints = "none"
add_module_names = False
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]


def _inline(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(self, node):
    self.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _escaped(app, what, name, obj, options, lines):
    lines[:] = [line.replace("|", "\\|").replace("**", "\\*\\*") for line in lines]


def setup(app):
    """Write formulas as MathML, which browsers show by themselves; docstrings as they stand."""
    app.connect("autodoc-process-docstring", _escaped, priority=1)
    app.add_node(nodes.math, override=True, html=(_inline, None))
    app.add_node(nodes.math_block, override=True, html=(_block, None))
