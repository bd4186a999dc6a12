"""Images of requests: data URLs within limits; addresses of listed hosts alone, and never of a private network."""

import base64
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import draw_image

from llava_lite.serve.api.chat_request import ImageURL
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.images import ImageLimits, is_public, read_image

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
        ("https://example.org/a.png", {"hosts": frozenset({"b.org"})}, "fetches from b.org alone"),
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
        ((200, {"Content-Length": "900"}, b"x" * 10), "sent 10 bytes and then nothing"),
        ((200, {"Transfer-Encoding": "chunked"}, b"ffffffff"), "could not be read"),
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
    with pytest.raises(RequestError, match="cannot use the image"):
        read("http://img.example.org/a.png", hosts=HOSTS, timeout_s=0.5)
    web.routes.clear()
    assert ended.wait(10)
