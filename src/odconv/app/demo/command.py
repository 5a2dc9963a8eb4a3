"""The command `odconv demo`."""

import os
import signal
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOW = """weights must be given, the checkpoint of a dynamic network, such as
  odconv demo --weights demo/digits_od_resnet18_4x/best.ckpt --static demo/digits_resnet18/best.ckpt
In a checkout of odconv, `make demo` trains these two in a few minutes; odconv train makes others."""
LOCAL = ("127.0.0.1", "localhost")


def demo(
    *,
    weights: str | None = None,
    static: str | None = None,
    static_arch: str | None = None,
    examples: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    **network: Any,
) -> None:
    """Open a page for the browser: drop an image, see what networks say of it, how soon, and what the attentions do.

    Args:
        weights: A checkpoint of odconv train, a folder that HubModel saved, or owner/name on the Hub; these say what
            network it is. Or another file of weights, with arch.
        static: The same of a network to compare it with, mostly the static one; default: none.
        static_arch: Name of that network; default: what its checkpoint says.
        examples: Folder of images to offer; default: some that come with scikit-learn.
        host: Address to open; with one that is not 127.0.0.1, everybody who reaches this machine can use the page.
        port: Port to open.
        **network: What the checkpoint does not say; see :func:`odconv.app.predict.load_classifier`.

    Raises:
        ValueError: an option or weights that do not fit.
        OSError: a file cannot be read, or the port not be opened.
        ImportError: gradio is not installed.
    """
    if weights is None:
        raise ValueError(HOW)
    check_free(host, port)
    if find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install 'odconv[demo]'")
    if host not in LOCAL:
        print(f"odconv demo: everybody who reaches {host} can use this page", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and deletes what was uploaded
    with tempfile.TemporaryDirectory(prefix="odconv-demo-") as place:
        # gradio reads these when it is imported, and asks the page whether it is there, but not by way of a proxy
        os.environ["GRADIO_TEMP_DIR"] = place
        os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy"), *LOCAL, host)))
        from odconv.app.demo.app import build, launch
        from odconv.app.demo.examples import make_examples
        from odconv.app.demo.networks import load

        networks = load(weights, static, static_arch, **network)
        shown = make_examples(examples, networks[0].classifier.classes, Path(place))
        launch(build(networks, shown, Path(place)), host, port)


def check_free(host: str, port: int) -> None:
    """See that a port can be opened.

    Raises:
        ValueError: it is no port.
        OSError: it cannot.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = f"{error.strerror}; choose others with --host and --port"
        raise OSError(f"{host}:{port} cannot be opened: {reason}") from error
