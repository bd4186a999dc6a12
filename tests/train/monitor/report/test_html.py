"""What is no markup is escaped, wherever it stands."""

from llava_lite.train.monitor.report.html import Html, details, facts, image, join, section, table, tag, text

BAD = "</p><script>alert('1 & \"2\"')</script>"
ESCAPED = "&lt;/p&gt;&lt;script&gt;alert(&#x27;1 &amp; &quot;2&quot;&#x27;)&lt;/script&gt;"


def test_text_is_escaped_and_markup_is_not():
    assert text(BAD) == ESCAPED
    assert text(Html("<b>x</b>")) == "<b>x</b>"
    assert text(3) == "3"
    assert join("a < b", None, tag("b", "&"), by=" > ") == "a &lt; b &gt; <b>&amp;</b>"


def test_markup_stays_markup_only_where_it_was_not_mixed_with_text():
    assert text(Html("<b>") + BAD) == text("<b>" + BAD)


def test_attributes_are_escaped_and_named_as_in_html():
    assert tag("p", BAD, class_='x" onclick="y', aria_label=BAD) == (
        f'<p class="x&quot; onclick=&quot;y" aria-label="{ESCAPED}">{ESCAPED}</p>'
    )
    assert tag("i", hidden=True, title=None, id=False) == "<i hidden></i>"


def test_every_element_escapes_what_it_holds():
    made = [table((BAD, BAD), [(BAD, BAD)], (1,), BAD), facts([(BAD, BAD)]), details(BAD, BAD), section(BAD, BAD)]
    for one in [*made, image("data:,x", BAD)]:
        assert "<script" not in one
        assert ESCAPED in one


def test_what_is_not_known_is_left_out():
    assert table(("a",), []) == ""
    assert facts([("a", None), ("b", ""), ("c", 0)]).count("<dt>") == 1
