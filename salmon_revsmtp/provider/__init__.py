"""The provider: the host that holds mail, and sends it down the connection after ATRN (RFC 2645).

As much as the demo and the tests need, and real.

``accounts``   who may log in, and for which domains
``holdqueue``  the mail that waits, on disk
``server``     listens, and takes a connection through both of its halves
"""
