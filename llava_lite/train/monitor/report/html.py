"""Turn text and tables into HTML; whatever is not markup already is escaped."""

from html import escape

# A browser runs and fetches nothing, even if a text came through unescaped.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup, written as it is; any other text is escaped."""

    __slots__ = ()


def text(value) -> Html:
    """Return a value as markup: escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(*parts, by: str = "") -> Html:
    """Return the markup of the parts one after the other; None is left out."""
    return Html(text(by).join(text(part) for part in parts if part is not None))


def tag(name: str, *children, **attributes) -> Html:
    """Return an element: `tag("p", "a < b", class_="note")`; an attribute that is None or False is left out."""
    words = [name]
    for key, value in attributes.items():
        if value not in (None, False):
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{escape(str(value))}"')
    return Html(f"<{' '.join(words)}>{join(*children)}</{name}>")


def image(url: str, words: str) -> Html:
    """Return an image of a data URL."""
    return Html(f'<img src="{escape(url)}" alt="{escape(words)}" loading="lazy">')


def table(header, rows, numbers=(), caption=None) -> Html:
    """Return a table that scrolls by itself where it is too wide; numbers: columns of figures. "" without rows."""
    rows = list(rows)
    if not rows:
        return Html("")
    kinds = ["number" if i in numbers else None for i in range(len(header))]
    head = tag("tr", *(tag("th", cell, scope="col", class_=kind) for cell, kind in zip(header, kinds, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kinds[0]),
            *(tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    named = tag("caption", caption) if caption else None
    return tag("div", tag("table", named, tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def facts(pairs) -> Html:
    """Return (name, value) pairs as a list of terms; those with a value of None or "" are left out."""
    known = [(name, value) for name, value in pairs if value not in (None, "")]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in known), class_="terms")


def details(summary: str, *children) -> Html:
    """Return what is shown when its line is opened."""
    return tag("details", tag("summary", summary), *children)


def section(title: str, *children) -> Html:
    """Return a section with its heading."""
    name = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=name), *children, aria_labelledby=name)


def fault(sentence: str) -> Html:
    """Return a sentence on what is missing or damaged."""
    return tag("p", sentence, class_="note fault")


def faults(run, *names: str) -> list[Html]:
    """Return a sentence for each of some files of a run that is missing, damaged, or cannot be read."""
    return [fault(sentence) for name in names if (sentence := run.files.sentence(name))]


def document(title: str, body, css: str) -> str:
    """Return a page that holds all it needs; body: the markup of its content."""
    meta = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        tag("style", Html(css)),
    ]
    return join(Html("<!doctype html>\n"), tag("html", tag("head", *meta), tag("body", body), lang="en"), "\n")
