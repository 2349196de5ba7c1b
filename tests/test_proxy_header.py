"""What a load balancer says of its client, in octets."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salmon_revsmtp.net.proxyheader import (
    BLOCK,
    LINE,
    ProxyHeader,
    ProxyHeaderError,
    read_header,
)

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version_2(kind: int, family: int, block: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", kind, family, len(block)) + block


def addresses(source: str, port: int, destination: str = "", to: int = 25) -> bytes:
    """As version 2 has them."""
    ours = ipaddress.ip_address(source)
    theirs = ipaddress.ip_address(destination or ("192.0.2.1" if ours.version == 4 else "2001::1"))
    return ours.packed + theirs.packed + struct.pack("!HH", port, to)


MORE = b"\x03\x00\x04\x01\x02\x03\x04"  # a checksum
IPV4, IPV6 = addresses("203.0.113.9", 41234), addresses("2001:db8::9", 41234)
UNIX = b"/run/x".ljust(108, b"\0") * 2

GOOD: list[tuple[bytes, tuple[str, int] | None]] = [
    (b"PROXY TCP4 203.0.113.9 192.0.2.1 41234 25\r\n", ("203.0.113.9", 41234)),
    (b"PROXY TCP6 2001:DB8::9 2001:db8::1 65535 0\r\n", ("2001:db8::9", 65535)),
    (b"PROXY TCP6 ::ffff:203.0.113.9 ::1 1 25\r\n", ("203.0.113.9", 1)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    (version_2(0x21, 0x11, IPV4), ("203.0.113.9", 41234)),
    (version_2(0x21, 0x11, IPV4 + MORE), ("203.0.113.9", 41234)),
    (version_2(0x21, 0x11, IPV4.ljust(BLOCK, b"\0")), ("203.0.113.9", 41234)),
    (version_2(0x21, 0x21, IPV6), ("2001:db8::9", 41234)),
    (version_2(0x21, 0x21, addresses("::ffff:203.0.113.9", 1)), ("203.0.113.9", 1)),
    (version_2(0x20, 0x00, b""), None),
    (version_2(0x20, 0x11, IPV4), None),  # LOCAL, whatever else it says
    (version_2(0x20, 0xFF, b"x"), None),
    (version_2(0x21, 0x00, b""), None),
    (version_2(0x21, 0x31, UNIX), None),
    (version_2(0x21, 0x12, IPV4), None),  # UDP
]

BAD = [
    b"EHLO x\r\n",
    b"proxy TCP4 203.0.113.9 192.0.2.1 41234 25\r\n",
    b"PROXY\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 41234\r\n",
    b"PROXY TCP4  203.0.113.9 192.0.2.1 41234 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 41234 25 \r\n",
    b"PROXY TCP4 203.0.113.9\n192.0.2.1 41234 25\r\n",
    b"PROXY TCP4 203.0.113.999 192.0.2.1 41234 25\r\n",
    b"PROXY TCP4 2001:db8::9 192.0.2.1 41234 25\r\n",
    b"PROXY TCP6 203.0.113.9 2001:db8::1 41234 25\r\n",
    b"PROXY TCP6 fe80::1%eth0 2001:db8::1 41234 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2 41234 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 65536 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 041 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 +41 25\r\n",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 41234 99999\r\n",
    b"PROXY UDP4 203.0.113.9 192.0.2.1 41234 25\r\n",
    "PROXY TCP4 203.0.113.\u0669 192.0.2.1 41234 25\r\n".encode(),
    b"PROXY UNKNOWNS\r\n",
    b"PROXY UNKNOWN".ljust(LINE, b"x"),
    b"PROXY UNKNOWN ".ljust(LINE - 1, b"x") + b"\r\n",
    b"\r\n\r\n\0\r\nQUIT\r",
    version_2(0x11, 0x11, IPV4),
    version_2(0x31, 0x11, IPV4),
    version_2(0x22, 0x11, IPV4),
    version_2(0x21, 0x41, IPV4),
    version_2(0x21, 0x13, IPV4),
    version_2(0x21, 0x11, IPV4[:-1]),
    version_2(0x21, 0x21, IPV6[:-1]),
    version_2(0x21, 0x31, UNIX[:-1]),
    version_2(0x21, 0x11, IPV4.ljust(BLOCK + 1, b"\0")),
    version_2(0x20, 0x00, bytes(BLOCK + 1)),
]


@pytest.mark.parametrize(("header", "client"), GOOD)
def test_what_a_header_says(header: bytes, client: tuple[str, int] | None) -> None:
    assert read_header(header) == ProxyHeader(client, len(header))
    assert read_header(header + b"EHLO x\r\n") == ProxyHeader(client, len(header))
    for end in range(len(header)):
        assert read_header(header[:end]) is None


@pytest.mark.parametrize("header", BAD)
def test_what_is_no_header(header: bytes) -> None:
    with pytest.raises(ProxyHeaderError) as refused:
        read_header(header)
    assert "203" not in str(refused.value), "nothing of it is repeated"


def test_the_longest_line_of_the_specification_is_taken() -> None:
    longest = b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n"
    full = ":".join(["ffff"] * 8).encode()
    longest = longest.replace(b"ffff:f...f:ffff", full)
    assert len(longest) <= LINE
    assert read_header(longest) == ProxyHeader(None, len(longest))


def outcome(data: bytes) -> ProxyHeader | str | None:
    try:
        return read_header(data)
    except ProxyHeaderError:
        return "refused"


HEADERS = st.sampled_from([one for one, _ in GOOD] + BAD)
MUTATED = st.builds(
    lambda data, at, octet: data[: at % len(data)] + octet + data[at % len(data) + 1 :],
    HEADERS,
    st.integers(0, 300),
    st.binary(max_size=3),
)


@given(st.one_of(st.binary(max_size=300), HEADERS, MUTATED), st.binary(max_size=40))
@example(b"PROXY UNKNOWN\r", b"\nEHLO x\r\n")
def test_any_split_of_the_octets_gives_the_same(data: bytes, more: bytes) -> None:
    """Once it is known what they are, what follows changes nothing: who hears them one by one and
    who hears them at once come to the same end."""
    whole = data + more
    known = None
    for end in range(len(whole) + 1):
        heard = outcome(whole[:end])
        assert known is None or heard == known
        known = heard
    if isinstance(known, ProxyHeader):
        assert known.octets <= len(whole)
        assert outcome(whole[: known.octets - 1]) is None, "not an octet more than it needs"
    elif known is None:
        assert len(whole) < 16 + BLOCK, "it does not wait for ever"


@given(
    st.ip_addresses(),
    st.integers(0, 65535),
    st.binary(max_size=60),
    st.booleans(),
)
def test_what_was_written_is_what_is_read(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, rest: bytes, text: bool
) -> None:
    if text:
        said = f"PROXY TCP{address.version} {address} {address} {port} 25\r\n".encode()
    else:
        block = addresses(str(address), port)
        said = version_2(0x21, 0x11 if address.version == 4 else 0x21, block + MORE)
    plain = str(getattr(address, "ipv4_mapped", None) or address)
    assert read_header(said + rest) == ProxyHeader((plain, port), len(said))
