"""Without PyAV a file that needs it is told with the extra; with it, what cannot be decoded is told with the path."""

import subprocess
import sys

CODE = """
import sys
sys.modules["av"] = None
from llava_lite.media.load import load_media
for kind in ("audio", "video"):
    try:
        load_media(kind, b"ID3 of an mp3")
    except ImportError as error:
        print(error)
"""


def test_a_missing_decoder_is_one_sentence_with_the_extra():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    line = "'13 bytes' needs PyAV to be decoded; it comes with: pip install 'llava-lite[media]'"
    assert done.stdout.splitlines() == [line, line], done.stderr
