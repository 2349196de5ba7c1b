"""What the tests share, a module for each concern.  Fixtures are in ``conftest.py``."""
