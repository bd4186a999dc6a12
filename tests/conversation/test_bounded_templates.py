"""Chat templates of strangers: what has no end or fills the memory is refused with the file; all else is as before."""

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import toy_chat_templates
from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.conversation import conv_templates
from llava_lite.conversation.chat_template import takes_parts
from llava_lite.conversation.messages import read_conversations
from llava_lite.conversation.prompts import write_jinja_prompt
from llava_lite.conversation.rendering import UnboundedTemplate, render

MESSAGES = [{"role": ("user", "assistant")[i % 2], "content": f" text {i} "} for i in range(5)]
CASES = [
    case
    for table in vars(toy_chat_templates).values()
    if isinstance(table, dict)
    for case in table.values()
    if isinstance(case, toy_chat_templates.Case)
]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LARGE = "{% set a = 'a' * 100000 %}"
REFUSED = {
    "nested loops": ENDLESS,
    "loops that skip everything": ENDLESS.replace("for b in range(99999)", "for b in range(99999) if false"),
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "a text that is repeated": "{{ 'a' * 10 ** 10 }}",
    "a list that is repeated": "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c }}",
    "a power": "{{ 2 ** (10 ** 9) }}",
    "a filter with a width": "{{ 'a'|center(10 ** 10) }}",
    "a method with a width": "{{ 'a'.ljust(10 ** 10) }}",
    "bytes": "{{ (5).to_bytes(10 ** 10) }}",
    "a format with a width": "{{ '%1000000000d' % 1 }}",
    "a format with a given width": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "an indent": "{{ (['a'] * 1000000)|join('\\n')|indent(1000000) }}",
    "a text that doubles": (
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "a sum that doubles": (
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "a list of itself": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}"
    ),
    "a replacement": LARGE + "{{ a.replace('a', a) }}",
    "a replacing filter": LARGE + "{{ a|replace('a', a) }}",
    "a join": LARGE + "{{ a.join(range(90000)|map('string')) }}",
    "a joining filter": LARGE + "{{ range(90000)|join(a) }}",
    "a block": LARGE + "{% set x %}{% for i in range(90000) %}{{ a }}{% endfor %}{% endset %}",
    "an output": LARGE + "{% for i in range(90000) %}{{ a }}{% endfor %}",
    "slices": (
        LARGE + "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = ns.l + [a[i:]] %}{% endfor %}"
    ),
    "a map": "{{ ('a' * 1000000)|map('center', 1000)|list }}",
    "slow comparisons": (
        "{% set s = 'a' * 1000000 %}{% set t, u = s + 'b', s + 'c' %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% if t == u %}{% endif %}{% endfor %}{% endfor %}"
    ),
    "a template of a megabyte": "{# " + "a" * 10**6 + " #}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_without_an_end_is_refused_with_the_reason(name):
    with pytest.raises(UnboundedTemplate, match=r"the chat template of the tokenizer is not used: it .*\. Take the"):
        render(REFUSED[name], MESSAGES)


def test_what_is_refused_took_no_memory():
    for name in ("a text that is repeated", "an output", "a list of itself", "a join", "slices"):
        with pytest.raises(UnboundedTemplate):
            render(REFUSED[name], MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20, "KiB"


@pytest.mark.parametrize("template", ["{{ lipsum(n=10 ** 9) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_other_ways_end_in_an_error_of_the_template(template):
    with pytest.raises(Exception, match=r"lipsum|recursion"):
        render(template, MESSAGES)


def test_every_way_to_a_prompt_names_the_file_of_the_template(toy_tokenizer, tmp_path):
    toy_tokenizer.chat_template = ENDLESS
    toy_tokenizer.save_pretrained(tmp_path)
    toy_tokenizer.name_or_path = str(tmp_path)
    [conversation], _ = read_conversations(MESSAGES)
    turns = [(("human", "gpt")[i % 2], message["content"]) for i, message in enumerate(MESSAGES[:4])]
    ways = (
        lambda: write_jinja_prompt(ENDLESS, conversation, toy_tokenizer, in_parts=False),
        lambda: conv_templates["chat"].with_turns(turns).render(toy_tokenizer),
        lambda: takes_parts(ENDLESS),
    )
    for way, source in zip(ways, (f"of '{tmp_path}/chat_template.jinja'",) * 2 + ("of the tokenizer",), strict=True):
        with pytest.raises(UnboundedTemplate, match=f"chat template {source} is not used: it has no end"):
            way()


@pytest.mark.parametrize("case", CASES)
def test_all_else_is_rendered_as_by_transformers(case):
    for is_open in (False, True):
        options = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": is_open}
        try:
            (expected,), _ = render_jinja_template([MESSAGES], chat_template=case.template, **options)
        except Exception as error:
            with pytest.raises(type(error)):
                render(case.template, MESSAGES, **options)
        else:
            assert render(case.template, MESSAGES, **options)[0] == expected


def test_blocks_loops_slices_and_filters_are_those_of_transformers():
    template = (
        "{% set ns = namespace(seen=[]) %}{% for m in messages[1:][::-1] if m.role == 'user' %}"
        "{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ m|tojson(indent=2) }}"
        "{% set ns.seen = ns.seen + [m.content] %}"
        "{% if loop.index == 9 %}{% break %}{% endif %}{% endfor %}{{ ns.seen|join(', ')|upper }}"
        "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{{ '%s-%s' % (1, 2) }}"
        "{{ m.content.split(' ')[-2][:3] ~ 1 ~ none }}{% endfor %}{% set x %}in {{ ns.seen }}{% endset %}{{ x[2:] }}"
        "{% macro f(a, b=2) %}{{ a * b }}{{ caller() }}{% endmacro %}{% call f('ab') %}!{% endcall %}"
        "{{ tools }}{{ documents is none }}{{ dict(a=1, **{'b': [1, (2, 3)]}) }}{{ 'x'.center(9) }}{{ undefined }}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}{{ range(5)|batch(2)|list }}"
    )
    options = {"tools": [{"name": "f"}], "return_assistant_tokens_mask": True}
    (expected,), [spans] = render_jinja_template([MESSAGES], chat_template=template, **options)
    text, found = render(template, MESSAGES, marks_answers=True, tools=options["tools"])
    assert text == expected
    assert found == spans
    assert [text[start:end] for start, end in found] == [f"text {i}" for i in range(5)]


def test_threads_have_accounts_and_blocks_of_their_own():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}, {% endfor %}"

    def one(number):
        if number % 4 == 0:
            with pytest.raises(UnboundedTemplate):
                render("{{ 'a' * 10 ** 10 }}", MESSAGES)
        text, spans = render(template, [{"role": "user", "content": "x" * number}] * 50, marks_answers=True)
        return {text[start:end] for start, end in spans} == {"x" * number} and len(spans) == 50

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(1, 200)))


def test_a_long_conversation_has_room():
    # A million tokens, each message in pieces as templates write them.
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 800} for i in range(1000)]
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% set c = m.content | trim %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ c.replace('<image>', '') + '<|end|>\\n' }}{{ loop.index0 == (messages | length - 1) }}{% endfor %}"
    )
    (expected,), _ = render_jinja_template([messages], chat_template=template)
    assert render(template, messages)[0] == expected
