"""The page in headless Chromium, on the embedded model: what visitors do, by mouse and by keyboard."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")

from browsing import Browser, Keys
from data_video import write_video
from served_page import Served

from playground.drawing import EDGE
from visionzip.methods import METHODS

SIDE = 12  # patches


def test_a_visit(browser: Browser, ring: Path):
    browser.upload(ring)
    browser.wait(lambda: browser.kept() == 26)  # 32 tokens: CLS, 26 patches, 5 contextual ones
    browser.ask("What color is the ring?")
    assert browser.answers() == [("yellow", "yellow")]
    assert browser.figure("vanilla", "visual tokens") == "144" and browser.figure("zipped", "visual tokens") == "32"

    slider = browser.one("#vz-controls input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT * 16)  # by keyboard
    browser.wait(lambda: browser.kept() == 12)  # 16 tokens: CLS, 12 patches, 3 contextual ones
    browser.until("answered again", lambda: browser.press("Ask again"))
    assert browser.figure("zipped", "visual tokens") == "16"
    assert len(browser.answers()) == 1

    browser.ask("Which shape is white?")  # the second turn feeds no image
    assert int(browser.figure("vanilla", "cached tokens")) > 144
    assert 16 < int(browser.figure("zipped", "cached tokens")) < 144
    assert browser.answers()[1][0] == "square"

    choose_method(browser, "uniform")
    browser.wait(lambda: browser.kept() == 16)
    browser.until("answered again", lambda: browser.press("Ask again"))
    assert "uniform" in browser.all("article.zipped h4")[-1].text
    assert int(browser.figure("zipped", "cached tokens")) == 0
    assert not browser.elsewhere()
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_video(browser: Browser, tmp_path: Path):
    """A strip of its frames, one of them large; a broken file, or too many frames, is one line."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    browser.upload(tmp_path / "broken.mp4", kind="videos")
    browser.wait(lambda: browser.status().startswith("broken.mp4 is no video of the formats MP4, WebM and GIF"))
    write_video(str(tmp_path / "clip.mp4"), "libx264", [10 + 20 * at for at in range(9)])
    number = browser.one("#vz-number input")
    number.send_keys("8")  # behind the 8 that stands there
    browser.upload(tmp_path / "clip.mp4", kind="videos")
    browser.wait(lambda: browser.status() == "88 frames of each video are outside 1 to 32")
    number.send_keys(Keys.BACKSPACE)
    browser.upload(tmp_path / "clip.mp4", kind="videos")
    browser.wait(lambda: len(browser.all(".vz-frames button")) == 8 and browser.kept() == 26)
    assert browser.status() == "8 frames of clip.mp4 for the next question"
    browser.click("css selector", ".vz-frames [data-frame='2']")
    pressed = [each.get_attribute("data-frame") for each in browser.all(".vz-frames [aria-pressed=true]")]
    assert pressed == ["2"] and browser.one(".vz-caption").text.startswith("Frame 3 of 8")
    assert len(browser.all(".vz-frames [data-frame='7'] rect[fill-opacity='0']")) == browser.kept() == 26
    browser.ask("What is shown?")
    figures = [browser.figure(slot, name) for slot in ("vanilla", "zipped") for name in ("per frame", "visual tokens")]
    assert figures == ["144", "1152", "32", "256"]
    assert not browser.hurdles()


def choose_method(browser: Browser, name: str) -> None:
    field = browser.field("Method")
    field.click()
    browser.click("xpath", f"//*[@role='option'][contains(., '{name}')]")


def test_tokens_picked_by_hand(browser: Browser, ring: Path):
    browser.upload(ring)
    browser.wait(lambda: browser.kept() == 26)
    browser.ask("What color is the ring?")
    browser.show("Pick by hand")
    browser.press("Drop all")
    for patch in (3, 4, 5):
        browser.one(f".vz-patches [data-patch='{patch}']").click()
    patches = browser.one(".vz-patches")  # and by keyboard: from patch 5 one down, which is 17
    patches.send_keys(Keys.ARROW_DOWN, Keys.SPACE)
    assert "4 of 144 patches picked by hand" in browser.one(".vz-count").text
    assert "row 2, column 6" in browser.info() and "picked by hand" in browser.info()
    browser.until("answered again", lambda: browser.press("Ask again"))
    assert browser.figure("zipped", "visual tokens") == "4"
    assert browser.answers()[0][0] == "yellow" != browser.answers()[0][1]
    browser.press("Back to the method")
    browser.wait(lambda: browser.kept() >= 26)
    browser.until("answered again", lambda: browser.press("Ask again"))
    assert browser.figure("zipped", "visual tokens") == "32"
    assert browser.answers() == [("yellow", "yellow")]


