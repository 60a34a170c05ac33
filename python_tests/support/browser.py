"""A headless browser for tests: ``python browser.py URL PICTURE STEPS`` opens a page, goes through the steps, and
prints what they found as JSON.

STEPS is a JSON list of JavaScript expressions. Each is evaluated again and again until it is neither false nor null,
and then the next one is. The engine is Chromium as PyQt6-WebEngine packs it, without a display and without a GPU.
"""

import json
import os
import sys

POLL_MILLISECONDS, TIMEOUT_MILLISECONDS = 50, 90_000
SIZE = (1000, 900)


def main(url: str, picture: str, steps: list[str]) -> int:
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--disable-gpu --no-sandbox --single-process")
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            complaints.append(f"{message} ({source}:{line})")

    complaints: list[str] = []
    found: list = []
    app = QApplication(sys.argv)
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(*SIZE)

    def ask() -> None:
        page.runJavaScript(f"JSON.stringify(({steps[len(found)]}) ?? null)", heard)

    def heard(text: str | None) -> None:
        value = json.loads(text or "null")
        if value is None or value is False:
            QTimer.singleShot(POLL_MILLISECONDS, ask)
            return
        found.append(value)
        if len(found) < len(steps):
            ask()
        else:
            QTimer.singleShot(500, finish)  # what was found may not have been painted yet

    def finish() -> None:
        view.grab().save(picture)
        print(json.dumps({"found": found, "complaints": complaints}), flush=True)
        os._exit(0)  # Chromium in one process does not end cleanly

    def late() -> None:
        print(f"step {len(found)} did not come true: {steps[len(found)]}; {complaints}", file=sys.stderr, flush=True)
        os._exit(1)

    page.loadFinished.connect(lambda is_loaded: ask() if is_loaded else late())
    page.load(QUrl(url))
    view.show()
    QTimer.singleShot(TIMEOUT_MILLISECONDS, late)
    return app.exec()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
