"""A host is listed in the form in which it is compared, or refused with what is wanted."""

import pytest

from llava_lite.commands.serve import build_parser
from llava_lite.serve.api.fetch import Refused, check_url
from llava_lite.serve.api.hosts import read_host


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("images.example.org", "images.example.org"),
        ("IMAGES.Example.org.", "images.example.org"),
        ("images.example.org:8443", "images.example.org:8443"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        # IDNA 2008 and not 2003, in which this is strasse.de: another host.
        ("Stra\u00dfe.de.:443", "xn--strae-oqa.de:443"),
        ("8.8.8.8", "8.8.8.8"),
        ("images1", "images1"),
        ("2606:4700:0::1111", "2606:4700::1111"),
        ("[2606:4700::1111]:8443", "[2606:4700::1111]:8443"),
    ],
)
def test_a_host_has_one_form(given, host):
    assert read_host(given) == host == read_host(host)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("https://images.example.org", "is an address, not the name of a host"),
        ("images.example.org/", "is an address"),
        ("*.example.org", "has a wildcard; each host is listed by its full name"),
        ("a.b:x", "'x' is no port, which is a number from 1 to 65535"),
        ("a.b:", "'' is no port"),
        ("a.b:0", "'0' is no port"),
        ("a.b:65536", "'65536' is no port"),
        *[(host, "is no name of a host") for host in ("", ".", "a..b", "a.b..", " a.b", "me@a.b", "-a.b", "127.1")],
        *[(host, "is no name of a host") for host in ("0x7f000001", "[", "a" * 64, "b\u00fc..x", "::g")],
        *[(host, "is no public address") for host in ("[::1]", "::1", "10.0.0.1:80", "::ffff:127.0.0.1", "localhost")],
    ],
)
def test_what_no_image_can_come_from_is_refused_at_once(given, reason, capsys):
    with pytest.raises(ValueError, match=r"expected a full name such as images\.example\.org") as error:
        read_host(given)
    assert reason in str(error.value)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["model", f"--allow-host={given}"])
    shown = capsys.readouterr().err
    assert reason in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("http://example.net./a.png", "example.net"),
        ("http://EXAMPLE.net/a.png", "example.net."),
        ("https://example.net:443/a.png", "example.net"),
        ("https://example.net/a.png", "example.net:443"),
        ("https://b\u00fccher.example/a.png", "b\u00fccher.example"),
        ("https://xn--bcher-kva.example/a.png", "b\u00fccher.example"),
        ("https://[2606:4700::1111]/a.png", "[2606:4700::1111]:443"),
    ],
)
def test_an_address_matches_its_host_however_it_is_written(url, listed):
    scheme, host, port, target = check_url(url, frozenset({read_host(listed)}))
    assert (host.isascii(), host.endswith("."), target) == (True, False, "/a.png")
    assert port == (443 if scheme == "https" else 80)


def test_a_refusal_names_no_listed_host():
    with pytest.raises(Refused, match=r"other\.org:443 is not allowed: this server does not fetch from it") as error:
        check_url("https://other.org/a.png", frozenset({"secret.example.org"}))
    assert "secret" not in str(error.value)
