"""Images of requests: data URLs within limits; addresses of listed hosts alone, and never of a private network."""

import base64
import io
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import draw_image

from llava_lite.serve.api.addresses import is_public
from llava_lite.serve.api.chat_request import ImageURL
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits, read_image

PUBLIC = "93.184.216.34"


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def as_data(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def read(url, **limits):
    return read_image(ImageURL(url, "messages[0].content[0]"), ImageLimits(**limits))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_a_data_url_is_the_image_that_it_holds(kind):
    image = draw_image(1)
    found = read(as_data(as_bytes(image, kind)))
    assert (found.mode, found.size) == ("RGB", image.size)
    if kind in ("PNG", "BMP"):
        assert found.tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["capitals", "lines", "JSON lines", "percent"])
def test_a_data_url_may_be_written_in_other_ways(kind):
    content = as_bytes(draw_image(1))
    lines = base64.encodebytes(content).decode()
    url = {
        "capitals": as_data(content).replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"),
        "lines": f"data:image/png;base64,{lines}",
        "JSON lines": f"data:image/png;base64,{lines}".replace("\n", "\r\n"),
        "percent": as_data(content).replace("+", "%2B").replace("=", "%3D"),
    }[kind]
    assert read(url).tobytes() == draw_image(1).tobytes()
    # Line breaks are no bytes of the image.
    assert read(url, max_bytes=len(content)).tobytes() == draw_image(1).tobytes()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"></svg>'


@pytest.mark.parametrize("content", [SVG, b"%PDF-1.7 ...", as_bytes(draw_image(1))[:60]], ids=["svg", "pdf", "cut"])
def test_what_is_no_image_is_answered_with_the_formats_that_are_read(content):
    with pytest.raises(RequestError, match=r"Formats that are read: JPEG, PNG, WEBP, .* and AVIF"):
        read(as_data(content))


