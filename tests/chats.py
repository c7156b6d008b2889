"""A chat template for the tiny bundles."""

import json

from dfssm.targets.bundle import MANIFEST, file_entry, sealed

TEMPLATE = (
    "{% for t in tools or () %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def add_template(bundle, text=TEMPLATE):
    """The bundle, with a chat template."""
    (bundle / "chat_template.jinja").write_text(text)
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"]["chat_template.jinja"] = file_entry(bundle / "chat_template.jinja")
    (bundle / MANIFEST).write_text(sealed(document))
    return bundle
