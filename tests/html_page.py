"""A page of HTML, read strictly."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page that is well formed: every element closed in order. Keeps tags with attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str, kind: str = "") -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag and kind in ["", *attrs.get("class", "").split()]]
