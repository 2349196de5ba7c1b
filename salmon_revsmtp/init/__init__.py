"""The projects that ``salmon-revsmtp init`` writes: what is in their files, and how they are
written.

This knows files, certificates and DNS.  It knows neither Salmon nor a server, and asks no one: what
a person is asked and shown is up to ``cli``.
"""
