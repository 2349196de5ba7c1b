"""Sphinx configuration, as Salmon's own documentation has it."""

from importlib.metadata import version as installed

project = "salmon-revsmtp"
copyright = "its contributors, GPL-3.0-or-later"
release = version = installed("salmon-revsmtp")
extensions = ["sphinx.ext.autodoc"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]
html_theme = "alabaster"
# pydantic's own machinery is no part of the reference.
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
