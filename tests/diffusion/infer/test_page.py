"""The page as its users have it: the command, its answers over HTTP, and a browser."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

# The command, which writes down whom it calls: Python's audit hooks see every connection and every name looked up.
COMMAND = """
import sys
calls = open(sys.argv.pop(1), "a", buffering=1)
def heard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(event, arguments, file=calls)
sys.addaudithook(heard)
from lowrank_cli.main import main
main()
"""
VALUES = {"prompts": ["a red circle"], "steps": 3, "images": 2, "seed": 5, "weights": [0.35]}


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """The address of the page over a LoHa, and the folder of its pictures; ends as Ctrl-C ends it."""
    folder = tmp_path_factory.mktemp("page")
    options = ["infer", str(made.folder / "loha"), "--base", made.base, "--device", "cpu", "--size", "64"]
    options += ["--serve", "--port", "0", "--out", str(folder / "out"), "--json", "--prompt", "a red circle"]
    options += ["--images", "2", "--steps", "3", "--seed", "5"]
    command = [sys.executable, "-c", COMMAND, str(folder / "calls"), *options]
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            line = process.stdout.readline()
            assert line, (folder / "said").read_text()
            assert json.loads(line)["out"] == str(folder / "out")
            url = json.loads(line)["url"]
            yield url, folder / "out"
            # A drawing that would go on for minutes.
            join(url, {"steps": 5000})
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
            ended = (folder / "said").read_text()
            assert "interrupted" in ended.splitlines()
            assert "Traceback" not in ended
        finally:
            process.kill()
    # The only one it looked up or called is this machine, where it listens.
    calls = (folder / "calls").read_text().splitlines()
    assert calls
    assert [call for call in calls if "127.0.0.1" not in call] == []


def ask(url, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)
    return urllib.request.urlopen(request, timeout=120)


def join(url, changes):
    """Press the first button as the page's own code does, with the fields as they stand but for `changes`."""
    with ask(f"{url}/config") as answer:
        config = json.load(answer)
    held = {each["id"]: each["props"] for each in config["components"]}
    button = config["dependencies"][0]
    labels = [held[each]["label"].lower() for each in button["inputs"]]
    assert set(changes) <= set(labels)
    data = [changes.get(label, held[each]["value"]) for label, each in zip(labels, button["inputs"], strict=True)]
    ask(f"{url}/gradio_api/queue/join", {"data": data, "fn_index": button["id"], "session_hash": "test"}).close()


def heard(url):
    """What the page gets for it, as it comes."""
    with ask(f"{url}/gradio_api/queue/data?session_hash=test") as answer:
        yield from (json.loads(line.removeprefix(b"data: ")) for line in answer if line.strip())


def pressed(url, **changes):
    """What comes of it."""
    join(url, changes)
    return next(event["output"] for event in list(heard(url)) if event["msg"] == "process_completed")


def test_over_http(page, draw):
    url, out = page
    _, result, _ = draw("loha", **VALUES)
    gallery, sentence, seed = pressed(url, **{"strength of loha": 0.35})["data"]
    assert seed == 5
    (folder,) = out.iterdir()
    assert re.fullmatch(rf"2 pictures in \d+\.\d seconds, seed 5, in `{re.escape(str(folder))}`", sentence)
    for file, shown in zip(result.images, gallery["value"], strict=True):
        with ask(shown["image"]["url"]) as answer:
            # What a browser would save has the recipe, too.
            assert answer.read() == (folder / file.name).read_bytes() == file.read_bytes()
    failed = pressed(url, width=60)
    assert failed["error"] == "--size takes multiples of 8, from 16, got 60x64"
    gallery, sentence, seed = pressed(url, pictures=1, **{"another seed each time": True})["data"]
    assert sentence.startswith("1 picture in ")
    assert seed != 5
    with ask(gallery["value"][0]["image"]["url"]) as answer:
        assert json.loads(Image.open(answer).text["lowrank"])["seed"] == seed


def test_the_stop_button(page):
    url, _ = page
    join(url, {"steps": 5000})
    for event in heard(url):
        if event["msg"] == "progress":
            ask(f"{url}/gradio_api/run/stop", {"data": [], "session_hash": "test"}).close()
        if event["msg"] == "process_completed":
            _, sentence, _ = event["output"]["data"]
    assert sentence.startswith("Stopped after 0 of 2 pictures, ")


def test_another_sites_name_for_this_machine_is_refused(page):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(page[0], Host="pictures.example")


@pytest.fixture
def browser(tmp_path):
    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and chromedriver, which are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += f"--disable-component-update --disable-sync --window-size=1280,900 --user-data-dir={tmp_path / 'profile'}"
    for flag in flags.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_in_a_browser(page, browser, draw):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    url, _ = page
    wait = WebDriverWait(browser, 60)

    def find(path):
        return wait.until(lambda browser: browser.find_elements(By.XPATH, path))

    browser.get(url)
    slider = find("//input[@type='range' and contains(@aria-label, 'Strength of loha')]")[0]
    # Two arrow keys are two steps of 0.05.
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    find("//button[normalize-space()='Draw']")[0].click()
    find("//*[contains(text(), '2 pictures in ')]")
    pictures = find("//*[@id='pictures']//img")
    _, result, _ = draw("loha", **VALUES | {"weights": [0.9]})
    for file, shown in zip(result.images, pictures, strict=True):
        # Pixels as the browser decodes them.
        pixels = browser.execute_async_script(PIXELS, shown)
        expected = np.asarray(Image.open(file).convert("RGBA"))
        assert pixels == expected.ravel().tolist()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Chromium's own start page is not ours.
    urls = {each["request"]["url"] for each in asked if not each["documentURL"].startswith("chrome:")}
    assert {Path(each).suffix for each in urls} >= {".js", ".css", ".png"}
    assert [each for each in urls if not each.startswith((f"{url}/", "data:", "blob:"))] == []


PIXELS = """
const [shown, done] = arguments;
const canvas = document.createElement("canvas");
const draw = () => {
    [canvas.width, canvas.height] = [shown.naturalWidth, shown.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(shown, 0, 0);
    done([...context.getImageData(0, 0, canvas.width, canvas.height).data]);
};
shown.complete ? draw() : shown.addEventListener("load", draw);
"""