@pytest.mark.parametrize(
    ("url", "limits", "reason"),
    [
        ("data:image/png,abc", {}, "expected data:image/png;base64"),
        ("data:image/png;base64,a*b", {}, "it is not base64"),
        (as_data(b"no image"), {}, "no image that can be read"),
        (as_data(as_bytes(draw_image(1))[:60]), {}, "cannot use the image"),
        (as_data(as_bytes(draw_image(1))), {"max_bytes": 50}, "more than 50 bytes"),
        (as_data(as_bytes(draw_image(0))), {"max_pixels": 1599}, "40 x 40 pixels, more than 1,599"),
        ("image.png", {}, "no data URL and no address"),
        ("/etc/passwd", {}, "no data URL and no address"),
        ("file:///etc/passwd", {}, "no data URL and no address"),
        ("ftp://example.org/a.png", {"hosts": frozenset({"example.org"})}, "no data URL and no address"),
        ("https://user@example.org/a.png", {"hosts": frozenset({"example.org"})}, "no address such as"),
        ("https://[::1/a.png", {}, "is no address"),
        ("https://example.org/a.png", {}, "fetches no images"),
        ("https://example.org/a.png", {"hosts": frozenset({"b.org"})}, "this server does not fetch from it"),
        ("https://b.org:8443/a.png", {"hosts": frozenset({"b.org"})}, "b.org:8443 is not allowed"),
        ("https://b.org.evil.org/a.png", {"hosts": frozenset({"b.org"})}, "not allowed"),
        ("https://evil.org/b.org", {"hosts": frozenset({"b.org"})}, "not allowed"),
        ("http://127.0.0.1/a.png", {"hosts": frozenset({"127.0.0.1"})}, "private network"),
        ("http://localhost/a.png", {"hosts": frozenset({"localhost"})}, "private network"),
        ("http://[::1]/a.png", {"hosts": frozenset({"::1"})}, "private network"),
        ("http://169.254.169.254/latest", {"hosts": frozenset({"169.254.169.254"})}, "private network"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_not_allowed_or_broken_is_refused(url, limits, reason):
    with pytest.raises(RequestError, match="cannot use the image") as refused:
        read(url, **limits)
    assert reason in str(refused.value)
    assert (refused.value.status, refused.value.code) == (400, "invalid_image")
    assert refused.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        *[(address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")],
        *[(address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.0.1")],
        *[(address, False) for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1")],
        # Private IPv4 addresses within those of NAT64, 6to4 and IPv4-compatible ones.
        *[(address, False) for address in ("64:ff9b::7f00:1", "2002:a00:1::1", "::127.0.0.1")],
    ],
)
def test_public_addresses_are_told_from_others(address, expected):
    assert is_public(address) is expected


@pytest.fixture
def web(monkeypatch):
    """A web server under names of the public Internet: web.routes is {path: (status, headers, body)}.

    The network is this machine: names are looked up in web.names, and web.connected lists the addresses that were
    connected to; whatever they are, this server answers.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.seen.append((self.headers["Host"], self.path))
            status, headers, body = web.routes[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in [body] if isinstance(body, bytes) else body:
                self.wfile.write(piece)

        def log_message(self, *args):
            pass

    class Slow(ThreadingHTTPServer):
        daemon_threads = True

    web = Slow(("127.0.0.1", 0), Handler)
    web.routes, web.seen, web.connected = {}, [], []
    web.names = {"img.example.org": [PUBLIC], "both.example.org": [PUBLIC, "10.0.0.1"], "in.example.org": ["10.0.0.1"]}

    def look_up(host, port, **more):
        if host not in web.names:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in web.names[host]]

    def create_connection(address, timeout):
        web.connected.append(address)
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", web.server_port))
        return connection

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield web
    web.shutdown()
    thread.join()
    web.server_close()


HOSTS = frozenset(f"{name}.example.org" for name in ("img", "both", "in", "gone")) | {"img.example.org:8080"}


def test_an_image_of_a_listed_host_is_fetched_from_the_address_that_was_checked(web):
    web.routes["/a.png?x=1"] = (200, {}, as_bytes(draw_image(3)))
    assert read("http://IMG.example.org/a.png?x=1", hosts=HOSTS).tobytes() == draw_image(3).tobytes()
    web.routes["/"] = web.routes["/a.png?x=1"]
    assert read("http://img.example.org:8080", hosts=HOSTS).size == draw_image(3).size
    assert web.connected == [(PUBLIC, 80), (PUBLIC, 8080)]
    assert web.seen == [("img.example.org", "/a.png?x=1"), ("img.example.org:8080", "/")]


@pytest.mark.parametrize("name", ["both.example.org", "in.example.org"])
def test_a_name_with_any_private_address_is_not_connected_to(web, name):
    with pytest.raises(RequestError, match="private network"):
        read(f"http://{name}/a.png", hosts=HOSTS)
    assert web.connected == []


def test_a_name_that_changes_after_the_check_leads_nowhere_else(web, monkeypatch):
    web.routes["/a.png"] = (200, {}, as_bytes(draw_image(3)))
    first = socket.getaddrinfo

    def once(host, port, **more):
        found = first(host, port, **more)
        web.names[host] = ["10.0.0.1"]
        return found

    monkeypatch.setattr(socket, "getaddrinfo", once)
    read("http://img.example.org/a.png", hosts=HOSTS)
    assert web.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://other.example.org/a.png", "other.example.org:80 is not allowed"),
        ("http://in.example.org/a.png", "private network"),
        ("http://127.0.0.1/a.png", "127.0.0.1:80 is not allowed"),
        ("file:///etc/passwd", "no data URL and no address"),
        ("/start", "redirected more than 3 times"),
        ("", "answered with status 302, a redirect without an address"),
        ("http://gone.example.org/", "gone.example.org has no address"),
    ],
)
def test_each_redirect_is_checked_again(web, location, reason):
    web.routes["/start"] = (302, {"Location": location}, b"")
    with pytest.raises(RequestError) as refused:
        read("http://img.example.org/start", hosts=HOSTS)
    assert reason in str(refused.value)
    assert {address for address, _ in web.connected} == {PUBLIC}


def test_a_redirect_within_the_list_is_followed(web):
    web.routes["/start"] = (301, {"Location": "/b.png"}, b"")
    web.routes["/b.png"] = (200, {}, as_bytes(draw_image(4)))
    assert read("http://img.example.org/start", hosts=HOSTS).tobytes() == draw_image(4).tobytes()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, {}, b""), "answered with status 404"),
        ((200, {}, b"x" * 2000), "more than 1,000 bytes"),
        ((200, {"Content-Length": "900"}, b"x" * 10), "ended the connection before"),
        ((200, {"Transfer-Encoding": "chunked"}, b"ffffffff"), "ended the connection before"),
    ],
    ids=["status", "size", "cut", "chunks"],
)
def test_what_a_host_sends_has_limits(web, answer, reason):
    web.routes["/a.png"] = answer
    with pytest.raises(RequestError) as refused:
        read("http://img.example.org/a.png", hosts=HOSTS, max_bytes=1000)
    assert reason in str(refused.value)


def test_a_host_that_sends_a_byte_at_a_time_is_given_up(web):
    ended = threading.Event()

    def drip():
        try:
            while True:
                yield b"x"
                time.sleep(0.02)
        finally:
            # Writing fails once the client has closed the connection.
            ended.set()

    web.routes["/a.png"] = (200, {}, drip())
    with pytest.raises(RequestError, match=r"img\.example\.org did not send the image within 0\.5 s\."):
        read("http://img.example.org/a.png", hosts=HOSTS, timeout_s=0.5)
    web.routes.clear()
    assert ended.wait(10)


def waiting(seconds, then):
    """Return the headers and the body of a response that waits, for `web`."""

    class Waiting(dict):
        def items(self):
            time.sleep(seconds)
            return then.items()

    return Waiting()


def test_redirects_and_look_ups_are_within_the_one_time_of_an_image(web, monkeypatch):
    look_up = socket.getaddrinfo

    def slow(host, port, **more):
        time.sleep(0.4)
        return look_up(host, port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for i in range(3):
        web.routes[f"/{i}"] = (302, waiting(0.4, {"Location": f"/{i + 1}"}), b"")
    web.routes["/3"] = (200, {}, as_bytes(draw_image(3)))
    # Each hop takes less than a second, and all of them more than three.
    with pytest.raises(RequestError, match=r"did not send the image within 1 s\.|not found within 1 s\."):
        read("http://img.example.org/0", hosts=HOSTS, timeout_s=1)
    assert len(web.seen) < 3
    assert read("http://img.example.org/0", hosts=HOSTS, timeout_s=60).size == draw_image(3).size


def test_a_name_that_is_looked_up_for_too_long_is_given_up(web, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: ended.wait(60) and [])
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"addresses of img\.example\.org were not found within 0\.2 s\."):
        read("http://img.example.org/a.png", hosts=HOSTS, timeout_s=0.2)
    assert time.monotonic() - began < 30
    ended.set()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "img.example.org refused the connection."),
        (ConnectionResetError(104, "reset"), "img.example.org ended the connection before the image was complete."),
        (OSError(113, "No route to host"), "img.example.org could not be reached (No route to host)."),
        (ssl.SSLCertVerificationError("expired"), "img.example.org has a certificate that is not trusted"),
        (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), "img.example.org could not be asked by https"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_connection_that_fails_is_answered_with_the_true_reason(web, monkeypatch, error, reason):
    def fail(address, timeout):
        raise error

    error.verify_message = "certificate has expired"
    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(RequestError) as refused:
        read("http://img.example.org/a.png", hosts=HOSTS)
    assert reason in str(refused.value)
    assert "within" not in str(refused.value)
