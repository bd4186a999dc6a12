"""The templates of LLaVA, MoE-LLaVA, Alpaca and LLaMA2-Accessory, as data: name -> the fields of a Conversation.

Alpaca's prompts are those of Stanford Alpaca, LLaMA-Adapter and ImageBind-LLM; the other instructions and the
dialogues are LLaMA2-Accessory's.
"""

from enum import Enum, auto


class SeparatorStyle(Enum):
    """How the turns of a conversation are joined; CHAT is the tokenizer's own chat template."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHAT = auto()
    INSTRUCT = auto()
    CAPTION = auto()
    ACCESSORY = auto()


_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# No space before the second "The": the checkpoints were trained with this text.
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# Two spaces after "being safe.", as in Llama 2.
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_CHATML_SYSTEM = "<|im_start|>system\nAnswer the questions."
# No spaces between its sentences, as it was trained.
_ACCESSORY_SYSTEM = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.Follow the instructions carefully and explain your answers in detail."
)
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request"
)
_ALPACA = f"{_INSTRUCTION}."
_ALPACA_SHORT = f"{_INSTRUCTION} using a single word or phrase."
# Between an instruction and its input in a question; a question that has it gets the other opening.
INPUT_MARK = "\n\n### Input:\n"
WITH_INPUT = {
    opening: opening.replace("task.", "task, paired with an input that provides further context.")
    for opening in (_ALPACA, _ALPACA_SHORT)
}
# What is asked of an image in a record whose question has no words, by the system text of the template.
CAPTION_QUESTIONS = dict.fromkeys((_ALPACA, _ALPACA_SHORT), "Generate caption of this image")
# Templates of one question and one answer, and those whose answers end with the end of text of the tokenizer.
SINGLE_TURN = (SeparatorStyle.INSTRUCT, SeparatorStyle.CAPTION)
WITH_EOS = (*SINGLE_TURN, SeparatorStyle.ACCESSORY)
_V0_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_V0_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
    "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
    "between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
    "and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)


def _fields(system, roles, style, seps, version="Unknown"):
    sep, sep2 = seps
    fields = {"system": system, "roles": roles, "messages": (), "offset": 0}
    return {**fields, "sep_style": style, "sep": sep, "sep2": sep2, "version": version}


def _single(system, version="Unknown"):
    return _fields(system, ("Human", "Assistant"), SeparatorStyle.SINGLE, ("###", None), version)


def _two(system, end_token, version):
    return _fields(system, ("USER", "ASSISTANT"), SeparatorStyle.TWO, (" ", end_token), version)


def _llama_2(system, bos):
    return _fields(system, ("USER", "ASSISTANT"), SeparatorStyle.LLAMA_2, (bos, "</s>"), "llama_v2")


def _mpt(system):
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return _fields(system, roles, SeparatorStyle.MPT, ("<|im_end|>", None), "mpt")


def _instruct(system, roles=("### Instruction:\n", "### Response:"), sep="\n\n", version="alpaca"):
    return _fields(system, roles, SeparatorStyle.INSTRUCT, (sep, "</s>"), version)


def _accessory(system, roles, seps=("###", None)):
    return _fields(system, roles, SeparatorStyle.ACCESSORY, seps, "accessory" if seps[1] is None else "v1")


_VICUNA_V0 = {
    **_single(_HUMAN_SYSTEM),
    "messages": (("Human", _V0_QUESTION), ("Assistant", _V0_ANSWER)),
    "offset": 2,
}
_PLAIN = _fields("", ("", ""), SeparatorStyle.PLAIN, ("\n", None))

TEMPLATES = {
    "default": _VICUNA_V0,
    "v0": _VICUNA_V0,
    "v1": _two(_USER_SYSTEM, "</s>", "v1"),
    "vicuna_v1": _two(_USER_SYSTEM, "</s>", "v1"),
    "llama_2": _llama_2(_LLAMA_2_SYSTEM, "<s>"),
    "mistral_instruct": _llama_2("", ""),
    "chatml_direct": _mpt(_CHATML_SYSTEM),
    "mistral_direct": _mpt(_CHATML_SYSTEM),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _single(_HUMAN_SYSTEM),
    "v0_mmtag": _single(_MMTAG_SYSTEM, "v0_mmtag"),
    "llava_v1": _two(_HUMAN_SYSTEM, "</s>", "v1"),
    "v1_mmtag": _two(_MMTAG_SYSTEM, "</s>", "v1_mmtag"),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2_SYSTEM, "<s>"),
    "mpt": _mpt(_MPT_SYSTEM),
    "mistral": _two(_USER_SYSTEM, "</s>", "mistral"),
    "openchat": _two(_USER_SYSTEM, "<|end_of_turn|>", "openchat"),
    "minicpm": _two(_USER_SYSTEM, "</s>", "minicpm"),
    "phi": _two(_USER_SYSTEM, "<|endoftext|>", "phi"),
    "qwen": _two(_USER_SYSTEM, "<|endoftext|>", "phi"),
    "stablelm": _two(_USER_SYSTEM, "<|endoftext|>", "stablelm"),
    "chat": _fields(None, ("user", "assistant"), SeparatorStyle.CHAT, ("", None), "chat"),
    "alpaca": _instruct(_ALPACA),
    "alpaca_short": _instruct(_ALPACA_SHORT),
    "question_generation": _instruct("", ("Generate a question whose answer is:\n", "Question:\n")),
    "caption": _fields("", ("", ""), SeparatorStyle.CAPTION, ("", "</s>"), "caption"),
    "bare": _instruct("", ("", ""), "", "bare"),
    "accessory": _accessory(_HUMAN_SYSTEM, ("Human", "Assistant")),
    "accessory_multimodal": _accessory(_ACCESSORY_SYSTEM, ("Human", "Assistant")),
    "accessory_llava_v1": _accessory(_ACCESSORY_SYSTEM, ("USER", "ASSISTANT"), (" ", "</s>")),
    "accessory_vicuna": _accessory(_USER_SYSTEM, ("USER", "ASSISTANT"), (" ", "</s>")),
    "bair_v1": _accessory("BEGINNING OF CONVERSATION:", ("USER", "GPT"), (" ", "</s>")),
}
