"""Configuration of the site: ``make docs``. Strict, offline, everything that a page shows lies in the site itself."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]  # this checkout's hgkd, and the site's own extension

import hgkd  # noqa: E402

project = "hgkd"
author = "the hgkd authors"
release = version = hgkd.__version__
html_title = f"hgkd {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "hgkd_site",
]
root_doc = "index"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

# strict: a reference that leads nowhere is a warning, and `make docs` makes warnings errors
nitpicky = True
suppress_warnings = ["mystnb.unknown_mime_type"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"  # a test runs the notebooks
nb_ipywidgets_js = {}  # these would come from the network
myst_enable_extensions = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # what overrides a method of torch or mmengine would show their text
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
