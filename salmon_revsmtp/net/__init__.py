"""asyncio around the SMTP machine: connections, in either role."""
