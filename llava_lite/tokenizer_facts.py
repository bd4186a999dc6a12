"""Remember what was found out about a tokenizer for as long as it lives."""

from collections.abc import Callable, Hashable
from threading import RLock
from weakref import WeakKeyDictionary

_KNOWN: WeakKeyDictionary = WeakKeyDictionary()
_LOCK = RLock()
# Facts kept of a tokenizer; those of yesterday's dates are of no use.
_MOST_KNOWN = 64


def remembered(tokenizer, key: Hashable, find: Callable):
    """Return what `find` returns, called once for a key as long as the tokenizer has the same tokens.

    One thread finds at a time.
    """
    key = (key, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token)
    with _LOCK:
        known = _KNOWN.setdefault(tokenizer, {})
        if key not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[key] = find()
        return known[key]
