"""What runs: the project, its configuration, collections on demand and on schedule."""
