"""The command `odconv demo`."""

import os
import signal
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from odconv.checkpoints import released_names, weights_folder

STATIC, DYNAMIC = "imagenette_static", "imagenette_odconv_4x"
"""The names of what is shown where nothing else is said."""

HOW = f"""weights must be given, since {STATIC} and {DYNAMIC} are not in the folder {{place}}.
They are in a checkout of odconv: call odconv demo there, or let $ODCONV_WEIGHTS name its folder weights.
Or say what to show, a dynamic network and a static one, such as the two that `make demo` trains in a few minutes:
  odconv demo --weights demo/digits_od_resnet18_4x/best.ckpt --static demo/digits_resnet18/best.ckpt"""
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
        weights: A checkpoint of odconv train, a folder of odconv release or its name, or owner/name on the Hub; these
            say what network it is. Or another file of weights, with arch. Default: imagenette_odconv_4x, if it and
            imagenette_static are in the folder weights.
        static: The same of a network to compare it with, mostly the static one; default: imagenette_static without
            weights, else none.
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
        if not {STATIC, DYNAMIC} <= {*released_names()}:
            raise ValueError(HOW.format(place=weights_folder()))
        weights, static = DYNAMIC, static or STATIC
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
    """See that a port can be opened; a ValueError if it is no port, an OSError if it cannot."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = f"{error.strerror}; choose others with --host and --port"
        raise OSError(f"{host}:{port} cannot be opened: {reason}") from error
