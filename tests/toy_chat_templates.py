"""Chat templates of every structure that public ones have, each with a hand-written truth: what of it is supervised.

A case lists, for questions Q and answers A, what is supervised of an answer that another question follows (`inner`),
of the last one (`last`), and what stands before the answer to a single question "Q1" (`prompt`). A case with a
`refused` is the reason why its answers cannot be located.
"""

from typing import NamedTuple

from tokenizers import AddedToken


class Case(NamedTuple):
    """A chat template and its truth. tokens: its special tokens; eos, bos: which of them the tokenizer names so."""

    template: str
    tokens: tuple[str, ...] = ()
    inner: str = ""
    last: str = ""
    prompt: str = ""
    refused: str = ""  # a part of the reason why no plain answer can be located
    no_system: str = ""  # a part of the reason why a system text is refused
    system: str = ""  # how the system text "S1" begins the conversation, where it is kept
    one_turn: str = ""  # a part of the reason why there can be one question alone
    strips: bool = False
    eos: str = "</s>"
    bos: str | None = None
    reasoning: str = ""  # what is supervised of REASONING in the last turn, where it can be located


def with_template(tokenizer, case):
    """Return a toy tokenizer with the chat template and the special tokens of a case."""
    tokenizer.add_special_tokens({"eos_token": case.eos} | ({"bos_token": case.bos} if case.bos else {}))
    # As in Qwen3, what opens and closes reasoning is no special token.
    tokenizer.add_tokens([AddedToken(t, special="think" not in t, normalized=False) for t in case.tokens])
    tokenizer.chat_template = case.template
    return tokenizer


