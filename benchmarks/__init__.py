"""Salmon-revsmtp beside its peers: the same messages, in turn, on one machine.

``make bench`` runs all of it and prints tables of medians, spread and ratios.

``__main__``   the command: which sections, how many rounds, in what order
``table``      sections, cases and targets; what is made of their figures
``machine``    what this machine is, and which versions were measured
``processes``  child processes, ended by their pid
``peers``      which peers are here, and how each is run
``project``    the Salmon projects, whose handlers do nothing
``serving``    our provider as its owners run it
``feeding``    the other end: a provider or client that is never the bottleneck, and an ideal sink
``intake``, ``distance``, ``tls``, ``many``, ``threads``, ``startup``, ``alone``, ``provider``,
``hosts``: parts of the table
``bare``, ``holding``, ``hosting``, ``delay``, ``crowd``, ``filling``, ``moments``, ``burst``:
processes that those start

All of it is on the loopback; nothing is installed, and nothing is left behind.
"""
