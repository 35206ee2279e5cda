"""Messages of a conversation, and the check that its first ones are the beginning of the whole."""

from __future__ import annotations

from typing import Any

from kdcache.errors import UsageError

ASSISTANT = "assistant"
"""Role of the messages that are learned."""

_ROLES = {"human": "user", "gpt": ASSISTANT}
"""Roles of conversations with keys `from` and `value`."""

_SHOWN = 24
"""Characters of a text that are shown in an error."""


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Return messages with role and content, also of those with `from` and `value`.

    Raises:
        UsageError: if they are not a list of messages, or one has no role.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UsageError(
            "it has no list of messages", 'write messages such as [{"role": "user", "content": "..."}, ...]'
        )
    found = []
    for number, message in enumerate(value):
        if "from" in message and "value" in message:
            role = _ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"]}  # noqa: PLW2901
        if not isinstance(message.get("role"), str):
            raise UsageError(f"message {number} has no role", "give each message a role and a content")
        # Parquet and datasets fill keys that other messages have with None.
        found.append({key: part for key, part in message.items() if part is not None or key == "content"})
    return found


def check_nested(begin: str, whole: str, messages: int) -> None:
    """Check that a conversation begins with the text of its first messages.

    Args:
        begin: text of the first messages.
        whole: text of more of them.
        messages: number of the first ones.

    Raises:
        UsageError: with the first character that differs.
    """
    if whole.startswith(begin):
        return
    at = next((i for i, (one, other) in enumerate(zip(begin, whole, strict=False)) if one != other), len(whole))
    raise UsageError(
        f"the chat template changes what it wrote of the first messages when others follow: of {messages} it is "
        f"{_excerpt(begin[at:])} from character {at}, with more of them {_excerpt(whole[at:])}; so it is not "
        "known which tokens the assistant said",
        "mark them in the chat template with {% generation %} and {% endgeneration %}, or set dataset.taught to all",
    )


def _excerpt(text: str) -> str:
    """Return the beginning of a text, for an error."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
