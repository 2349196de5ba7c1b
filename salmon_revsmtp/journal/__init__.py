"""The journal: the SQLite record of collections and deliveries."""
