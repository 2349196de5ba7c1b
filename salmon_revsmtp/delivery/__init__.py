"""The Salmon side: what becomes of a message between the end of its data and its 250.

``dispatcher``  one message: trace header, every recipient on its own, the replies put together
``router``   one recipient, through Salmon's Router and the project's handlers
``queue``    one recipient, into a Salmon Queue
``consumer`` takes it from there through the handlers, in another process
``batches``  the thread in which all of this happens, and what waits for it
``trace``    the header lines that we add
``dsn``      the delivery status notification for a recipient that failed beside others
``outbox``   notifications on their way to the relay
``maildir``  files that survive a crash at any instruction

All of it blocks, and runs in the delivery thread, never on the event loop.
"""
