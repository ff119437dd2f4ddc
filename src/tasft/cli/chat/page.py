"""Two models side by side in the browser, by Gradio."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasft.cli.chat.talk import Talk, Turn
from tasft.core.errors import UserError
from tasft.core.text import visible

# Read when it is imported and when it starts: it would ask its makers for the newest version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Its own scripts and styles are inline. Nothing is asked for, and nothing goes, elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; font-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)


class _Policed:
    """Adds the policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-store"
            await send(message)

        await self.app(scope, receive, sent)


def page_of(talk: Talk) -> gr.Blocks:
    """The page. Replies are hostile: they are the values of text boxes, never markup."""

    def boxes(turn: Turn) -> list[gr.Textbox]:
        made = []
        with gr.Row():
            for side, reply, verdict in zip(talk.sides, turn.replies, turn.verdicts, strict=True):
                with gr.Column():
                    made.append(
                        gr.Textbox(visible(reply), label=visible(side.title), lines=6, max_lines=20, interactive=False)
                    )
                    made.append(
                        gr.Textbox(visible(verdict), label="Verdict", lines=len(talk.judges), interactive=False)
                    )
        return made

    def ask(prompt: str, past: list[Turn], last: Turn | None) -> Iterator[tuple[Any, ...]]:
        if not prompt.strip():
            yield (gr.skip(),) * 8
            return
        past = [*past, last] if last else past
        turn = Turn(prompt)
        yield "", past, None, visible(prompt), *_values(turn)
        try:
            with closing(talk.turn(past, prompt)) as growing:
                for turn in growing:
                    yield (*[gr.skip()] * 4, *_values(turn))
        except UserError as error:
            # Shown as text: gr.Error would take it for markup.
            turn = Turn(prompt, verdicts=("\n".join(error.faults), ""))
            yield (*[gr.skip()] * 4, *_values(turn))
            return
        yield gr.skip(), gr.skip(), turn, *[gr.skip()] * 5

    with gr.Blocks(analytics_enabled=False, title="tasft chat", fill_width=True) as page:
        past = gr.State([])
        last = gr.State(None)

        # Not in the queue: the client closes the queue's stream at the end of what is in it, and may miss what it asked
        # just then, such as the first prompt.
        @gr.render(inputs=past, queue=False)  # type: ignore[untyped-decorator]
        def earlier(past: list[Turn]) -> None:
            for turn in past:
                gr.Textbox(visible(turn.prompt), label="Prompt", interactive=False)
                boxes(turn)

        asked = gr.Textbox(label="Prompt", interactive=False)
        said = boxes(Turn(""))
        prompt = gr.Textbox(
            label="Say to both",
            info=None if talk.remembers else "Each prompt stands alone.",
            submit_btn=True,
            autofocus=True,
        )
        with gr.Row():
            stop = gr.Button("Stop")
            gr.Button("New conversation", link="/")  # A page of its own, whose state is empty.
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asking = prompt.submit(
            ask, [prompt, past, last], [prompt, past, last, asked, *said], concurrency_id="model", **private
        )
        stop.click(None, cancels=asking, **private)
    return page


def _values(turn: Turn) -> tuple[str, ...]:
    pairs = zip(turn.replies, turn.verdicts, strict=True)
    return tuple(visible(text) for pair in pairs for text in pair)


def app_of(talk: Talk, host: str) -> FastAPI:
    """The page as an application, for a server that listens on a host.

    It is mounted, not launched: that would look for itself, for a share link and at a dozen variables.
    """
    # Else a page elsewhere, by a name of its own for this address, could read along.
    hosts = ["127.0.0.1", "localhost", "[::1]"] if host in LOOPBACK else ["*"]
    app = FastAPI(
        middleware=[Middleware(_Policed), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)], openapi_url=None
    )
    page = page_of(talk).queue(default_concurrency_limit=1, api_open=False)
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        server_name=host,
        footer_links=[],
        run_history=False,  # It would keep replies in the browser.
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        max_file_size=0,
        app_kwargs={"openapi_url": None},
    )


def server_of(
    talk: Talk, host: str = LOOPBACK[0], port: int | None = None
) -> tuple[uvicorn.Server, socket.socket, str]:
    """A server of the page, the socket that it is to run on, and its address.

    Args:
        talk: Who is asked.
        host: Address to listen on. Only loopback is for this machine alone.
        port: None takes a free one.

    Raises:
        UserError: It cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port or 0), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port or 'any'}: cannot be listened on ({error})") from None
    config = uvicorn.Config(app_of(talk, host), log_level="warning", timeout_graceful_shutdown=1)
    named = f"[{host}]" if ":" in host else host
    return uvicorn.Server(config), listening, f"http://{named}:{listening.getsockname()[1]}/"


def serve(talk: Talk, host: str, port: int | None) -> None:
    """Serve the page until it is interrupted."""
    server, listening, address = server_of(talk, host, port)
    print(f"chat: {address} (Ctrl-C ends it)", flush=True)
    if host not in LOOPBACK:
        print("note: whoever reaches this machine can use it, and reads along in the clear", flush=True)
    server.run(sockets=[listening])
