"""The hold store: the mail that waits for its customers.

``store``     the contract: what a store is asked to do, and what it promises
``embedded``  SQLite and files in a folder, in this process; nothing to install
"""
