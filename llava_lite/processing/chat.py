"""Turn role-and-content messages into a prompt or into the inputs of a model: `apply_chat_template`."""

from llava_lite.conversation.chat_answers import own_template
from llava_lite.conversation.chat_template import takes_parts
from llava_lite.conversation.messages import read_conversations, with_images
from llava_lite.conversation.prompts import (
    check_no_answer_mask,
    check_roles,
    cut_prompt,
    has_generation_blocks,
    names_in,
    place_message_images,
    regular_turns,
    with_cut,
    write_jinja_prompt,
    write_roles,
)
from llava_lite.processing.call_keywords import call_names, check_unknown

# Keywords of apply_chat_template itself, for the name that was probably meant.
APPLY_NAMES = ("chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize")
APPLY_NAMES += ("return_assistant_tokens_mask", "return_dict", "processor_kwargs")


class ChatProcessing:
    """`apply_chat_template` of a processor that has a `render` and calls itself with prompts and images."""

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=False,
        return_dict=False,
        return_tensors="pt",
        processor_kwargs=None,
        tools=None,
        documents=None,
        return_assistant_tokens_mask=False,
        **kwargs,
    ):
        """Return messages as a prompt in the checkpoint's own format, or as the inputs of a model.

        conversation: a list of messages or a list of such lists; a message is {"role": "user", "content": ...} with a
        text or parts {"type": "text", "text": ...} and {"type": "image", "image" | "path" | "url" | "base64": image},
        or OpenAI's {"type": "image_url", "image_url": {"url": ...}}; {"type": "image"} alone takes the next of
        `images=` or, without `tokenize`, needs none. chat_template: a Jinja text, or the name of one of the
        tokenizer's, in place of the checkpoint's format.

        kwargs: those of `__call__` (in processor_kwargs too), images=, and what the chat template reads, such as
        enable_thinking; any other name is an UnknownKeyword. A named format (v1, ...) reads no tools and documents.
        return_assistant_tokens_mask: assistant_masks [B, T], 1 at answers with their end tokens. Roles: a developer's
        message is a system message where the template knows no developer; a named format has one system text, in
        front, and writes messages of one role after another as turns of their own, as inference servers do.
        """
        if not isinstance(add_generation_prompt, (bool, type(None))):
            raise ValueError(f"add_generation_prompt is {add_generation_prompt!r}; tools and documents go by name.")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise ValueError(f"continue_final_message and {other} exclude each other; choose one.")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True.")
        conversations, many = read_conversations(conversation)
        template = self._jinja(chat_template, tools)
        call, options = self._sorted(kwargs, processor_kwargs, template)
        options |= {name: value for name, value in (("tools", tools), ("documents", documents)) if value}
        self._check_options(options, template)
        prompts = [
            self._prompt(
                messages,
                template,
                is_own=chat_template is None,
                is_open=add_generation_prompt,
                continues=continue_final_message,
                marks_answers=return_assistant_tokens_mask,
                options=options,
            )
            for messages in conversations
        ]
        if not tokenize:
            texts = [prompt.text for prompt in prompts]
            return texts if many else texts[0]
        call.setdefault("return_tensors", "pt" if return_tensors == "auto" else return_tensors)
        images = with_images(conversations, call.pop("images", None))
        if return_assistant_tokens_mask:
            call["return_assistant_tokens_mask"] = True
        inputs = self(images=images, text=prompts, **call)
        return inputs if return_dict else inputs["input_ids"]

    def _jinja(self, chat_template, tools):
        """Return the Jinja text that messages are written by, None for a format of `conv_templates`."""
        if chat_template is not None:
            return self.tokenizer.get_chat_template(chat_template)
        known = getattr(self.tokenizer, "chat_template", None)
        if self.conv_template != "chat" or not known:
            return None
        if isinstance(known, dict):
            return self.tokenizer.get_chat_template(tools=tools or None)
        return own_template(self.tokenizer, self.enable_thinking, self.chat_end_token)

    def _sorted(self, kwargs, processor_kwargs, template):
        """Return (keywords of a call, keywords of the chat template) of those that apply_chat_template was given."""
        if processor_kwargs is not None and not isinstance(processor_kwargs, dict):
            raise ValueError(f"processor_kwargs is a dict of keywords; got {processor_kwargs!r}.")
        call, options, known = dict(processor_kwargs or {}), {}, call_names(self.image_processor)
        for name in call.keys() & kwargs.keys():
            raise ValueError(f"{name} is given twice, in processor_kwargs and beside it.")
        for name, value in kwargs.items():
            if name in ("load_audio_from_video", "sanitize_control_tokens"):
                if value:
                    raise ValueError(f"{name} is an option of transformers' own processors, which is not known here.")
            elif name in known:
                call[name] = value
            else:
                options[name] = value
        call.pop("streamer", None)
        return call, options

    def _check_options(self, options, template):
        """Raise UnknownKeyword for a keyword that the chat template does not read."""
        read = frozenset() if template is None else names_in(template)
        for name in options:
            if name not in read:
                own = f"the prompt format {self.conv_template!r}" if template is None else "the chat template"
                known = {*call_names(self.image_processor), *APPLY_NAMES, *read}
                check_unknown(name, known, f": neither the processor nor {own} reads it")

    def _prompt(self, conversation, template, is_own, is_open, continues, marks_answers, options):
        """Return one conversation as a Rendered, in the way that its roles and keywords ask for.

        template: Jinja text or None for a named format; is_own: whether it is the checkpoint's.
        """
        if continues:
            conversation = [*conversation[:-1], with_cut(conversation[-1], continues)]
        turns = regular_turns(conversation)
        # An answer that is to be followed by another one is no conversation of training data.
        is_trained = turns is not None and (turns[0][-1][1] is None or not is_open)
        if template is None:
            check_roles(conversation, self.conv_template)
        elif options or any(message.more for message in conversation) or not is_own or self.asks_as_transformers:
            is_trained = False
        if is_trained:
            rendered = self.render(turns[0], system=turns[1], open_turn=is_open)
        elif template is None:
            check_no_answer_mask(conversation, marks_answers)
            rendered = write_roles(conversation, self.conv_template, self.use_im_start_end, is_open, self.tokenizer)
        else:
            rendered = self._by_jinja(conversation, turns, template, is_own, is_open, marks_answers, options)
        return cut_prompt(rendered) if continues else rendered

    def _by_jinja(self, conversation, turns, template, is_own, is_open, marks_answers, options):
        """Return a conversation as a Jinja text writes it; arguments as of `_prompt`."""
        in_parts = takes_parts(template)
        if not in_parts:
            conversation = place_message_images(conversation, self.use_im_start_end and is_own)
        # Text models' own templates write every special token themselves.
        with_special = in_parts or not is_own
        all_options = {"add_generation_prompt": is_open, **options}
        if marks_answers and is_own and turns is not None and not options and not has_generation_blocks(template):
            written = write_jinja_prompt(template, conversation, self.tokenizer, in_parts=in_parts, **all_options)
            known = self.render(turns[0], system=turns[1], open_turn=is_open)
            if known.text == written.text:
                return written._replace(answers=known.answers, add_special_tokens=with_special)
        rendered = write_jinja_prompt(template, conversation, self.tokenizer, marks_answers, in_parts, **all_options)
        return rendered._replace(add_special_tokens=with_special)
