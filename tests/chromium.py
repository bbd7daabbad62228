"""What browser tests share: the size and scheme of the window, what it asked for, and where screenshots land."""

import base64
import json

from srlm_utils.paths import RESULTS

SHOTS = RESULTS / "test-browser"
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


def look(browser, width: int = 1280, scheme: str = "light", height: int = 1000) -> None:
    """Give the window a size in pixels and tell pages which scheme the reader prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def shoot(browser, name: str) -> None:
    """Save what the window shows. Webdriver's own screenshots give up after ten seconds: too few on a busy machine."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    (SHOTS / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))


def requested(browser) -> list[str]:
    """Addresses asked for since the last call."""
    events = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def faults(browser) -> list[str]:
    """What the console called an error since the last call."""
    found = [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]
    # JupyterLab asks a kernel's debugger for its state while the kernel restarts, and calls its own hurry an error
    return [message for message in found if "Could not restore the debugger state" not in message]