REASONING = "<think>\nHm.\n</think>\n\nA1"
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML_LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = {
    "inner": "A<|im_end|>",
    "last": "A<|im_end|>",
    "prompt": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "system": "<|im_start|>system\nS1<|im_end|>\n<|im_start|>user\n",
}
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
LLAMA3_LOOP = """\
{%- for m in messages -%}
{%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' -%}
{{- (bos_token if loop.first else '') + text -}}
{%- endfor -%}
"""
LLAMA3 = {
    "tokens": LLAMA3_TOKENS,
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "inner": "A<|eot_id|>",
    "last": "A<|eot_id|>",
    "strips": True,
}
LLAMA3_ASKED = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA3_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS1<|eot_id|>"
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set said = m['content'] -%}
{%- set thought = '' -%}
{%- if m['role'] == 'assistant' and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- if m['role'] == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\n' + thought + '\n</think>\n\n' -}}
{%- endif -%}
{{- said + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\nTHINKS' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- 'EMPTY</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
PHI3 = ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
COHERE = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
COHERE += ("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
COHERE_LOOP = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} -%}
{{- '<|START_OF_TURN_TOKEN|><|' + names[m['role']] + '_TOKEN|>' -}}
{%- if m['role'] == 'assistant' -%}
{{- 'OPEN' + m['content'] | trim + 'CLOSE<|END_OF_TURN_TOKEN|>' -}}
{%- else -%}
{{- m['content'] | trim + '<|END_OF_TURN_TOKEN|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>OPEN' -}}{%- endif -%}
"""
DEEPSEEK = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>")
DEEPSEEK_NAMES = {"tokens": DEEPSEEK, "bos": DEEPSEEK[0], "eos": DEEPSEEK[1]}
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
_PARTS_OR_TEXT = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- if m['content'] is string -%}{{- m['content'] -}}
{%- else -%}
{%- for part in m['content'] -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
"""
BLOCK = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- if m['role'] == 'assistant' -%}
{% generation %}{{- m['content'] + BLOCK_END -}}{% endgeneration %}
{%- else -%}
{{- m['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{{- m['role'] == 'assistant' and AFTER or '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

CASES = {
    "llama2": Case(
        """\
{%- for m in messages -%}
{%- if loop.first and m['role'] == 'system' -%}{%- continue -%}{%- endif -%}
{%- set is_first = loop.index0 == (messages[0]['role'] == 'system') | int -%}
{%- set told = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if is_first and not loop.first else '' -%}
{%- if m['role'] == 'user' -%}{{- bos_token + '[INST] ' + (told + m['content']).strip() + ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'].strip() + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}""",
        ("<s>", "</s>"),
        inner=" A </s>",
        last=" A </s>",
        prompt="<s>[INST] Q1 [/INST]",
        system="<s>[INST] <<SYS>>\nS1\n<</SYS>>\n\n",
        strips=True,
        bos="<s>",
        reasoning=f" {REASONING} </s>",
    ),
    "llama3": Case(
        LLAMA3_LOOP
        + "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}",
        **LLAMA3,
        prompt=LLAMA3_ASKED,
        system=LLAMA3_SYSTEM,
        reasoning=f"{REASONING}<|eot_id|>",
    ),
    "llama3, the header always open": Case(
        LLAMA3_LOOP + "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}",
        **LLAMA3,
        prompt=LLAMA3_ASKED,
        system=LLAMA3_SYSTEM,
    ),
    "llama3.1, a system turn with today's date": Case(
        """\
{%- set told = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set told = messages[0]['content'] | trim -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' -}}
{{- told + '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}""",
        **LLAMA3,
        prompt="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: DATE\n\n<|eot_id|>"
        + LLAMA3_ASKED.removeprefix("<|begin_of_text|>"),
        system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: DATE\n\nS1<|eot_id|>",
    ),
    "mistral, first": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
{{- '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + eos_token + ' ' -}}
{%- endfor -%}""",
        ("<s>", "</s>"),
        inner="A</s>",
        last="A</s>",
        prompt="<s>[INST] Q1 [/INST]",
        no_system="roles must alternate",
        bos="<s>",
    ),
    "mistral, system in the first question": Case(
        """\
{{- bos_token -}}
{%- set told = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for m in messages if m['role'] != 'system' -%}
{{- ' [INST] ' + (told if loop.first else '') + m['content'] + ' [/INST]' if m['role'] == 'user'
    else ' ' + m['content'] + eos_token -}}
{%- endfor -%}""",
        ("<s>", "</s>"),
        inner=" A</s>",
        last=" A</s>",
        prompt="<s> [INST] Q1 [/INST]",
        system="<s> [INST] S1\n\n",
        bos="<s>",
    ),
    "mistral v3, system in the last message if that is a question": Case(
        """\
{{- bos_token -}}
{%- set told = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for m in messages if m['role'] != 'system' -%}
{%- if m['role'] == 'user' -%}{{- '[INST] ' + (told if loop.last else '') + m['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}""",
        MISTRAL_TOKENS,
        inner=" A</s>",
        last=" A</s>",
        prompt="<s>[INST] Q1[/INST]",
        no_system="leaves out a system text in a conversation that ends with an answer",
        bos="<s>",
    ),
    "tekken": Case(
        """\
{{- bos_token -}}
{%- for m in messages if m['role'] != 'system' -%}
{{- '[INST]' + m['content'] + '[/INST]' if m['role'] == 'user' else m['content'] + eos_token -}}
{%- endfor -%}""",
        MISTRAL_TOKENS,
        inner="A</s>",
        last="A</s>",
        prompt="<s>[INST]Q1[/INST]",
        no_system="leaves out a system text",
        bos="<s>",
    ),
    "mistral v7": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- '[SYSTEM_PROMPT] ' + m['content'] + '[/SYSTEM_PROMPT]' -}}
{%- elif m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}""",
        MISTRAL_TOKENS,
        inner=" A</s>",
        last=" A</s>",
        prompt="<s>[INST] Q1[/INST]",
        system="<s>[SYSTEM_PROMPT] S1[/SYSTEM_PROMPT]",
        bos="<s>",
    ),
    "chatml": Case(CHATML_LOOP + CHATML_PROMPT, IM, **CHATML, reasoning=f"{REASONING}<|im_end|>"),
    "chatml, eos is another token": Case(CHATML_LOOP + CHATML_PROMPT, IM, **CHATML, eos="<|endoftext|>"),
    "chatml, the header always open": Case(CHATML_LOOP + "{{ '<|im_start|>assistant\n' }}", IM, **CHATML),
    "chatml, eos after the last answer": Case(
        CHATML_LOOP
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        IM,
        **CHATML,
    ),
    "chatml without a prompt of its own": Case(CHATML_LOOP, IM, **CHATML),
    "chatml, a default system text": Case(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
        + CHATML_LOOP
        + CHATML_PROMPT,
        IM,
        **{**CHATML, "prompt": f"<|im_start|>system\nBe good.<|im_end|>\n{CHATML['prompt']}"},
        eos="<|endoftext|>",
    ),
    "smollm2: a default system text, bos opens every turn and eos ends it": Case(
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}" + CHATML_PROMPT,
        IM,
        **{**CHATML, "prompt": f"<|im_start|>system\nBe good<|im_end|>\n{CHATML['prompt']}"},
        eos="<|im_end|>",
        bos="<|im_start|>",
    ),
    "chatml, a default system text and the header always open": Case(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
        + CHATML_LOOP
        + "{{ '<|im_start|>assistant\n' }}",
        IM,
        **{**CHATML, "prompt": f"<|im_start|>system\nBe good.<|im_end|>\n{CHATML['prompt']}"},
        eos="<|endoftext|>",
    ),
    "qwen1.5, first: the last answer is left open": Case(
        """\
{%- for m in messages -%}
{%- if loop.first and m['role'] != 'system' -%}{{- '<|im_start|>system\nBe good<|im_end|>\n' -}}{%- endif -%}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] -}}
{%- if (loop.last and add_generation_prompt) or not loop.last -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}""",
        IM,
        **{**CHATML, "prompt": f"<|im_start|>system\nBe good<|im_end|>\n{CHATML['prompt']}"},
    ),
    "qwen2-vl: texts and parts, an image in its own tokens": Case(
        _PARTS_OR_TEXT + CHATML_PROMPT,
        (*IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
        **CHATML,
    ),
    "qwen3: an empty block of reasoning before the last answer": Case(
        QWEN3.replace("THINKS", "").replace("EMPTY", "<think>\n\n"),
        (*IM, "<think>", "</think>"),
        inner="A<|im_end|>",
        last="A<|im_end|>",
        prompt=CHATML["prompt"] + "<think>\n\n</think>\n\n",
        system=CHATML["system"],
        reasoning=f"{REASONING}<|im_end|>",
    ),
    "qwen3.5: the prompt opens the reasoning": Case(
        QWEN3.replace("THINKS", "<think>\n").replace("EMPTY", "\n"),
        (*IM, "<think>", "</think>"),
        inner="A<|im_end|>",
        last="A<|im_end|>",
        prompt=CHATML["prompt"] + "<think>\n\n</think>\n\n",
        system=CHATML["system"],
        reasoning=REASONING.removeprefix("<think>\n") + "<|im_end|>",
    ),
    "an empty block of reasoning that the prompt lacks": Case(
        """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{{- '<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '' -}}
{{- m['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
"""
        + CHATML_PROMPT,
        (*IM, "<think>", "</think>"),
        **{**CHATML, "prompt": CHATML["prompt"] + "<think>\n\n</think>\n\n"},
    ),
    "hunyuan: an empty block of reasoning in the prompt alone": Case(
        CHATML_LOOP
        + """\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n' -}}{%- endif -%}
{%- endif -%}""",
        (*IM, "<think>", "</think>"),
        **{**CHATML, "prompt": CHATML["prompt"] + "<think>\n\n</think>\n"},
        reasoning=f"{REASONING}<|im_end|>",
    ),
    "qwq: the prompt opens reasoning that answers lack": Case(
        CHATML_LOOP + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        (*IM, "<think>", "</think>"),
        refused="ends its generation prompt with '<think>\\n', and answer 1 does not start with it",
        reasoning=REASONING.removeprefix("<think>\n") + "<|im_end|>",
    ),
    "phi3, first: no system text, the header with the question": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' -}}
{%- elif m['role'] == 'assistant' -%}{{- m['content'] + '<|end|>\n' -}}{%- endif -%}
{%- endfor -%}""",
        PHI3,
        inner="A<|end|>",
        last="A<|end|>",
        prompt="<s><|user|>\nQ1<|end|>\n<|assistant|>\n",
        no_system="leaves out a system text",
        eos="<|endoftext|>",
        bos="<s>",
    ),
    "phi3.5: eos after the last answer": Case(
        """\
{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' -}}{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}""",
        PHI3,
        inner="A<|end|>",
        last="A<|end|>",
        prompt="<|user|>\nQ1<|end|>\n<|assistant|>\n",
        system="<|system|>\nS1<|end|>\n",
        eos="<|endoftext|>",
    ),
    "phi4-mini: eos right after the last end token": Case(
        """\
{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else eos_token -}}""",
        PHI3,
        inner="A<|end|>",
        last="A<|end|>",
        prompt="<|user|>Q1<|end|><|assistant|>",
        system="<|system|>S1<|end|>",
        eos="<|endoftext|>",
    ),
    "phi4: the header with the question": Case(
        """\
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}{{- m['content'] + '<|im_end|>' -}}
{%- else -%}{{- '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' -}}{%- endif -%}
{%- if m['role'] == 'user' -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
{%- endfor -%}""",
        (*IM, "<|im_sep|>"),
        inner="A<|im_end|>",
        last="A<|im_end|>",
        prompt="<|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>",
        system="<|im_start|>system<|im_sep|>S1<|im_end|>",
    ),
    "gemma: no system turn": Case(
        """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' -}}
{{- m['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}""",
        GEMMA,
        inner="A<end_of_turn>",
        last="A<end_of_turn>",
        prompt="<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n",
        no_system="System role not supported",
        strips=True,
        eos="<eos>",
        bos="<bos>",
    ),
    "gemma3: parts trimmed one by one, system before the first question": Case(
        """\
{{- bos_token -}}
{%- set told = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] -%}
{%- set told = (first if first is string else first[0]['text']) + '\n\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' -}}
{{- told if loop.first else '' -}}
{%- if m['content'] is string -%}{{- m['content'] | trim -}}
{%- else -%}
{%- for part in m['content'] -%}
{{- '<start_of_image>' if part['type'] == 'image' else part['text'] | trim -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}""",
        GEMMA,
        inner="A<end_of_turn>",
        last="A<end_of_turn>",
        prompt="<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n",
        system="<bos><start_of_turn>user\nS1\n\n",
        strips=True,
        eos="<eos>",
        bos="<bos>",
    ),
    "gemma4: a closed channel in the prompt, a word in the system turn where thinking is on": Case(
        """\
{{- bos_token -}}
{%- if enable_thinking or messages[0]['role'] == 'system' -%}
{{- '<|turn>system\n' + ('<|think|>' if enable_thinking else '') -}}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] | trim -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<turn|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<turn|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\n' + ('' if enable_thinking else '<|channel>thought\n<channel|>') -}}
{%- endif -%}""",
        ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        inner="A<turn|>",
        last="A<turn|>",
        prompt="<bos><|turn>user\nQ1<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        system="<bos><|turn>system\nS1<turn|>\n",
        strips=True,
        eos="<eos>",
        bos="<bos>",
    ),
    "zephyr: eos ends every turn": Case(
        """\
{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' -}}{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else '' -}}""",
        ("<s>", "</s>"),
        inner="A</s>",
        last="A</s>",
        prompt="<|user|>\nQ1</s>\n<|assistant|>\n",
        system="<|system|>\nS1</s>\n",
        bos="<s>",
    ),
    "yi: a bare system text": Case(
        """\
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- m['content'] -}}
{%- elif m['role'] == 'user' -%}{{- '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' -}}
{%- else -%}{{- m['content'] + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}""",
        IM,
        **{**CHATML, "system": "S1<|im_start|>user\n"},
        eos="<|endoftext|>",
    ),
    "openchat": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{{- 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end_of_turn|>' -}}
{%- endfor -%}
{{- 'GPT4 Correct Assistant:' if add_generation_prompt else '' -}}""",
        ("<s>", "<|end_of_turn|>"),
        inner=" A<|end_of_turn|>",
        last=" A<|end_of_turn|>",
        prompt="<s>GPT4 Correct User: Q1<|end_of_turn|>GPT4 Correct Assistant:",
        system="<s>GPT4 Correct System: S1<|end_of_turn|>",
        bos="<s>",
    ),
    "vicuna": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- m['content'] + '\n\n' -}}
{%- elif m['role'] == 'user' -%}{{- 'USER: ' + m['content'] | trim + '\n' -}}
{%- else -%}{{- 'ASSISTANT: ' + m['content'] | trim + eos_token + '\n' -}}{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}""",
        ("<s>", "</s>"),
        inner=" A</s>",
        last=" A</s>",
        prompt="<s>USER: Q1\nASSISTANT:",
        system="<s>S1\n\nUSER: ",
        strips=True,
        bos="<s>",
    ),
    "solar: no end token at all": Case(
        """\
{%- for m in messages -%}
{{- '### ' + m['role'].title() + ':\n' + m['content'] + ('\n\n' if m['role'] != 'assistant' else '') -}}
{%- endfor -%}
{{- '### Assistant:\n' if add_generation_prompt else '' -}}""",
        ("<s>", "</s>"),
        refused="has no end token",
        bos="<s>",
    ),
    "minicpm: no end token, roles that are no tokens": Case(
        """\
{%- for m in messages -%}
{{- '<用户>' + m['content'] | trim + '<AI>' if m['role'] == 'user' else m['content'] | trim -}}
{%- endfor -%}""",
        ("<s>", "</s>"),
        refused="has no end token",
        bos="<s>",
    ),
    "glm4: the next role token ends an answer": Case(
        """\
{{- '[gMASK]<sop>' -}}
{%- for m in messages if m['content'] -%}{{- '<|' + m['role'] + '|>\n' + m['content'] -}}{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else '' -}}""",
        GLM,
        refused="starts a turn",
        eos="<|endoftext|>",
    ),
    "glm-edge: an open header after every conversation": Case(
        """\
{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' + m['content'] -}}{%- endfor -%}{{- '<|assistant|>' -}}""",
        GLM,
        refused="has no end token",
        eos="<|endoftext|>",
    ),
    "nemotron-mini: one token begins every turn": Case(
        """\
{{- '<extra_id_0>System\n' + (messages[0]['content'] if messages[0]['role'] == 'system' else '') + '\n\n' -}}
{%- for m in messages if m['role'] != 'system' -%}
{{- '<extra_id_1>' + m['role'].title() + '\n' + m['content'] + '\n' -}}
{%- endfor -%}
{{- '<extra_id_1>Assistant\n' -}}""",
        ("<extra_id_0>", "<extra_id_1>", "</s>"),
        refused="starts a turn",
    ),
    "deepseek v2": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- 'User: ' + m['content'] + '\n\n' -}}
{%- elif m['role'] == 'assistant' -%}{{- 'Assistant: ' + m['content'] + eos_token -}}
{%- else -%}{{- m['content'] + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt else '' -}}""",
        **DEEPSEEK_NAMES,
        inner=f" A{DEEPSEEK[1]}",
        last=f" A{DEEPSEEK[1]}",
        prompt=f"{DEEPSEEK[0]}User: Q1\n\nAssistant:",
        system=f"{DEEPSEEK[0]}S1\n\nUser: ",
    ),
    "deepseek r1, first: reasoning is taken out of every turn": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '<|User|>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{{- '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end_of_sentence|>' -}}
{%- else -%}{{- m['content'] -}}{%- endif -%}
{%- endfor -%}
{{- '<|Assistant|>' if add_generation_prompt else '' -}}""",
        **DEEPSEEK_NAMES,
        inner=f"A{DEEPSEEK[1]}",
        last=f"A{DEEPSEEK[1]}",
        prompt=f"{DEEPSEEK[0]}<|User|>Q1<|Assistant|>",
        system=f"{DEEPSEEK[0]}S1<|User|>",
    ),
    "deepseek v3.1: the end of reasoning before every answer": Case(
        """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '<|User|>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{{- '<|Assistant|></think>' + m['content'] + '<|end_of_sentence|>' -}}
{%- else -%}{{- m['content'] -}}{%- endif -%}
{%- endfor -%}
{{- '<|Assistant|></think>' if add_generation_prompt else '' -}}""",
        **{**DEEPSEEK_NAMES, "tokens": (*DEEPSEEK, "</think>")},
        inner=f"A{DEEPSEEK[1]}",
        last=f"A{DEEPSEEK[1]}",
        prompt=f"{DEEPSEEK[0]}<|User|>Q1<|Assistant|></think>",
        system=f"{DEEPSEEK[0]}S1<|User|>",
    ),
    "cohere": Case(
        COHERE_LOOP.replace("OPEN", "").replace("CLOSE", ""),
        COHERE,
        inner="A<|END_OF_TURN_TOKEN|>",
        last="A<|END_OF_TURN_TOKEN|>",
        prompt="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S1<|END_OF_TURN_TOKEN|>",
        strips=True,
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "command r7b: an end token of two tokens": Case(
        COHERE_LOOP.replace("OPEN", "<|START_RESPONSE|>").replace("CLOSE", "<|END_RESPONSE|>"),
        COHERE,
        inner="A<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        last="A<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        prompt="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        system="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S1<|END_OF_TURN_TOKEN|>",
        strips=True,
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "granite 3.1: a default system text with today's date": Case(
        """\
{%- if messages[0]['role'] == 'system' -%}
{%- set told = messages[0]['content'] -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set told = "Today's Date: " + strftime_now('%B %d, %Y') + '.' -%}{%- endif -%}
{{- '<|start_of_role|>system<|end_of_role|>' + told + '<|end_of_text|>\n' -}}
{%- for m in messages -%}
{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' -}}
{%- endfor -%}
{{- '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt else '' -}}""",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        inner="A<|end_of_text|>",
        last="A<|end_of_text|>",
        prompt="<|start_of_role|>system<|end_of_role|>Today's Date: LONGDATE.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Q1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        system="<|start_of_role|>system<|end_of_role|>S1<|end_of_text|>\n",
        eos="<|end_of_text|>",
    ),
    "idefics3: parts alone": Case(
        """\
{{- '<|im_start|>' -}}
{%- for m in messages -%}
{{- m['role'].title() + (':' if m['content'][0]['type'] == 'image' else ': ') -}}
{%- for part in m['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt else '' -}}""",
        ("<|im_start|>", "<end_of_utterance>"),
        inner=" A<end_of_utterance>",
        last=" A<end_of_utterance>",
        prompt="<|im_start|>User: Q1<end_of_utterance>\nAssistant:",
        system="<|im_start|>System: S1<end_of_utterance>\n",
    ),
    "llava-next of mistral: images first, parts alone": Case(
        """\
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' -}}
{%- elif m['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- for part in m['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
{%- for part in m['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'][0]['text'] + eos_token + ' ' -}}{%- endif -%}
{%- endfor -%}""",
        ("<s>", "</s>"),
        inner=" A</s>",
        last=" A</s>",
        prompt="[INST] Q1 [/INST]",
        system="<<SYS>>\nS1\n<</SYS>>\n\n",
        bos="<s>",
    ),
    "llava-1.5 of transformers: no end token, parts alone": Case(
        """\
{%- for m in messages -%}
{%- if m['role'] != 'system' -%}{{- m['role'].upper() + ': ' -}}{%- endif -%}
{%- for part in m['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
{%- for part in m['content'] if part['type'] == 'text' -%}{{- part['text'] + ' ' -}}{%- endfor -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}""",
        ("<s>", "</s>"),
        refused="has no end token",
        bos="<s>",
    ),
    "gpt-oss: a channel before an answer, another end token after the last": Case(
        """\
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m['content'] + ('<|return|>' if loop.last else '<|end|>') -}}
{%- else -%}{{- '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{{- '<|start|>assistant' if add_generation_prompt else '' -}}""",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        inner="A<|end|>",
        last="A<|return|>",
        prompt="<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>",
        system="<|start|>system<|message|>S1<|end|>",
        eos="<|return|>",
    ),
    "alpaca: eos after the last answer alone": Case(
        """\
{%- for m in messages -%}
{{- '### ' + ('Response' if m['role'] == 'assistant' else 'Instruction') + ':\n' + m['content'] + '\n\n' -}}
{%- endfor -%}
{{- '### Response:\n' if add_generation_prompt else eos_token -}}""",
        ("<s>", "</s>"),
        last="A\n\n</s>",
        prompt="### Instruction:\nQ1\n\n### Response:\n",
        one_turn="another question follows, without an end token",
        system="### Instruction:\nS1\n\n",
        bos="<s>",
    ),
    "one question alone": Case(
        "{% if messages | length > 2 %}{{ raise_exception('one at a time') }}{% endif %}"
        + CHATML_LOOP
        + CHATML_PROMPT,
        IM,
        last="A<|im_end|>",
        prompt=CHATML["prompt"],
        one_turn="one at a time",
        no_system="one at a time",
    ),
    "the turns are counted": Case(
        "{{ messages | length }}" + CHATML_LOOP + CHATML_PROMPT,
        IM,
        refused="so an answer cannot be found by its position",
    ),
    "answers are left out": Case(
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}{{ eos_token }}",
        refused="leaves out an answer",
    ),
    "answers are written twice": Case(
        "{% for m in messages %}{{ m['content'] + m['content'] + eos_token }}{% endfor %}", refused="2 times"
    ),
    "a prompt that is not what stands before an answer": Case(
        CHATML_LOOP + "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
        IM,
        refused="prompts for an answer with",
    ),
    "blocks that hold answers and end tokens": Case(
        BLOCK.replace("BLOCK_END", "'<|im_end|>'").replace("AFTER", "'\n'"), IM, **CHATML
    ),
    "blocks that hold the line break too": Case(
        BLOCK.replace("BLOCK_END", "'<|im_end|>\n'").replace("AFTER", "''"),
        IM,
        **{**CHATML, "inner": "A<|im_end|>\n", "last": "A<|im_end|>\n"},
    ),
    "blocks that leave the end token out": Case(
        BLOCK.replace("BLOCK_END", "''").replace("AFTER", "'<|im_end|>\n'"), IM, **CHATML
    ),
    "blocks that hold questions": Case(
        "{% for m in messages %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}",
        IM,
        refused="blocks that do not hold exactly one answer each",
    ),
}
