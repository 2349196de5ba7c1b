"""Plugins: the hooks on one screen, the manager that calls them, the built-in ones."""
