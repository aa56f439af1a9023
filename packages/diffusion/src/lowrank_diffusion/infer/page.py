"""The page that `lowrank infer --serve` shows."""

import math
import secrets
from typing import Any

import gradio as gr
from gradio.themes import Default, Font

from lowrank_core.errors import LowrankError
from lowrank_diffusion.infer.desk import Desk, Drawing, Fields
from lowrank_diffusion.infer.schedulers import SAMPLERS

STYLE = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important}
#pictures .grid-wrap {overflow-y: auto}
"""


def theme() -> Default:
    """Gradio's own, in the fonts of the system, so that browsers fetch none."""
    return Default(font=[Font("system-ui"), Font("sans-serif")], font_mono=[Font("ui-monospace"), Font("monospace")])


def make_page(desk: Desk) -> gr.Blocks:
    """The page over a desk. Its fields start at the command line's values."""
    start, sources = desk.start, desk.studio.means.sources
    with gr.Blocks(title="lowrank", analytics_enabled=False) as page:
        names = " + ".join(source.name for source in sources)
        gr.Markdown(f"## {names} on {desk.studio.base_name}" if names else f"## {desk.studio.base_name}")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=380):
                prompt = gr.Textbox(start.prompts[0] if start.prompts else "", label="Prompt", lines=2)
                negative = gr.Textbox(start.negative or "", label="Negative prompt", lines=1)
                sliders = [
                    gr.Slider(min(0, weight), max(2, weight), weight, step=0.05, label=f"Strength of {source.name}")
                    for source, weight in zip(sources, start.weights or [1.0] * len(sources), strict=True)
                ]
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", scale=2)
                    stop = gr.Button("Stop", scale=1)
                with gr.Row():
                    images = _whole("Pictures", start.images)
                    steps = _whole("Steps", start.steps)
                    guidance = gr.Number(start.guidance, label="Guidance", step=0.5, min_width=100)
                with gr.Row():
                    wide, high = _whole("Width", desk.size[0]), _whole("Height", desk.size[1])
                    choices = [("the base's", ""), *((name, name) for name in SAMPLERS)]
                    scheduler = gr.Dropdown(choices, value=start.scheduler or "", label="Scheduler", min_width=100)
                with gr.Row():
                    seed = _whole("Seed", start.seed)
                    another = gr.Checkbox(label="Another seed each time", min_width=200, scale=2)
                said = gr.Markdown()
            with gr.Column(scale=3, min_width=420):
                gallery = gr.Gallery(
                    show_label=False,
                    object_fit="contain",
                    height=720,
                    buttons=["download", "fullscreen"],
                    elem_id="pictures",
                )

        def draw(
            prompt: str,
            negative: str,
            steps: int | None,
            guidance: float | None,
            images: int | None,
            scheduler: str,
            width: int | None,
            height: int | None,
            seed: int | None,
            another: bool,
            *weights: float | None,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, str, int | None]:
            if another:
                seed = secrets.randbits(32)
            values = Fields(prompt, negative, weights, steps, guidance, scheduler or None, images, width, height, seed)
            try:
                drawing = desk.draw(values, lambda share: progress(share, desc="drawing"))
            except LowrankError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None
            columns = math.ceil(math.sqrt(len(drawing.images))) or 1
            return gr.Gallery([str(path) for path in drawing.images], columns=columns), _said(drawing, seed), seed

        inputs = [prompt, negative, steps, guidance, images, scheduler, wide, high, seed, another, *sliders]
        outputs = [gallery, said, seed]
        gr.on(
            [button.click, prompt.submit],
            draw,
            inputs,
            outputs,
            api_visibility="private",
            show_progress_on=gallery,
            concurrency_limit=1,
        )
        stop.click(desk.stop, queue=False, api_visibility="private")
    return page


def _whole(label: str, value: int) -> gr.Number:
    return gr.Number(value, label=label, precision=0, min_width=100)


def _said(drawing: Drawing, seed: int | None) -> str:
    done, wanted = len(drawing.images), drawing.wanted
    if done < wanted:
        return f"Stopped after {done} of {wanted} pictures, {drawing.seconds:.1f} seconds"
    pictures = "1 picture" if done == 1 else f"{done} pictures"
    return f"{pictures} in {drawing.seconds:.1f} seconds, seed {seed}, in `{drawing.out}`"
