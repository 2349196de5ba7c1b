"""Where an installed package keeps the example project (``config/`` and ``app/`` of the source)."""
