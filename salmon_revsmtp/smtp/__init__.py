"""SMTP without I/O: bytes in, events and reply bytes out.

Nothing in this package opens a socket, reads a clock, imports asyncio or knows Salmon.  The same
machines serve the reversed connection and any other transport; their callers own sockets and time.

``replies``    one SMTP reply, and the parser for a peer's replies
``addresses``  domains (IDNA), mailboxes and paths
``envelope``   what a transaction says beside its data
``limits``     every limit of the machines, in one place
``commands``   what every server role shares: lines, limits, EHLO, STARTTLS, QUIT
``receiver``   the server role that takes mail
``turn``       the provider before the reversal: AUTH, ATRN
``sasl``       the mechanisms of AUTH, the server's side
``sender``     the client role
"""
