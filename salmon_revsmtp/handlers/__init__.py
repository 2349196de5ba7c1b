"""Handlers that come with it.  A project lists one of them in its settings::

    handlers = ["salmon_revsmtp.handlers.maildir"]

``maildir``    keeps the mail: a Maildir for each address
``lmtp``       hands the mail on to a server by LMTP
``smtp``       hands the mail on to a server by SMTP

``mailboxes``  the Maildirs; ``names``: what they are called
``forward``    the handler of the two that hand on; ``nexthop``: the connection
``options``    their settings, which stand in the project's settings module

The first three register a route when they are imported, as handlers do, and Salmon may import them
again (``Router.RELOAD``); what is to outlive that is in the others.
"""
