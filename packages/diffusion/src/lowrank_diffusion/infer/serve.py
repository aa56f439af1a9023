"""`lowrank infer --serve`: a page to draw on, for the browsers of this machine."""

import ipaddress
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.infer.desk import Desk
from lowrank_diffusion.infer.request import Request, check
from lowrank_diffusion.infer.run import free_folder
from lowrank_diffusion.infer.studio import Studio, means_of

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(
    request: Request,
    host: str,
    port: int,
    note: Callable[[str], None],
    ready: Callable[[str, Path], None],
) -> None:
    """Show the page until Ctrl-C.

    Args:
        request: the values that the page's fields start at, and everything that is no field. Without adapters the base
            draws alone.
        host, port: where to listen; port 0 is any that is free.
        note: told of what is done.
        ready: told the page's address and the folder of pictures, once the page can be opened.

    Raises:
        UsageError: a request that cannot be meant, or one of several prompts.
        LowrankError: gradio is not installed, the port is taken, and what `infer` raises before it draws.
    """
    if len(request.prompts) > 1:
        raise UsageError(f"the page draws one prompt at a time, and --prompt is given {len(request.prompts)} times")
    if not request.adapters and request.base is None:
        raise UsageError("--serve draws with adapters, or with a base alone; give an adapter, or a --base")
    means = means_of(request, note)
    check(replace(request, prompts=request.prompts or [""]))
    out = free_folder(request.out)
    with _listening(host, port) as listener:
        check_gradio()
        address, free_port, *_ = listener.getsockname()
        names = ["localhost", "127.0.0.1", host]
        if ":" in host:
            # Only numbers have colons, and starlette cuts a site's name at its first one.
            names.append("[")
        listened = ipaddress.ip_address(address)
        if not listened.is_loopback:
            names = ["*"]
            note(f"{host} is more than this machine: anybody who reaches it can draw here and see every picture")
        studio = Studio(means, request, note, once=False)
        desk = Desk(studio, request, out, note)
        named = f"[{host}]" if ":" in host else host
        if listened.is_unspecified:  # all of this machine's addresses, none of which a browser could go to by that name
            named = socket.gethostname()
        run(desk, listener, names, lambda: ready(f"http://{named}:{free_port}", out))


def run(desk: Desk, listener: socket.socket, names: Sequence[str], ready: Callable[[], None]) -> None:
    """Serve a desk's page until Ctrl-C.

    names: those that browsers may know this machine by; `*` is any. Else a site whose name leads here (DNS rebinding)
        could draw from a browser of this machine that shows it.
    """
    import uvicorn

    with tempfile.TemporaryDirectory(prefix="lowrank-page-") as copies:
        # Where gradio keeps what it shows.
        os.environ["GRADIO_TEMP_DIR"] = copies
        # Browsers keep a connection open for news of their drawing.
        config = uvicorn.Config(_application(desk, names), log_level="critical", timeout_graceful_shutdown=1)
        ready()
        uvicorn.Server(config).run(sockets=[listener])


def _application(desk: Desk, names: Sequence[str]) -> "FastAPI":
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from lowrank_diffusion.infer.page import STYLE, make_page, theme

    @asynccontextmanager
    async def ending(app: FastAPI) -> AsyncGenerator[None]:
        yield
        desk.close()

    app = FastAPI(lifespan=ending)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    return gr.mount_gradio_app(
        app,
        make_page(desk),
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        # Nothing on the page takes a file.
        max_file_size=1,
        allowed_paths=[str(desk.out.resolve())],
        theme=theme(),
        css=STYLE,
    )


def check_gradio() -> None:
    """Import gradio, silenced.

    Raises:
        LowrankError: it is not installed.
    """
    # Read when gradio is imported: else it would tell its makers of every start.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise LowrankError('--serve needs gradio, which is not installed; pip install "lowrank[serve]"') from None


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UsageError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Python adds the address to the system's own words, but for names that are not found.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise LowrankError(
            f"port {port} of {host} cannot be listened at ({reason}); choose another with --port, "
            "0 for any that is free, or another --host"
        ) from None
