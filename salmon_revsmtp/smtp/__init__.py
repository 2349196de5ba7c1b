"""SMTP without I/O: bytes in, events and reply bytes out.

Nothing in this package opens a socket, reads a clock, imports asyncio or knows Salmon.  The same
machine serves the reversed connection and any other transport; its callers own sockets and time.

``replies``    one SMTP reply, and the parser for a peer's replies
``addresses``  domains (IDNA), mailboxes and paths
``envelope``   what a transaction says beside its data
``limits``     every limit of the machine, in one place
``receiver``   the server role
``sender``     the client role
"""
