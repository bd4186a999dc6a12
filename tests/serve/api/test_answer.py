"""An answer's text is what `reply` makes of its tokens; its pieces add up to it, and nothing is shown too early."""

import pytest

from llava_lite.serve.api.answer import Answer, Ends, overlap
from llava_lite.serve.api.sampling import Sampling

EOS = 0
WORDS = {EOS: "", 1: "red", 2: " blue", 3: " ", 4: "#", 5: "##", 6: "\n", 7: "é"}


def decode(tokens, skip_special_tokens=False):
    """Write words one after another; the end token is special, and 8 and 9 are the two bytes of é."""
    text = b"".join({8: b"\xc3", 9: b"\xa9"}.get(one, WORDS.get(one, "").encode()) for one in tokens)
    return text.decode(errors="replace") + ("" if skip_special_tokens or EOS not in tokens else "</s>")


def generate(tokens, end="###", **more):
    """Return (pieces, (text, reason, number of tokens)) of an answer with these tokens."""
    events = []
    options = {"max_new_tokens": 99, "ends": Ends((EOS,), end)} | more
    answer = Answer({}, Sampling(0, 1, 0), decode=decode, send=events.append, **options)
    for token in tokens:
        if not answer.is_over:
            answer.add(token)
    pieces = [values[0] for kind, *values in events if kind == "piece"]
    return pieces, next((tuple(values) for kind, *values in events if kind == "end"), None)


@pytest.mark.parametrize(
    ("tokens", "text", "reason", "count"),
    [
        ([1, 2, EOS], "red blue", "stop", 3),
        ([3, 1, 3, EOS], "red", "stop", 4),
        ([1, 4, 5, 2], "red", "stop", 3),
        ([1, 4, 2, EOS], "red# blue", "stop", 4),
        ([1, 4, EOS], "red#", "stop", 3),
        ([EOS], "", "stop", 1),
        ([1, 8, 9, EOS], "redé", "stop", 4),
        ([1, 8, EOS], "red\ufffd", "stop", 3),
    ],
)
def test_the_text_is_that_of_the_tokens_up_to_the_end(tokens, text, reason, count):
    pieces, end = generate(tokens)
    assert end == (text, reason, count)
    assert "".join(pieces) == text


def test_an_answer_ends_where_it_may_not_be_longer():
    assert generate([1, 2, 2, 2], max_new_tokens=2) == (["red", " blue"], ("red blue", "length", 2))


def test_an_answer_ends_before_the_first_stop_of_the_caller():
    pieces, end = generate([1, 6, 1, 2], stops=("blue", "d\nr"))
    assert (pieces, end) == (["re", ""], ("re", "stop", 3))


def test_a_stop_of_the_checkpoint_stays_in_the_text():
    assert generate([1, 2, 1], ends=Ends((EOS,), "", kept=("lu",)))[1] == ("red blue", "stop", 2)


def test_text_that_may_begin_a_stop_or_is_unfinished_is_held_back():
    assert generate([1, 4])[0] == ["red"]
    assert generate([1, 3])[0] == ["red"]
    assert generate([1, 8])[0] == ["red"]
    assert generate([1, 8, 9])[0] == ["red", "é"]


def test_what_was_sent_is_not_sent_again_after_a_restart():
    events = []
    answer = Answer({}, Sampling(0, 1, 0), Ends((EOS,), ""), decode, events.append, max_new_tokens=9, num_top=1)
    answer.add(1, [(1, -0.5), (1, -0.5)])
    answer.restart()
    for token in (1, 2, EOS):
        answer.add(token, [(token, -0.5), (2, -0.25)])
    pieces = [values for kind, *values in events if kind == "piece"]
    assert [text for text, _ in pieces] == ["red", " blue", ""]
    assert [[entry["token"] for entry in entries] for _, entries in pieces] == [["red"], [" blue"], []]
    assert events[-1] == ("end", "red blue", "stop", 3)


def test_log_probabilities_name_the_token_its_bytes_and_the_most_probable_ones():
    events = []
    answer = Answer({}, Sampling(0, 1, 0), Ends((EOS,), ""), decode, events.append, max_new_tokens=9, num_top=2)
    answer.add(7, [(7, -0.5), (EOS, -0.1), (8, -2.0)])
    ((_, text, (entry,)),) = events
    assert text == "é"
    assert entry == {
        "token": "é",
        "bytes": [0xC3, 0xA9],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "</s>", "bytes": list(b"</s>"), "logprob": -0.1},
            {"token": "\ufffd", "bytes": None, "logprob": -2.0},
        ],
    }


def test_overlap_is_the_longest_end_that_begins_a_stop():
    assert [overlap(text, "##a") for text in ("x", "x#", "x##", "##a", "###", "")] == [0, 1, 2, 3, 2, 0]
