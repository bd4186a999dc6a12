"""Turn loaded models into a web page on gradio: a chat about images, with one model or two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from importlib import import_module

import torch

from llava_lite.conversation.templates import TEMPLATES
from llava_lite.errors import get_sentence
from llava_lite.serve.demo_conversation import Conversation, Session, read_ask
from llava_lite.serve.demo_model import DemoModel, Settings
from llava_lite.serve.demo_routing import routing_html
from llava_lite.serve.demo_style import CONTENT_POLICY, CSS, FONTS, MONO_FONTS, SWITCH_THEME

# Visitors that may wait for their answer; the next one is asked to come back.
MAX_WAITING = 64
MAX_FILE_SIZE = "100mb"
# Uploads are deleted when they are a day old; looked for every hour.
DELETE_UPLOADS_S = (3600, 86400)
# What the browser lets a visitor choose; what a model does not read is answered in a sentence.
UPLOADS = ("image", "audio", "video")


def import_gradio():
    """Return gradio; ImportError with the extra that brings it."""
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ImportError(f"the page needs gradio ({error}): pip install 'llava-lite[serve]'.") from error


def read_seed(text: str) -> int | None:
    """Return the seed that a visitor typed, None for none; ValueError for what is no whole number from 0 to 2^63-1."""
    text = (text or "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**63:
        raise ValueError(f"the seed is {text!r}; give a whole number from 0 to 2^63-1, or leave it empty.")
    return int(text)


def no_memory(name: str) -> str:
    """Return the message for a device that is full."""
    return f"{name}: the device has no memory left for this conversation; start a new one."


class _WithPolicy:
    """Send every response with the content policy of the page (ASGI middleware)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", CONTENT_POLICY.encode())]
                message = message | {"headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(eq=False)
class DemoPage:
    """The page of some models. settings: what its controls begin with. examples: (text, paths of images) each."""

    models: dict[str, DemoModel]
    settings: Settings
    examples: list[tuple[str, list[str]]]

    @property
    def num_panels(self) -> int:
        """Return how many models are asked at once."""
        return min(len(self.models), 2)

    def ask(self, text, paths, session: Session, names, settings: Settings, with_routes: bool):
        """Read a question and yield (notice, routing HTML of each panel) while the panels answer one by one.

        The session's conversations grow meanwhile. The last notice says what went wrong, in a sentence a panel. Raises
        ValueError for a question that cannot be asked at all.
        """
        session.last = read_ask(text, paths)
        yield from self.answer(session, names, settings, with_routes)

    def answer(self, session: Session, names, settings: Settings, with_routes: bool):
        """Answer the session's last question in each panel; see `ask`."""
        ask, notices, charts = session.last, [], [""] * len(session.panels)
        for i, (panel, name) in enumerate(zip(session.panels, names, strict=True)):
            model = self.models[name]
            try:
                for _ in model.answer(panel, ask, settings):
                    yield "", charts
                if not panel.turns or panel.turns[-1].ask is not ask:
                    notices.append(f"{name} ended its answer at once; ask in another way, or with a temperature.")
                elif panel.turns[-1].remark:
                    notices.append(panel.turns[-1].remark)
                found = model.last_routes(panel, settings) if with_routes else None
                charts[i] = routing_html(found) if found else ""
            except torch.OutOfMemoryError:
                notices.append(no_memory(name))
            except (ValueError, OSError, ImportError) as error:
                notices.append(f"{name}: {ask.sentence(error)}" if self.num_panels > 1 else ask.sentence(error))
            yield " ".join(notices), charts

    def build(self):
        """Return gradio's Blocks."""
        gr = import_gradio()
        kinds = [kind for kind in UPLOADS if any(kind in model.kinds for model in self.models.values())]
        with gr.Blocks(analytics_enabled=False, title="llava_lite", delete_cache=DELETE_UPLOADS_S) as page:
            session = gr.State(Session([Conversation() for _ in range(self.num_panels)]))
            with gr.Row(elem_id="head"):
                gr.Markdown("# " + " and ".join(self.models) if len(self.models) < 3 else "# llava_lite")
                theme = gr.Button("Light / dark", size="sm", elem_id="theme")
            with gr.Row():
                panels = [self.build_panel(gr, i) for i in range(self.num_panels)]
            # It stays in view while the panels scroll, which on a phone are longer than the screen.
            with gr.Column(elem_id="composer"):
                notice = gr.HTML("", visible=False, padding=False, elem_id="notice")
                box = gr.MultimodalTextbox(
                    placeholder=f"Ask; add files ({', '.join(kinds)})" if kinds else "Ask",
                    file_count="multiple",
                    file_types=list(UPLOADS),
                    sources=["upload"],
                    label="Question",
                    show_label=False,
                    elem_id="box",
                )
                with gr.Row(elem_id="buttons"):
                    stop = gr.Button("Stop", size="sm", min_width=80, elem_id="stop")
                    again = gr.Button("Regenerate", size="sm", min_width=80, elem_id="regenerate")
                    clear = gr.Button("New chat", size="sm", min_width=80, elem_id="clear")
            controls = self.build_controls(gr)
            if self.examples:
                gr.Examples(
                    [[{"text": text, "files": files}] for text, files in self.examples], [box], label="Examples"
                )
            self.connect(gr, session, panels, notice, box, controls, {"stop": stop, "again": again, "clear": clear})
            theme.click(None, js=SWITCH_THEME, api_visibility="private")
        return page.queue(max_size=MAX_WAITING, default_concurrency_limit=None)

    def build_panel(self, gr, i: int):
        """Return (name, chat, routing) of a panel: which model is asked, what it answered, where its tokens went."""
        names = list(self.models)
        with gr.Column(min_width=300):
            # A single model is named by the title alone.
            name = gr.Dropdown(
                names, value=names[i], label=f"Model {i + 1}", visible=len(names) > 1, elem_id=f"model-{i + 1}"
            )
            chat = gr.Chatbot(
                show_label=False,
                height="52vh",
                elem_id=f"chat-{i + 1}",
                elem_classes="chat",
                buttons=["copy"],
                placeholder="Add an image and ask about it." if self.models[names[i]].kinds else "Ask something.",
            )
            routing = gr.HTML("", visible=False, elem_id=f"routing-{i + 1}")
        return name, chat, routing

    def build_controls(self, gr) -> list:
        """Return the components whose values `read_settings` takes, and whether routes are wanted."""
        names = list(dict.fromkeys([*TEMPLATES, *filter(None, [self.settings.template])]))
        own = {model.processor.conv_template for model in self.models.values()}
        label = f"the model's own ({own.pop()})" if len(own) == 1 else "each model's own"
        begin, has_experts = self.settings, any(model.routes is not None for model in self.models.values())
        most = max(2048, begin.max_new_tokens)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                template = gr.Dropdown(
                    [(label, ""), *names], value=begin.template or "", label="Template", info="prompt format"
                )
                temperature = gr.Slider(0, 2, begin.temperature, step=0.05, label="Temperature", info="0: greedy")
                top_p = gr.Slider(0.01, 1, begin.top_p, step=0.01, label="Top-p", info="1: all tokens")
            with gr.Row():
                longest = gr.Slider(
                    1, most, begin.max_new_tokens, step=1, label="Max new tokens", info="longest answer"
                )
                seed = gr.Textbox(
                    "" if begin.seed is None else str(begin.seed),
                    label="Seed",
                    info="a whole number: the same answer again",
                    placeholder="another answer every time",
                    elem_id="seed",
                )
                routes = gr.Checkbox(True, label="Show where tokens went", visible=has_experts)
        return [template, temperature, top_p, longest, seed, routes]

    def connect(self, gr, session, panels, notice, box, controls, buttons) -> None:
        """Say what each button does."""
        names, chats, routings = (list(parts) for parts in zip(*panels, strict=True))

        def show(state: Session, text: str = "", charts=None):
            shown = dict(zip(chats, (panel.messages() for panel in state.panels), strict=True))
            shown[notice] = gr.update(value=f'<div role="alert">{escape(text)}</div>', visible=bool(text))
            for routing, chart in zip(routings, charts or (), strict=False):
                shown[routing] = gr.update(value=chart, visible=bool(chart))
            return shown

        def read(values):
            *chosen, template, temperature, top_p, longest, seed, with_routes = values
            return chosen, Settings(template or None, temperature, top_p, int(longest), read_seed(seed)), with_routes

        def stream(state, steps, asked):
            # Emptied once: what is typed during the answer stays.
            text, emptied = "", {box: None}
            for text, charts in steps:
                yield show(state, text, charts) | (emptied if asked else {})
                emptied = {}
            # What no panel could answer goes back into the box, to be changed.
            if text and asked and not any(panel.turns and panel.turns[-1].ask is state.last for panel in state.panels):
                yield show(state, text) | {box: asked}

        def ask(state, asked, *values):
            try:
                yield from stream(state, self.ask(asked["text"], asked["files"], state, *read(values)), asked)
            except ValueError as error:
                yield show(state, get_sentence(error))

        def regenerate(state, *values):
            try:
                chosen = read(values)
                if state.take_back() is None:
                    raise ValueError("there is no question to ask again; type one.")
                yield from stream(state, self.answer(state, *chosen), None)
            except ValueError as error:
                yield show(state, get_sentence(error))

        def begin_anew(state):
            state.clear()
            return show(state, charts=[""] * self.num_panels)

        outputs, settings = [*chats, *routings, notice, box], [*names, *controls]
        # One answer at a time; gradio shows the others their place in the queue.
        one = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "once", "show_progress": "minimal"}
        hidden = {"api_visibility": "private"}
        asking = box.submit(ask, [session, box, *settings], outputs, **one, **hidden)
        again = buttons["again"].click(regenerate, [session, *settings], outputs, **one, **hidden)
        # Past the queue: they work where it is full, too.
        running = {"cancels": [asking, again], "show_progress": "hidden", "queue": False, **hidden}
        buttons["stop"].click(show, [session], outputs, **running)
        for starts in (buttons["clear"].click, *(chat.clear for chat in chats), *(name.change for name in names)):
            starts(begin_anew, [session], outputs, **running)


def serve(page, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; nothing is shared or reported to gradio's makers."""
    gr = import_gradio()
    middleware = import_module("starlette.middleware").Middleware
    # As a URL writes an address of version 6.
    name = f"[{host}]" if ":" in host else host
    page.launch(
        server_name=name,
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        app_kwargs={"middleware": [middleware(_WithPolicy)]},
        theme=gr.themes.Default(font=FONTS, font_mono=MONO_FONTS),
        # Not css=, which gradio rewrites to reach only what is inside its own frame.
        head=f"<style>{CSS}</style>",
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The page is at http://{name}:{port}/ (Ctrl-C ends it).", flush=True)
    page.block_thread()
