"""`lory web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lory.cli.options import BaseDtype, Device, Model, Quantize, TrustRemoteCode, parse_adapters
from lory.runtime import UsageError


def web(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter, or another model, to choose beside MODEL, and what it is called.", metavar="NAME=PATH"
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A run to show while it trains; MODEL's own, if it is one.", metavar="FOLDER")
    ] = None,
    queue: Annotated[
        Path | None,
        typer.Option(help="A review queue, as of lory eval --review; made if it is missing.", metavar="FILE"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's, it needs a password.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; by default the first free one from 7860.")
    ] = None,
    password: Annotated[
        str, typer.Option(envvar="LORY_WEB_PASSWORD", help="What visitors have to know.", show_default=False)
    ] = "",
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through gradio's servers; it needs a password.")
    ] = False,
    inbrowser: Annotated[bool, typer.Option("--inbrowser", help="Open the page in the browser.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, or fail.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU.")] = False,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model on a page in the browser, compare adapters, review answers, and watch a run."""
    place = _choose_device(device, gpu, cpu)
    try:
        from lory.chat.web.run import check_access, run_page
    except ImportError as error:
        raise UsageError(f"The page needs {error.name}; install it with: pip install 'lory-llm[web]'.") from error
    from lory.chat.variants import Loading, open_variants
    from lory.chat.web.desk import Desk, find_trained

    # what can be refused is refused before a model is loaded
    check_access(host, share, password)
    adapters = parse_adapters(adapter or [])
    shown = find_trained(model, run)
    bits: Any = quantize.value if quantize else None
    loading: Loading = {
        "dtype": dtype.value if dtype else "auto",
        "device": place,
        "quantize": bits,
        "trust_remote_code": trust_remote_code,
    }
    desk = Desk(open_variants(model, adapters, loading), queue, shown)

    def tell(address: str, link: str | None) -> None:
        print(f"{', '.join(desk.names)} at {address}{f' and {link}' if link else ''}", flush=True)
        if inbrowser:
            import webbrowser

            webbrowser.open(link or address)

    run_page(desk, host, port, password, share, tell)


def _choose_device(device: str | None, gpu: bool, cpu: bool) -> str | None:
    if sum([device is not None, gpu, cpu]) > 1:
        raise UsageError("--device, --gpu and --cpu were given together; give one of them.")
    return "cuda" if gpu else "cpu" if cpu else device
