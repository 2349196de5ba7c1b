"""The agent types.  ``base`` is what a plugin author subclasses; the others are the built-in
plugins, written as a third party's would be."""
