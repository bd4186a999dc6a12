"""Start the Hub of hub_server.py and return how a process finds it; for tests that push and load over HTTP."""

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving():
    """Yield the address of a Hub of our own."""
    script = Path(__file__).with_name("hub_server.py")
    server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.terminate()
        server.wait()


def environment(hub, home, token="tester", **more):
    """Return the environment of a process that uses that Hub with a cache of its own, as `token` or as nobody.

    The client reads its settings when it is imported. Xet is a service of the real Hub alone; without it large files
    go through git-LFS.
    """
    settings = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    secret = {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | settings | secret | more


def asked(hub):
    """Return [method, path, query] of all requests so far."""
    return get_json(f"{hub}/_log")


def get_json(address):
    """Return what an address answers, read as JSON."""
    return json.loads(get(address))


def get(address):
    """Return what an address answers."""
    with urllib.request.urlopen(address) as answer:
        return answer.read()


START = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
import llava_lite.model
from llava_lite.inference import load, reply
from llava_lite.processing.processor import LlavaLiteProcessor
image = Image.new("RGB", (40, 30), (200, 80, 10))
"""


def run_client(hub, home, code, token="tester", succeeds=True, start=START, **more):
    """Run code in a process of its own that uses the Hub; return what it printed, or its errors if it must fail."""
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(hub, home, token, **more),
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return done.stdout if succeeds else done.stderr
