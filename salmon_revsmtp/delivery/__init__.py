"""The Salmon side: what becomes of a message between the end of its data and its 250.

``dispatcher``  one message: trace header, every recipient on its own, the replies put together
``router``   one recipient, through Salmon's Router and the project's handlers
``queue``    one recipient, into a Salmon Queue; and the consumer that takes it from there
``served``   who has been served, so that a repeat is not handled again
``trace``    the header lines that we add
``bounce``   the delivery status notification for a recipient that failed beside others

All of it blocks, and runs in the delivery thread, never on the event loop.
"""
