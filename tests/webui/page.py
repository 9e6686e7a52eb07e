"""FastChat's page as a user sees it: fields, buttons and the chat, by their visible names."""

from __future__ import annotations

from playwright.sync_api import Page, Request, expect

SETTLE_MS = 500

# Called for every change of the page: keeps each state of the last answer.
RECORD_ANSWERS = """() => {
    window.answers = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll('#chatbot [data-testid="bot"]');
        const last = answers.length ? answers[answers.length - 1].innerText.trim() : "";
        if (last && window.answers.at(-1) !== last) window.answers.push(last);
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


class ChatPage:
    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self._pending: set[Request] = set()
        page.on("request", lambda request: self._pending.add(request) if "/queue/" in request.url else None)
        for ended in ("requestfinished", "requestfailed"):
            page.on(ended, lambda request: self._pending.discard(request))
        page.goto(url)
        self.question = page.get_by_placeholder("Enter your prompt")
        self.model = page.get_by_label("Dropdown")
        self.regenerate = page.get_by_role("button", name="Regenerate")
        self.clear = page.get_by_role("button", name="Clear history")
        self.answers = page.locator('#chatbot [data-testid="bot"]')
        self.questions = page.locator('#chatbot [data-testid="user"]')
        self.wait_loaded()

    def wait_loaded(self) -> None:
        """Wait for the list of models. Its arrival chooses a model, and that empties all fields once more."""
        expect(self.model).not_to_have_value("")
        self.page.wait_for_timeout(SETTLE_MS)
        while self._pending:
            self.page.wait_for_timeout(SETTLE_MS)

    def send(self, question: str) -> None:
        """Type a question and press Enter, and do not wait for the answer."""
        self.question.fill(question)
        self.question.press("Enter")
        expect(self.questions.last).to_have_text(question)

    def wait(self) -> str:
        """Return the answer once it is complete: the buttons below it work only then."""
        expect(self.clear).to_be_enabled()
        return self.answers.last.inner_text().strip()

    def ask(self, question: str) -> str:
        self.send(question)
        return self.wait()

    def set_parameter(self, name: str, value: float) -> None:
        field = self.page.get_by_label(f"number input for {name}")
        if not field.is_visible():
            self.page.get_by_text("Parameters").click()
        field.fill(str(value))
        field.press("Enter")

    def models(self) -> list[str]:
        """The names in the list of models."""
        self.model.click()
        names = [option.strip() for option in self.page.get_by_role("option").all_inner_texts()]
        self.model.press("Escape")
        return [name.removeprefix("✓").strip() for name in names]

    def record_answers(self) -> None:
        self.page.evaluate(RECORD_ANSWERS)

    def recorded_answers(self) -> list[str]:
        states: list[str] = self.page.evaluate("window.answers")
        return states
