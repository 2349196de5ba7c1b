"""The provider: the host that takes mail for customers, passes it on or holds it, and sends it down
the connection after ATRN (RFC 2645).

``accounts``  who may log in, and for which domains
``intake``    what the world sends
``live``      passes it on while a customer's session is open
``hold``      the mail that waits, on disk
``handover``  sends either down a session
``server``    listens, and takes a connection through both of its halves
"""