def test_patches_lie_on_the_image(browser: Browser, tmp_path: Path):
    """Of a wide image the embedded model sees the square in the middle: there are its patches on the screen too."""
    Image.new("RGB", (4 * EDGE, EDGE), "gray").save(tmp_path / "wide.png")
    browser.upload(tmp_path / "wide.png")
    browser.wait(lambda: len(browser.all(".vz-patches [data-patch]")) == SIDE**2)
    row, column = 7, 10
    places = [".vz-patches image", f".vz-patches [data-patch='{row * SIDE + column}']"]
    boxes = "return arguments[0].map((each) => document.querySelector(each).getBoundingClientRect().toJSON())"
    sides = ("x", "y", "width", "height")
    found = [[box[side] for side in sides] for box in browser.driver.execute_script(boxes, places)]
    (left, top, width, height), (x, y, wide, high) = found
    assert width / height == pytest.approx(4, rel=0.01)
    patch = height / SIDE
    assert (x - left, y - top) == pytest.approx(((width - height) / 2 + column * patch, row * patch), abs=1.5)
    assert (wide, high) == pytest.approx((patch, patch), abs=1.5)


def test_layers_and_groups(browser: Browser):
    browser.example("5: layers")
    name = browser.one(".vz-layer-name")
    assert name.text == "Encoder layer 1 of 6"
    colors = [each.get_attribute("fill") for each in browser.all(".vz-patches [data-patch]")]
    browser.one(".vz-layer").send_keys(Keys.ARROW_RIGHT * 4)
    assert name.text == "Encoder layer 5 of 6, which decides"
    assert colors != [each.get_attribute("fill") for each in browser.all(".vz-patches [data-patch]")]
    browser.show("Merged groups")
    assert len(browser.all(".vz-patches rect.target")) == 5
    assert len({each.get_attribute("fill") for each in browser.all(".vz-patches [fill^=hsl]")}) == 5


def test_what_a_patch_attends_to(browser: Browser, ring: Path):
    """Figure 14: the picture follows the pointer; and on another image, where the visitor asks for it."""

    def colors() -> list[str]:
        return [each.get_attribute("fill") for each in browser.all(".vz-patches [data-patch]")]

    browser.example("14: misalignment")
    assert len(browser.all(".vz-patches rect.dominant")) == 26
    before = colors()
    patches = browser.one(".vz-patches")
    patches.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)  # from the first patch one down
    assert re.fullmatch(r"row 2, column 1 · attends most to row \d+, column \d+, which is kept", browser.info())
    assert "of this patch's attention" in browser.one(".vz-share").text and colors() != before
    browser.upload(ring)
    browser.wait(lambda: len(browser.all(".vz-images img")) == 2)
    browser.wait(lambda: len(browser.all(".vz-patches rect.dominant")) == 26)
    browser.show("Kept")
    browser.wait(lambda: browser.kept() == 26)


def test_compare(browser: Browser):
    browser.example("1: fewer tokens")
    browser.click("css selector", "button[role=tab]:nth-of-type(2)")
    browser.press("Compare all methods at this budget")
    every = len(METHODS) + 1  # and vanilla
    browser.wait(lambda: browser.status().startswith(f"{every} of {every}"))
    cells = [each.text.split("\n")[:2] for each in browser.all(".vz-strip li")]
    assert len(cells) == every and ["vanilla", "yellow"] in cells and ["visionzip", "yellow"] in cells


def test_two_tabs_at_once(browser: Browser, ring: Path):
    first = browser.driver.current_window_handle
    browser.upload(ring)
    browser.driver.switch_to.new_window("tab")
    try:
        browser.open()
        browser.press("2: attention")
        browser.wait(lambda: browser.answers() == [("K", "K")] and browser.status() == "answered")
        browser.driver.switch_to.window(first)
        browser.wait(lambda: browser.kept() == 26)
        assert not browser.answers()
        browser.ask("What color is the ring?")
        assert browser.answers() == [("yellow", "yellow")]
    finally:
        for handle in set(browser.driver.window_handles) - {first}:
            browser.driver.switch_to.window(handle)
            browser.driver.close()
        browser.driver.switch_to.window(first)


