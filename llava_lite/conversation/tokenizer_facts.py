"""Cache facts about a tokenizer for as long as it exists."""

from collections.abc import Callable, Hashable
from threading import RLock
from weakref import WeakKeyDictionary

_KNOWN: WeakKeyDictionary = WeakKeyDictionary()
_LOCK = RLock()
# Facts kept for a tokenizer; templates with a date add new ones every day.
_MOST_KNOWN = 64


def remembered(tokenizer, key: Hashable, find: Callable):
    """Return the result of `find`, which is called once for a key while the tokenizer has the same tokens.

    Only one thread calls `find` at a time.
    """
    key = (key, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token)
    with _LOCK:
        known = _KNOWN.setdefault(tokenizer, {})
        if key not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[key] = find()
        return known[key]
