"""What stands behind the page: the command's pictures, from a pipeline that is loaded once."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_core import LowrankError, UsageError
from lowrank_diffusion.infer.desk import Desk, Fields
from lowrank_diffusion.infer.request import Request
from lowrank_diffusion.infer.studio import Drawn, Studio, means_of

FIELDS = Fields(
    prompt="a red circle on a blue background",
    negative="",
    weights=(),
    steps=2,
    guidance=5.0,
    scheduler=None,
    images=1,
    width=64,
    height=64,
    seed=0,
)


class Pretended:
    """Draws empty files."""

    usual_size = (1024, 768)

    def __init__(self):
        self.asked = []

    def draw(self, request, out, told):
        self.asked.append(request)
        files = [out / f"{n}.png" for n in range(request.images) if told.go_on(n / request.images)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return Drawn(out, files, None, "tiny", [], [], {})


@pytest.fixture
def desk(tmp_path):
    return Desk(Pretended(), Request([Path("pets")], [], precision="bf16", batch=2), tmp_path / "out", print)


def test_fields_become_the_request_that_the_command_makes(desk):
    assert desk.size == (1024, 768)
    values = {"negative": "grey", "weights": (0.5,), "scheduler": "euler", "images": 2, "height": 32, "seed": 9}
    desk.draw(replace(FIELDS, **values))
    desk.draw(replace(FIELDS, prompt=None))
    assert desk.studio.asked == [
        Request(
            [Path("pets")],
            [FIELDS.prompt],
            weights=(0.5,),
            negative="grey",
            seed=9,
            images=2,
            size="64x32",
            steps=2,
            scheduler="euler",
            batch=2,
            precision="bf16",
        ),
        Request([Path("pets")], [""], size="64x64", steps=2, batch=2, precision="bf16"),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 60}, "--size takes multiples of 8, from 16, got 60x64"),
        ({"height": -64}, "--size is WIDTHxHEIGHT, such as 1024x768, got '64x-64'"),
        ({"images": 0}, "--images must be at least 1, got 0"),
        ({"seed": 2**32}, "--seed must be from 0 to 4294967295, got 4294967296"),
        ({"scheduler": "eular"}, "--scheduler is one of ddim, ddpm"),
        ({"steps": None}, "the field steps is empty; put a number there"),
        ({"weights": (1.0, None)}, "the field weight is empty; put a number there"),
    ],
)
def test_a_mistake_in_a_field_is_the_commands_sentence(desk, values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        desk.draw(replace(FIELDS, **values))
    assert desk.studio.asked == []


def test_each_drawing_has_a_folder_of_its_own_and_a_stop_keeps_what_is_done(desk):
    three = replace(FIELDS, images=3)
    assert desk.draw(FIELDS).out == desk.out / "001"
    stopped = desk.draw(three, progress=lambda share: share and desk.stop())
    assert (stopped.out, stopped.images, stopped.wanted) == (desk.out / "002", [desk.out / "002" / "0.png"], 3)
    # A drawing that came to nothing leaves its folder's name to the next.
    assert desk.draw(three, progress=lambda share: desk.stop()).images == []
    assert (desk.draw(three).out.name, len(desk.draw(three).images)) == ("003", 3)


def test_a_closed_desk_ends_its_drawing_and_begins_no_other(desk):
    assert len(desk.draw(replace(FIELDS, images=3), progress=lambda share: share and desk.close()).images) == 1
    with pytest.raises(LowrankError, match="the server is ending, so nothing more is drawn"):
        desk.draw(FIELDS)


@pytest.fixture(scope="module")
def open_desk(made, tmp_path_factory):
    """`open_desk("lora", merged=False)`"""

    def open_desk(*adapters, **given):
        request = Request([made.folder / each for each in adapters], [], base=made.base, device="cpu", **given)
        studio = Studio(means_of(request, print), request, lambda text: None, once=False)
        return Desk(studio, request, tmp_path_factory.mktemp("desk") / "out", lambda text: None)

    return open_desk


def contents(files):
    """Pixels and recipes alike."""
    return [(path.name, path.read_bytes()) for path in files]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_desk_writes_the_commands_files_whatever_it_drew_before(draw, open_desk):
    desk = open_desk("lora.safetensors", "loha")
    values = {"negative": "grey", "images": 2, "seed": 7, "guidance": 3.5, "scheduler": "euler-a"}
    first, second = [
        contents(draw("lora.safetensors", "loha", weights=weights, size="64x48", **values)[1].images)
        for weights in [(1.0, 1.0), (0.05, 1.5)]
    ]
    for weights, expected in [((1.0, 1.0), first), ((0.05, 1.5), second), ((1.0, 1.0), first)]:
        assert contents(desk.draw(replace(FIELDS, height=48, weights=weights, **values)).images) == expected
        with pytest.raises(LowrankError, match="came out as NaN"):
            desk.draw(replace(FIELDS, weights=(1e30, 1.0), steps=1))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_strength_decides_anew_whether_adapters_are_merged(draw, open_desk):
    desk = open_desk("loha", precision="bf16")
    for weight, merged in [(1.0, True), (0.01, False)]:
        drawn = desk.draw(replace(FIELDS, weights=(weight,)))
        _, result, _ = draw("loha", weights=[weight], precision="bf16")
        assert set(result.merged.values()) == {merged}
        assert contents(drawn.images) == contents(result.images)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_stop_between_steps_drops_the_picture_and_not_the_next_drawing(draw, open_desk):
    desk = open_desk("loha")
    shares = []

    def progress(share):
        shares.append(share)
        if share > 0.5:
            desk.stop()

    values = replace(FIELDS, weights=(1.0,), images=2, steps=4)
    stopped = desk.draw(values, progress)
    assert shares == [0.125, 0.25, 0.375, 0.5, 0.625]
    _, result, _ = draw("loha", images=2, steps=4)
    assert contents(stopped.images) == contents(result.images)[:1]
    assert contents(desk.draw(values).images) == contents(result.images)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_base_alone_draws_what_adapters_of_weight_0_draw(draw, open_desk):
    import numpy as np
    from PIL import Image

    drawn = open_desk().draw(FIELDS)
    (picture,), _, _ = draw("loha", weights=[0.0])
    assert (np.asarray(Image.open(drawn.images[0]), dtype=int) == picture).all()
