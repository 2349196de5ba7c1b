"""``salmon-revsmtp demo``: a provider with sample mail, and the example project collecting it."""
