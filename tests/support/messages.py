"""The message that most tests send."""

# Its text begins with a dot, which DATA doubles and BDAT does not.
MESSAGE = b"From: Ann <ann@example.net>\r\nTo: list@example.net\r\nSubject: hi\r\n\r\n.hello\r\n"
