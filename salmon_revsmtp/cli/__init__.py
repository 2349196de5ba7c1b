"""The command ``salmon-revsmtp``."""
