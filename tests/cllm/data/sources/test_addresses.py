"""Which addresses a crawl may reach."""

import socket

import pytest

from cllm.data.sources.addresses import Guard, Refused
from cllm.runtime.errors import UserError

_FORBIDDEN = """
127.0.0.1 127.0.0.53 127.255.255.255 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 192.168.255.255 169.254.169.254 169.254.0.1
100.64.0.1 100.100.100.200 100.127.255.255 0.0.0.0 0.1.2.3 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250
240.0.0.1 255.255.255.255 168.63.129.16 192.88.99.1
::1 :: ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:168.63.129.16 ::ffff:0:127.0.0.1 fc00::1 fd00:ec2::254
fe80::1 fe80::1%eth0 fec0::1 ff02::1 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: 2002:808:808::1
2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 100::1 3fff::1 5f00::1 4000::1 2a00:1450::5efe:7f00:1 2a00:1450::200:5efe:10.0.0.1
"""
_PUBLIC = """
1.1.1.1 8.8.8.8 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1 168.63.129.15 168.63.129.17 169.253.255.255 172.15.255.255
172.32.0.0 192.167.255.255 192.169.0.0 223.255.255.255 198.17.255.255 198.20.0.0 11.0.0.0
2606:4700:4700::1111 2a00:1450:4001:80b::200e 2001:4860:4860::8888 64:ff9b::8.8.8.8 ::ffff:8.8.8.8 2a00:1450::5efe:808:808
"""


FORBIDDEN, PUBLIC = _FORBIDDEN.split(), _PUBLIC.split()


@pytest.mark.parametrize("address", FORBIDDEN)
def test_an_address_that_is_not_public_is_refused_in_every_form(address):
    assert Guard().refusal(address, 80)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_reached(address):
    assert Guard().refusal(address, 80) == ""


def test_an_allowed_address_allows_no_other():
    guard = Guard(["127.0.0.5"])
    assert guard.refusal("127.0.0.5", 80) == guard.refusal("127.0.0.5", 9999) == ""
    assert guard.refusal("::ffff:127.0.0.5", 80) == "", "the system connects to the same address"
    for other in (*FORBIDDEN, "127.0.0.4", "127.0.0.6", "64:ff9b::127.0.0.5", "::127.0.0.5", "2002:7f00:5::"):
        assert guard.refusal(other, 80), other


def test_a_port_allows_no_other_port():
    guard = Guard(["127.0.0.5:8000", "[::1]:8001", "fd00::7"])
    assert guard.refusal("127.0.0.5", 8000) == guard.refusal("::1", 8001) == guard.refusal("fd00::7", 1) == ""
    assert guard.refusal("127.0.0.5", 8001) and guard.refusal("::1", 8000) and guard.refusal("fd00::8", 1)


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "127.0.0.0/8", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "127.1", "*",
     "127.0.0.1-9", "http://127.0.0.1", "0x7f000001", "[127.0.0.1]:80:1", "ff02::1", "127.0.0.256", "127.0.0.1,127.0.0.2", "fe80::1%lo"],
)  # fmt: skip
def test_only_single_addresses_can_be_allowed(text):
    with pytest.raises(UserError, match="--allow-private"):
        Guard([text])


def test_a_socket_is_made_for_allowed_addresses_only():
    with Guard(["127.0.0.1"]).socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))) as made:
        assert made.family == socket.AF_INET
    with pytest.raises(Refused, match=r"127\.0\.0\.2 is not a public address \(this machine\)"):
        Guard(["127.0.0.1"]).socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 80)))
    with pytest.raises(Refused):
        Guard().socket((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%1", 80, 0, 1)))
    with pytest.raises(Refused):
        Guard().socket((socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/run/docker.sock"))
