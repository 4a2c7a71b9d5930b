"""Builds the documentation: `make docs`, or `sphinx-build -W -n docs docs/_build/html`. Nothing is fetched from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import cllm

project = "CLLM"
author = "the CLLM contributors"
release = version = cllm.__version__
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "generated_reference"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "fieldlist", "colon_fence"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings mark code by single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Only what this project documents is a link; the types of other projects are not looked up, which would need the network.
nitpick_ignore_regex = [(r"py:.*", r".*")]

html_theme = "furo"
html_title = f"CLLM {release}"
html_static_path = ["_static"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
