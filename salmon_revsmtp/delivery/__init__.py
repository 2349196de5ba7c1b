"""The Salmon side: what becomes of a message between the end of its data and its 250.

``dispatcher``  one message: every recipient on its own, the replies combined
``batches``     the thread in which that is done
``router``      one recipient, through Salmon's Router and the project's handlers
``queue``       one recipient, into a Salmon Queue; ``consumer`` takes it from there
``trace``       where a message came from, and the header lines that we add
``notifier``    tells a sender of recipients that failed beside others, or keeps the message
``reporter``    whether a sender is told, and of what
``dsn``         the delivery status notification itself
``automatic``   what mail is told of nothing
``rates``       how many notifications go out
``outbox``      notifications on their way to the relay
``maildir``     Salmon Queues, written and read so that nothing is lost

All of it blocks, and runs in the delivery thread, never on the event loop.
"""
