"""The page: an image on the left, what the networks say of it on the right, the attentions below."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from odconv.app.demo.cards import show_answers, show_problem
from odconv.app.demo.examples import Examples
from odconv.app.demo.networks import Network, ask, prepare
from odconv.app.demo.uploads import FORMATS, MEGABYTES, MEGAPIXELS, dropped, read_upload
from odconv.app.pages import plot_attentions
from odconv.attentions import record_attentions
from odconv.profiling.latency import describe

HEAD = """<h1>Static and dynamic convolution</h1>
<p>What networks see in an image, how long it takes them, and what their attentions do.</p>"""
INVITATION = '<p class="invitation">Drop an image, or choose an example.</p>'
FONTS = (gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif")  # comes with gradio
BESIDE = 5
"""Examples whose attentions stand below those of the image."""


def build(networks: Sequence[Network], examples: Examples, place: Path) -> gr.Blocks:
    """Put the page together, and let the networks run once; the last one with dynamic layers shows its attentions.

    Gradio keeps what is dropped in the folder `place`; other files are not looked at.
    """
    others = [read_upload(path) for path in examples.files[:BESIDE]]
    titles = ["yours", *(path.stem[:10].replace("$", r"\$") for path in examples.files[:BESIDE])]  # no formulas
    device = describe(networks[0].classifier.device)
    dynamic = next((network for network in reversed(networks) if network.layers), None)
    ask(networks, others[0])  # the first time takes longer

    def answer(upload: dict[str, Any] | None) -> str:
        if upload is None:
            return INVITATION
        try:
            return show_answers(ask(networks, read_upload(dropped(upload, place))), device)
        except ValueError as error:
            return show_problem(str(error))

    def draw(upload: dict[str, Any] | None, layer: str) -> str:
        if upload is None or dynamic is None:
            return ""
        try:
            image = read_upload(dropped(upload, place))
        except ValueError:  # answer says so
            return ""
        x = prepare(dynamic.classifier, [image, *others])
        figure = plot_attentions(record_attentions(dynamic.model, x), x, titles, [layer] if layer else None)
        png = io.BytesIO()
        figure.savefig(png, dpi=120)
        source = base64.b64encode(png.getvalue()).decode()
        return f'<div class="scroll"><img alt="Attentions" src="data:image/png;base64,{source}"></div>'

    with gr.Blocks(title="odconv demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEAD, elem_classes="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=300, buttons=[],
                    placeholder=f"Drop an image here\n{', '.join(FORMATS)}\nof at most {MEGABYTES} MB and "
                    f"{MEGAPIXELS} million pixels", elem_classes="image",
                )  # fmt: skip
                gr.Examples(
                    [[str(path)] for path in examples.files], image, label=f"Examples: {examples.source}",
                    examples_per_page=len(examples.files), api_visibility="private",
                )  # fmt: skip
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(INVITATION)
        # the file comes as it was dropped, for read_upload to judge
        raw: dict[str, Any] = {"preprocess": False, "api_visibility": "private", "concurrency_id": "networks"}
        answered = image.change(answer, image, answers, **raw)
        if dynamic is not None:
            layers = [("some, spread over the depth", ""), *((name, name) for name in dynamic.layers)]
            layer = gr.Dropdown(layers, value="", label=f"Attentions of {dynamic.classifier.name}: layer")
            picture = gr.HTML()
            for changed in (answered.then, layer.change):
                changed(draw, [image, layer], picture, **raw)
    return page.queue(max_size=20, default_concurrency_limit=1)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; nothing leaves this machine."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MEGABYTES * 2**20,
        max_threads=4,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", font=FONTS),
        css_paths=Path(__file__).with_name("page.css"),
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port} is open; Ctrl-C closes it.", flush=True)
    page.block_thread()
