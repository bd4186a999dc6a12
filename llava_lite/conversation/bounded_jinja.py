"""Run the Jinja templates of strangers within bounds of time and memory: a sandbox that counts.

jinja2's own sandbox keeps a template away from the rest of the program; of loops it bounds `range` alone. Here each
iteration, each call, and each operator or filter that can make a value larger is charged to an account of the thread
that renders, and refused before a value is made that would be too large.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import wraps

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters of one text, and items of a list with all that it holds: four times a context of a million tokens.
LARGEST_VALUE = 2**24
# What one rendering may make in all, in characters and items; a thousand long messages need a tenth.
LARGEST_SUM = 2**28
# What an iteration, a call or an operator costs besides what it makes: at most four million of them, a few seconds.
STEP = 64
STEPS_A_LOOK = 64
# Of this thread's CPU time, for what is slow and makes nothing, such as comparisons of long texts.
MOST_SECONDS = 3.0
# The longest public templates have 30,000 characters.
LONGEST_TEMPLATE = 2**17
# Widths, counts and precisions that are given to filters and to methods of texts and numbers.
LARGEST_NUMBER = 10**6
MOST_BITS = 4096

# Methods of texts and numbers whose results are no longer than their text.
_NO_LONGER = frozenset(
    """
    capitalize casefold count endswith find index lower lstrip partition removeprefix removesuffix rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper bit_length
    is_integer isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace
    istitle isupper
    """.split()  # noqa: SIM905
)
# Filters that write no text of what they are given; all others may repeat it.
_NO_TEXT = frozenset(
    """
    abs attr batch count d default first float int items last length list map random reject rejectattr reverse
    round select selectattr slice sum
    """.split()  # noqa: SIM905
)
# For web pages; minutes for a text of the largest size.
_SLOW = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
_SIZED = (str, bytes, list, tuple, dict)


class Unbounded(RuntimeError):
    """A template does more than it may; the message is what, and the bound."""


class _Account:
    """What a rendering may still make, and the CPU time of its thread at which it ends."""

    __slots__ = ("left", "looks_at", "until_s")

    def __init__(self):
        self.left = LARGEST_SUM
        self.until_s = time.thread_time() + MOST_SECONDS
        self.look_at_clock()

    def charge(self, num_made: int = 0) -> None:
        """Charge a step that makes so many characters or items; raises Unbounded where the account is empty."""
        self.left -= num_made + STEP
        if self.left < self.looks_at:
            self.look_at_clock()

    def look_at_clock(self) -> None:
        """Raise Unbounded for a rendering that has made too much or takes too long."""
        if self.left < 0:
            raise Unbounded(f"it has no end, or makes more than {LARGEST_SUM:,} characters")
        if time.thread_time() > self.until_s:
            raise Unbounded(f"it computes for more than {MOST_SECONDS:g} seconds")
        # The clock costs more than a step.
        self.looks_at = max(0, self.left - STEPS_A_LOOK * STEP)


_thread = threading.local()


@contextmanager
def bounded():
    """Open an account for what is compiled or rendered within the block, by this thread; yield it."""
    before, _thread.account = getattr(_thread, "account", None), _Account()
    try:
        yield _thread.account
    finally:
        _thread.account = before


def check_size(num_made: float) -> None:
    """Raise Unbounded for a value of so many characters or items."""
    if num_made > LARGEST_VALUE:
        raise Unbounded(f"it makes a value of more than {LARGEST_VALUE:,} characters")


def weigh(value) -> int:
    """Return the characters and items of a value with all that it holds; raises Unbounded for too many.

    A list that holds another twice counts it twice, as its text would.
    """
    if isinstance(value, str):
        return len(value)
    weight, to_weigh = 0, [value]
    while to_weigh:
        one = to_weigh.pop()
        weight += 1
        if isinstance(one, (str, bytes)):
            weight += len(one)
        elif isinstance(one, Mapping):
            to_weigh += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            to_weigh += one
        check_size(weight + len(to_weigh))
    return weight


def check_product(arguments: Iterable) -> None:
    """Raise Unbounded if a text may become too long that repeats one argument as often as the others say."""
    product = 1
    for one in arguments:
        if isinstance(one, int):
            check_number(one)
            one_size = abs(one)
        elif isinstance(one, str) and ("%" in one or "{" in one):
            # A width in a format.
            one_size = max(len(one), largest_number(one))
        else:
            one_size = weigh(one) if isinstance(one, (str, bytes, Mapping, list, tuple)) else 1
        product *= max(1, one_size)
    check_size(product)


def check_number(number: int) -> None:
    """Raise Unbounded for a width, count or precision that no prompt needs."""
    if abs(number) > LARGEST_NUMBER:
        raise Unbounded(f"it asks for a width or a number of {number:,}, more than {LARGEST_NUMBER:,}")


def largest_number(text: str) -> int:
    """Return the largest decimal number in a text, as a width in a format; a long one counts as too large."""
    digits = "".join(letter if letter in "0123456789" else " " for letter in text).split()
    return max((int(number[:12]) for number in digits), default=0)


def check_replaced(text: str, old: str, new: str) -> None:
    """Raise Unbounded if the text would become too long."""
    check_size(len(text) + text.count(old) * max(0, len(new) - len(old)))


def check_joined(items: list, separator: str) -> None:
    """Raise Unbounded if the text of all items would become too long."""
    check_size(weigh(items) + len(items) * len(separator))


def counted(items: Iterable) -> list:
    """Return the items as a list, each charged."""
    if isinstance(items, list):
        return items
    kept = []
    for item in items:
        _thread.account.charge()
        kept.append(item)
    return kept


def bounded_filter(name: str, function):
    """Return a filter that is charged for what it makes."""

    # Of some the first argument is jinja's own; it weighs nothing.
    @wraps(function)
    def run(*arguments, **options):
        given = [*arguments, *options.values()]
        if name == "replace" and len(given) > 3 and all(isinstance(one, str) for one in given[1:4]):
            check_replaced(*given[1:4])
        elif name == "join" and len(arguments) > 1:
            arguments = (arguments[0], counted(arguments[1]), *arguments[2:])
            check_joined(arguments[1], next((one for one in given[2:] if isinstance(one, str)), ""))
        elif name not in _NO_TEXT:
            check_product(given)
        else:
            for number in (one for one in given if isinstance(one, int)):
                check_number(number)
        return made(function(*arguments, **options))

    return run


def made(value):
    """Return a value that a step made, charged; of a list its own items alone."""
    _thread.account.charge(len(value) if isinstance(value, _SIZED) else 0)
    return value


class _CountingCode(CodeGenerator):
    """Writes the Python code of a template with calls of the methods of BoundedEnvironment below."""

    def visit_For(self, node, frame):
        step = nodes.ExprStmt(nodes.EnvironmentAttribute("step()"))
        node.body = [step.set_lineno(node.lineno), *node.body]
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("step()"), node.test).set_lineno(node.lineno)
        super().visit_For(node, frame)

    def visit_List(self, node, frame):
        self._within("weighed", super().visit_List, node, frame)

    def visit_Dict(self, node, frame):
        self._within("weighed", super().visit_Dict, node, frame)

    def visit_Tuple(self, node, frame):
        if node.ctx == "load":
            self._within("weighed", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node, frame):
        self.write("environment.joined((")
        for piece in node.nodes:
            self.visit(piece, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node, frame):
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(nodes.Const(None) if bound is None else bound, frame)
            self.write(", ")
        self.write("))")

    def _within(self, method, visit, node, frame):
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, whose templates are compiled and rendered inside `bounded`."""

    code_generator_class = _CountingCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options):
        # Constants are computed with all else, when a template is rendered.
        super().__init__(optimized=False, finalize=finalize, **options)
        # Writes as much text as it is asked for.
        del self.globals["lipsum"]
        filters = {name: function for name, function in self.filters.items() if name not in _SLOW}
        self.filters = {name: bounded_filter(name, function) for name, function in filters.items()}

    def step(self) -> bool:
        """Charge one iteration."""
        _thread.account.charge()
        return True

    def weighed(self, value):
        """Return a list, tuple or dict of the template's text; it may hold another one many times."""
        _thread.account.charge(weigh(value))
        return value

    def joined(self, pieces) -> str:
        """Return the texts of values as one."""
        check_size(sum([len(piece) if type(piece) is str else weigh(piece) for piece in pieces]))
        return made("".join(map(str, pieces)))

    # Of the blocks of a template.
    def concat(self, pieces) -> str:
        """Return texts as one."""
        pieces = list(pieces)
        check_size(sum(map(len, pieces)))
        return made("".join(pieces))

    def sliced(self, value, places: slice):
        """Return a part of a text or list."""
        return made(value[places])

    def call_binop(self, context, operator, left, right):
        """Return the result of an operator that can make a value larger."""
        if operator == "+" and type(left) is type(right) is str:
            check_size(len(left) + len(right))
            return made(left + right)
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            check_bits(operator, left, right)
        elif operator == "+":
            check_size(sum(len(side) for side in (left, right) if isinstance(side, (str, list, tuple))))
        else:
            check_product((left, *right) if isinstance(right, tuple) else (left, right))
        return made(super().call_binop(context, operator, left, right))

    def call(__self, __context, __callable, *arguments, **options):
        """Call what a template calls: a macro, a function, a method of a value."""
        method = getattr(__callable, "__wrapped__", __callable)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", None)
        if isinstance(owner, (str, bytes, int, float)) and name not in _NO_LONGER:
            given = [owner, *arguments, *options.values()]
            if name == "replace" and len(given) > 2 and all(isinstance(one, str) for one in given[:3]):
                check_replaced(*given[:3])
            elif name == "join" and arguments:
                arguments = (counted(arguments[0]), *arguments[1:])
                check_joined(arguments[0], owner)
            else:
                check_product(given)
        return made(super().call(__context, __callable, *arguments, **options))


def check_bits(operator: str, left, right) -> None:
    """Raise Unbounded for a product or power of whole numbers that has too many digits."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
    if bits > MOST_BITS:
        raise Unbounded(f"it computes a number of more than {MOST_BITS:,} bits")


def finalize(value):
    """Return a value that a template writes; weighed, since a list may hold another one many times."""
    if isinstance(value, (Mapping, list, tuple, set)):
        weigh(value)
    return value
