"""Sphinx configuration, as Salmon's own documentation has it."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "salmon-revsmtp"
copyright = "its contributors, GPL-3.0-or-later"
release = version = installed("salmon-revsmtp")
# `generated` is ours: it writes the pages about settings and commands from the code.
extensions = ["sphinx.ext.autodoc", "generated"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# states.rst is included by internals.rst.
exclude_patterns = ["_build", "states.rst"]
html_theme = "alabaster"
# A value such as 'odmr', an option such as --json: as they are typed.
smartquotes = False
html_theme_options = {"page_width": "1000px"}