def ramble(browser: Browser) -> None:
    """Ask what the model answers with 1900 words: there is time to do something meanwhile."""
    browser.field("Question").send_keys("a a a a a a" + Keys.ENTER)
    browser.wait(lambda: len(browser.one("article.vanilla .vz-answer").text.split()) > 3)


def test_stop(browser: Browser, ring: Path):
    ramble(browser)
    browser.press("Stop")
    browser.wait(lambda: browser.status() == "stopped: the conversation is as it was before this question")
    assert not browser.answers()
    browser.field("Question").clear()
    browser.upload(ring)
    browser.wait(lambda: browser.kept() == 26)
    browser.ask("What color is the ring?")
    assert browser.answers() == [("yellow", "yellow")]
    browser.press("Stop")  # nothing is running any more: the line stays what it is
    time.sleep(1)
    assert browser.status() == "answered"


def test_a_new_conversation_ends_an_answer(browser: Browser, ring: Path):
    ramble(browser)
    browser.press("New")
    browser.wait(lambda: not browser.status() and "Both answers" in browser.one("#vz-talk").text)
    browser.upload(ring)
    browser.wait(lambda: browser.kept() == 26)
    browser.ask("What color is the ring?")
    assert browser.answers() == [("yellow", "yellow")]


def test_an_example_ends_an_answer(browser: Browser):
    ramble(browser)
    browser.press("2: attention")
    browser.wait(lambda: browser.answers() == [("K", "K")] and browser.status() == "answered")


def test_waiting_for_others(browser: Browser):
    """The place in the queue is shown; Stop ends a question that waits at once, not when its turn comes."""
    first = browser.driver.current_window_handle
    ramble(browser)
    browser.driver.switch_to.new_window("tab")
    try:
        browser.open()
        browser.press("2: attention")
        browser.wait(lambda: browser.place().startswith("queue: 1/1"))
        assert browser.status() == "waiting for the model …"
        assert not browser.hurdles()
        browser.press("Stop")
        browser.wait(lambda: browser.status().startswith("stopped") and not browser.place())
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)
    assert browser.status().startswith("answering")
    browser.press("Stop")
    browser.wait(lambda: browser.status().startswith("stopped"))


def test_files_that_are_no_images(browser: Browser, ring: Path, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(ring.read_bytes()[:300])
    browser.upload(tmp_path / "broken.png")
    browser.wait(lambda: "broken.png is not a readable image" in browser.status())
    assert browser.one("#vz-line [role=alert]").is_displayed()
    (tmp_path / "fat.png").write_bytes(bytes(11 * 2**20))
    browser.upload(tmp_path / "fat.png")  # refused before it is sent
    browser.wait(
        lambda: browser.one(".vz-drop-images + .vz-error").text.startswith("fat.png has 11.0 MB, more than 10")
    )
    browser.upload(ring)
    browser.wait(lambda: browser.kept() == 26 and browser.status() == "1 image for the next question")


def test_everything_has_a_name(browser: Browser):
    """What a screen reader is told: no control without a name; headings and live regions are there."""
    browser.example("2: attention")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    controls = {"button", "slider", "textbox", "combobox", "radio", "tab", "spinbutton", "application", "checkbox"}
    found = [(role, name) for role, name in nodes if role in controls]
    assert {role for role, _ in found} >= {"button", "slider", "textbox", "radio", "tab", "application"}
    assert not [role for role, name in found if not name.strip()]
    assert ("heading", "VisionZip") in nodes
    assert browser.all("#vz-line [aria-live=polite]") and browser.all(".vz-info[aria-live=polite]")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hurdles(browser: Browser, theme: str):
    """None, whatever is shown."""
    browser.open(f"?__theme={theme}")
    browser.example("14: misalignment")
    assert not browser.hurdles()
    browser.show("Pick by hand")
    browser.click("css selector", "button.label-wrap")  # more of the method
    browser.click("css selector", "button[role=tab]:nth-of-type(2)")
    browser.press("Compare all methods at this budget")
    browser.wait(lambda: len(browser.all(".vz-strip li")) == len(METHODS) + 1)
    assert not browser.hurdles()
    browser.upload(Path(__file__))  # no image
    browser.wait(lambda: browser.all("#vz-line [role=alert]"))
    assert not browser.hurdles()


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Served):
    browser = Browser(page, 390, 844)
    try:
        browser.example("1: fewer tokens")
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.driver.quit()
