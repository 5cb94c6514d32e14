"""Rows as they are trained on, token by token."""

from typing import Any

CHARACTER_TOKENS = 4  # a character of UTF-8 has at most four bytes, so at most so many tokens
# Backgrounds of neighbouring tokens, of 256 colours, under white text: they read on light and dark terminals.
SHADES = {"prompt": (238, 242), "chosen": (22, 29), "rejected": (52, 94), "demonstration": (22, 29)}


def show_tokens(
    title: str, row: dict[str, Any], ids_of_row: dict[str, list[int]], columns: tuple[str, ...], tokenizer: Any
) -> dict[str, Any]:
    """A row as it is trained on, token by token, and how many tokens were cut."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    parts, cut = [], 0
    for name in ("prompt", *columns):
        ids = ids_of_row.get(f"{name}_ids") or ids_of_row["completion_ids"]
        prefix = [] if name == "prompt" else ids_of_row["prompt_ids"][-CHARACTER_TOKENS:]
        texts = token_texts([*prefix, *ids], tokenizer)[len(prefix) :]
        tokens = [(show_invisible(text), i in special) for text, i in zip(texts, ids, strict=True)]
        use = "only read, but for its replies" if any(ids_of_row.get("prompt_mask", ())) else "only read"
        parts.append({"name": name, "use": use if name == "prompt" else "trained on", "tokens": tokens})
        cut += row[f"{name}_tokens"] - len(ids)
    return {"title": title, "origin": row["origin"], "cut": cut, "parts": parts}


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds to the tokens before it; U+FFFD for a token inside a character."""
    texts, options = [], {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for i in range(len(ids)):
        start = max(0, i - CHARACTER_TOKENS)
        before, after = (tokenizer.decode(ids[start:end], **options) for end in (i, i + 1))
        if not after.startswith(before):
            before = before.rstrip("\ufffd")  # the token completes a character
        texts.append(after[len(before) :] or "\ufffd")
    return texts


def format_tokens(part: dict[str, Any], colour: bool) -> str:
    """Tokens on one line, without the middle of many: in colours, or with bars and brackets around special ones."""
    texts, shades = [], SHADES[part["name"]]
    for i, (text, is_special) in enumerate(part["tokens"]):
        if colour:
            texts.append(f"\x1b[{'30;43' if is_special else f'97;48;5;{shades[i % 2]}'}m{text}\x1b[0m")
        else:
            texts.append(f"⟦{text}⟧" if is_special else text)
    first, last = (30, 50) if part["name"] == "prompt" else (100, 20)
    if len(texts) > first + last:
        texts[first:-last] = [f" ... {len(texts) - first - last} more ... "]
    return ("" if colour else "│").join(texts)


def show_invisible(text: str) -> str:
    """A text on one line, with signs for line breaks and tabs, and codes for characters that a terminal would obey."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
