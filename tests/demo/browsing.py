"""The page in a headless Chromium; without one, or without Selenium, the tests that import this are skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from served_page import Served

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
exceptions = pytest.importorskip("selenium.common.exceptions")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium with chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)

Keys = webdriver.Keys
PATIENCE = 60  # seconds: other tests run beside these


class Browser:
    """A headless Chromium that shows the page."""

    def __init__(self, page: Served, width: int = 1280, height: int = 800) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        quiet = ("disable-background-networking", "disable-component-update", "no-first-run", "disable-sync")
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", *quiet):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.page = page
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.open()

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.page.address}/{query}")
        self.wait(lambda: self.all(".vz-drop-images input:enabled"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """What a condition returns as soon as it is something; parts that are not there, or not any more, are none."""
        end, found = time.monotonic() + PATIENCE, None
        while not found and time.monotonic() < end:
            with suppress(exceptions.WebDriverException, IndexError, StopIteration):
                found = condition()
            time.sleep(0 if found else 0.1)
        assert found, f"waited {PATIENCE} s; the page says {self.status()!r}"
        return found

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, how: str, where: str) -> None:
        """Click on something as soon as it can be clicked on."""

        def clicked() -> bool:
            found = self.driver.find_element(how, where)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
            found.click()
            return True

        self.wait(clicked)

    def press(self, words: str) -> None:
        """A button, by what is on it."""
        self.click("xpath", f"//button[normalize-space()='{words}']")

    def until(self, line: str, act: Callable[[], Any]) -> None:
        """Do something, and wait for a line that is newer than that."""
        mark = "document.querySelector('#vz-line p')?.setAttribute('data-old', '')"
        self.driver.execute_script(mark)
        act()
        self.wait(lambda: not self.all("#vz-line p[data-old]") and self.status() == line)

    def upload(self, *files: Path, kind: str = "images") -> None:
        self.one(f".vz-drop-{kind} input").send_keys("\n".join(map(str, files)))

    def field(self, label: str) -> Any:
        path = f"//label[.//span[normalize-space()='{label}']]//textarea | //input[@aria-label='{label}']"
        return self.wait(
            lambda: next(field for field in self.driver.find_elements("xpath", path) if field.is_displayed())
        )

    def ask(self, question: str) -> None:
        self.until("answered", lambda: self.field("Question").send_keys(question + Keys.ENTER))
        self.wait(lambda: not self.field("Question").get_attribute("value"))  # there is room for the next one

    def example(self, label: str) -> None:
        """One of the paper's figures, and its answers."""
        self.until("answered", lambda: self.press(label))

    def answers(self) -> list[tuple[str, str]]:
        words = [each.text for each in self.all("#vz-talk .vz-answer")]
        return list(zip(words[::2], words[1::2], strict=True))

    def figure(self, slot: str, name: str) -> str:
        """A figure under the last answer of a side, such as ``32``, without the difference."""
        path = f"(//article[contains(@class, '{slot}')])[last()]//div[dt='{name}']/dd"
        return self.driver.find_element("xpath", path).text.split()[0]

    def status(self) -> str:
        return self.one("#vz-line [aria-live]").text.strip()

    def place(self) -> str:
        """Gradio's words on the queue, beside the status."""
        return self.one("#vz-line .wrap").text.strip()

    def kept(self) -> int:
        """Patches that the picture shows as they are."""
        return len(self.all(".vz-patches rect[fill-opacity='0']"))

    def info(self) -> str:
        """The line on the patch under the pointer."""
        return self.one(".vz-info").text.strip()

    def show(self, view: str) -> None:
        self.click("xpath", f"//*[contains(@class, 'vz-views')]//span[.='{view}']")

    def hurdles(self) -> list[str]:
        """What axe-core finds against WCAG and good practice in what is shown now: contrast, names, order, roles."""
        axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is not installed (extra dev)")
        found = axe.Axe().run(self.driver)
        texts = next(rule for rule in found["passes"] if rule["id"] == "color-contrast")
        assert len(texts["nodes"]) > 25
        nodes = [(rule["id"], node) for rule in found["violations"] for node in rule["nodes"]]
        return [f"{name}: {node['html'][:200]} {node['failureSummary']}" for name, node in nodes]

    def elsewhere(self) -> list[str]:
        """Addresses that were asked for and are not the page's server."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        assert any(url.startswith(self.page.address) for url in urls)
        return [url for url in urls if not url.startswith((self.page.address, "data:", "blob:"))]
