"""The look of the report: its style sheet and the frame of the page."""

from gvpo_jax.report.charts import escape
from gvpo_jax.report.style import PAGE, STYLE


def page(title: str, body: str) -> str:
    """The whole HTML document; `body` is markup, `title` is text."""
    return PAGE.format(title=escape(title), style=STYLE, body=body)


def section(anchor: str, heading: str, lead: str, content: str) -> str:
    """A titled section; nothing where its content is empty."""
    if not content:
        return ""
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-h">'
        f'<h2 id="{anchor}-h">{escape(heading)}</h2>'
        f'<p class="lead">{escape(lead)}</p>{content}</section>'
    )


def tile(name: str, value: str, note: str, *, look: str = "") -> str:
    """A headline number; `value` is markup."""
    return (
        f'<div class="card tile {look}"><div class="name">{escape(name)}</div>'
        f'<div class="value">{value}</div><div class="note">{escape(note)}</div></div>'
    )


def reward_pill(reward: object) -> str:
    """A reward as a number on a colour: green from 1, red to 0, amber between, grey for none."""
    if not isinstance(reward, int | float):
        return '<span class="pill">no reward</span>'
    look = "good" if reward >= 1 else "bad" if reward <= 0 else "mid"
    return f'<span class="pill {look}" title="reward">{reward:.3g}</span>'


def text_block(value: object, *, limit: int = 6000) -> str:
    """A prompt or completion as preformatted text, cut at `limit` characters."""
    text = plain_text(value).strip()
    if not text:
        return '<pre class="soft">(empty)</pre>'
    cut = f"\n… {len(text) - limit} more characters" if len(text) > limit else ""
    return f'<pre dir="auto">{escape(text[:limit] + cut)}</pre>'


def plain_text(value: object) -> str:
    """A prompt or completion as text: strings as they are, chat messages as role: content."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    messages = [m for m in value if isinstance(m, dict)]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
