"""Every limit of the SMTP machine, with its reason.

A limit that a user may set (message size, recipients) is a key of the service in the settings; the
rest are here because a hostile peer must not be able to make us hold more than this.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMMAND_TIMEOUT", "RECIPIENT_COST", "SINK_AT", "AheadLimits", "Limits"]

# RFC 5321 4.5.3.2.7: a server waits at least 5 minutes for the next command; in seconds.
COMMAND_TIMEOUT = 300.0

# Octets of a message that are kept in memory where there is a sink for more.
SINK_AT = 256 * 1024

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Octets that a recipient costs beside its command: what Python needs for it.
RECIPIENT_COST = 250


@dataclass(frozen=True)
class Limits:
    """What one SMTP session may cost; octets unless it says otherwise.

    ``message``             a message as it comes, announced as SIZE (RFC 1870); then 552.
    ``recipients``          accepted RCPTs of a transaction (RFC 5321 4.5.3.1.8: at least 100);
                            then 452, and the client sends the rest in another transaction.
    ``envelope``            the MAIL and the accepted RCPTs of a transaction, with what a recipient
                            costs us beside; then 452, as for too many recipients.
    ``command_line``        a command with its CRLF.  RFC 5321 4.5.3.1.4 has 512; SIZE, SMTPUTF8
                            and the DSN parameters add up to about 1,200 (RFC 3461 4).
    ``text_line``           a line of the message.  RFC 5321 4.5.3.1.6 has 1,000, but the client
                            has taken such mail from the world already, and refusing it here would
                            bounce what every mail reader shows; only the absurd is refused.
    ``read_through``        content that is read to its end and thrown away when it is more than
                            ``message``, so that the client hears 552 and can bounce it properly
                            (RFC 3030 4.2).  No mailbox anywhere takes a message of this size: who
                            announces or sends more hears 421 at once.
    ``chunks``              BDATs of a transaction; then 421.  Enough for the largest message in
                            pieces of 1 KiB; a command for each octet is no way to send mail.
    ``refusals``            recipients and messages refused in a row, with none taken between them;
                            then 421.  Ten times ``recipients``: mail for many unknown recipients is
                            everyday, a client that goes on for ever reads no replies.
    ``junk``                unproductive commands in a row (NOOP, RSET, EHLO, VRFY, HELP, data
                            for no one); then 421.  As many as Postfix allows
                            (``smtpd_junk_command_limit``); a refused recipient or a message is
                            progress, for the client knows more then than before.
    ``requests``            ETRNs of a session; then 421.  More than any customer has domains.
    ``errors``              syntax and sequence errors before ``421``: a peer that does not speak
                            SMTP (a port scanner, a browser) goes away soon.
    ``unanswered_messages`` whole messages read ahead while earlier ones are being delivered; what
                            has been read is delivered in rounds, and large rounds are fast.
    ``unanswered_octets``   the same, in octets, with their envelopes and the replies that wait
                            after them: bounds the memory of a session at one message plus this.
    ``unanswered_sunk``     of these, messages that went into sinks as they came: bounds the open
                            files and the disk that a session takes.  Enough to take the next ones
                            while one is made safe.
    """

    message: int = 50 * MIB
    recipients: int = 1000
    envelope: int = 512 * KIB
    command_line: int = 4 * KIB
    text_line: int = 1 * MIB
    read_through: int = 4 * GIB
    chunks: int = 50 * KIB
    refusals: int = 10_000
    junk: int = 100
    requests: int = 1000
    errors: int = 20
    unanswered_messages: int = 256
    unanswered_octets: int = 1 * MIB
    unanswered_sunk: int = 4


@dataclass(frozen=True)
class AheadLimits:
    """What a client writes ahead of its peer's answers, so that distance costs it no time.

    ``messages``  whole messages under way: as many as a peer that takes 1,000 a second answers
                  in a round trip of a quarter of a second.  When the line breaks, so many may
                  have been taken whose 250 is lost, and come a second time (RFC 1047).
    ``octets``    the same, in octets of content: a connection's memory, beside one message that
                  may always be under way.
    """

    messages: int = 256
    octets: int = 2 * MIB
