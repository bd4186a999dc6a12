"""Ask a judge about answers: a model behind OpenAI's chat completions, from which reviews are kept line by line.

Any server that takes POST /v1/chat/completions will do (OpenAI's, vLLM, llama.cpp). The key is read from the
environment variable OPENAI_API_KEY; without it none is sent.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PATH = "/chat/completions"
KEY = "OPENAI_API_KEY"
# Answers of a server that is busy or starting: asked again. Others, such as 401, stay what they are.
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Judge:
    """A model that judges.

    address: of the server, with or without /v1/chat/completions. model: that the server is asked for. num_tries: until
    it is given up; the pause between them starts at pause_s and doubles up to longest_pause_s.
    """

    address: str
    model: str
    num_tries: int = 6
    pause_s: float = 1.0
    longest_pause_s: float = 60.0
    timeout_s: float = 180.0

    @property
    def url(self) -> str:
        """Return the full address; ValueError for one that is not http."""
        address = self.address.rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"--judge {self.address!r} is no address; expected http://HOST:PORT or https://HOST.")
        if address.endswith(PATH):
            return address
        return f"{address}{PATH}" if re.search(r"/v\d+$", address) else f"{address}/v1{PATH}"

    def ask(self, messages: Sequence[Mapping[str, str]], **settings) -> str:
        """Return the judge's answer to messages of {role, content}; settings: temperature, max_tokens.

        Raises ConnectionError if the server cannot be reached or is busy after all tries, and ValueError if it refuses
        or answers anything but a chat completion.
        """
        body = json.dumps({"model": self.model, "messages": list(messages), **settings}).encode()
        pause = self.pause_s
        for attempt in range(1, self.num_tries + 1):
            try:
                return self.read(self.send(body))
            except Busy as error:
                if attempt == self.num_tries:
                    raise ConnectionError(
                        f"the judge at {self.url} did not answer in {self.num_tries} tries: {error} Reviews so far "
                        "are kept; run again when it is up."
                    ) from error
                time.sleep(min(max(pause, error.wait_s), self.longest_pause_s))
                pause *= 2
        raise AssertionError("a loop of at least one try returns or raises")

    def send(self, body: bytes) -> bytes:
        """Return what the server answers; Busy where it is worth asking again, ValueError where it refuses."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        key = os.environ.get(KEY)
        if key:
            # A server that sends us elsewhere does not pass the key on.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = shorten(error.read().decode("utf-8", "replace"))
            if error.code in BUSY:
                raise Busy(f"HTTP {error.code}: {text}", read_wait(error.headers.get("Retry-After"))) from error
            advice = f" Set {KEY}, or check it." if error.code in (401, 403) else ""
            raise ValueError(f"the judge at {self.url} refuses with HTTP {error.code}: {text}{advice}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Busy(f"{type(reason).__name__}: {reason}.") from error

    def read(self, body: bytes) -> str:
        """Return the text of a chat completion; ValueError for anything else."""
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f"the judge at {self.url} answers no chat completion: {shorten(body.decode('utf-8', 'replace'))} "
                "Expected JSON with choices[0].message.content; is this the address of an OpenAI-compatible server?"
            )
        return text


class Busy(Exception):
    """The server may answer later; wait_s: as it says, 0 if it does not."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


class Review(NamedTuple):
    """What a judge said about an answer: its text, and the figures in it; None where it gave none."""

    content: str
    figures: list[float] | None


def review_all(
    judge: Judge, path: Path, prompts: Sequence[str], review: Callable[[Judge, str], Review], ids: Sequence
) -> list[Review]:
    """Return the review of each prompt, those of an earlier run from the file and the rest from the judge.

    path: lines of {index, question_id, model, asked, content, tuple}, written as they come; asked: digest of the
    prompt, so that a review of another answer is not taken for that of this one.
    """
    from tqdm import tqdm

    known = read_reviews(path, judge.model)
    reviews = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for index, prompt in enumerate(tqdm(prompts, desc=f"judge {judge.model}")):
            asked = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            found = known.get((index, asked))
            if found is None:
                found = review(judge, prompt)
                line = {"index": index, "question_id": ids[index], "model": judge.model, "asked": asked}
                line |= {"content": found.content, "tuple": found.figures}
                file.write(json.dumps(line) + "\n")
                file.flush()
            reviews.append(found)
    if reviews and all(one.figures is None for one in reviews):
        raise ValueError(
            f"the judge {judge.model!r} gave no figure in {len(reviews)} reviews; the last says "
            f"{shorten(found.content)!r} Name another --judge-model, or delete {path} to ask again."
        )
    return reviews


def read_reviews(path: Path, model: str) -> dict[tuple[int, str], Review]:
    """Return {(index, digest of the prompt): review} of a file; a line that a kill has cut is taken off the file."""
    if not path.is_file():
        return {}
    complete, newline, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        path.write_bytes(complete + newline)
    found = {}
    for number, text in enumerate(complete.split(b"\n") if complete else [], 1):
        try:
            line: dict[str, Any] = json.loads(text)
            if line["model"] == model:
                found[line["index"], line["asked"]] = Review(line["content"], line["tuple"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no review ({error!r}). Move the file away to ask again."
            ) from error
    return found


def read_wait(text: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 for a date or nothing."""
    return float(text) if text is not None and text.strip().isdigit() else 0.0


def shorten(text: str, length: int = 200) -> str:
    """Return a text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."
