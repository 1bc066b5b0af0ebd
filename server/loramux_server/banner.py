"""What a person sees when the server is ready: where it listens, what it serves, and commands to paste."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import typer

QUESTION = "What is the capital of France?"


def banner(url: str, base: str, adapters: Sequence[str], *, needs_key: bool = False) -> None:
    """Print to standard output. With two adapters or more, one command shows them answering side by side."""
    lines = ["", f"loramux serves '{base}' at {url}/v1", f"adapters: {', '.join(adapters) or 'none yet'}", ""]
    if adapters:
        lines += _commands(url, adapters, needs_key)
    lines.append("Ctrl-C stops it.")
    typer.echo("\n".join(lines))


def exposure(address: str) -> str | None:
    """What to say of a server without keys that listens on `address`; None if only this machine reaches it."""
    if ipaddress.ip_address(address).is_loopback:
        return None
    return (
        f"ANYBODY WHO REACHES {address} MAY DO EVERYTHING with this server: use, replace and delete adapters, read training "
        "files, train. Make keys with `loramux keys create`, start with --api-key, or listen on 127.0.0.1"
    )


def _commands(url: str, adapters: Sequence[str], needs_key: bool) -> list[str]:
    header = " -H 'authorization: Bearer KEY'" if needs_key else ""
    variable = "LORAMUX_API_KEY=KEY " if needs_key else ""
    messages = f'[{{"role": "user", "content": "{QUESTION}"}}]'
    python = (
        f"from openai import OpenAI; c = OpenAI(base_url='{url}/v1', api_key='{'KEY' if needs_key else '-'}'); "
        f"print(c.chat.completions.create(model='{adapters[-1]}', max_tokens=60, "
        f"messages=[dict(role='user', content='{QUESTION}')]).choices[0].message.content)"
    )
    asked = " ".join(adapters[:3])
    return [
        "Try it from another terminal:",
        "",
        "  # one adapter, with curl",
        f"  curl -s {url}/v1/chat/completions -H 'content-type: application/json'{header} \\",
        f"""    -d '{{"model": "{adapters[0]}", "max_tokens": 60, "messages": {messages}}}'""",
        "",
        "  # another one, with the OpenAI client",
        f'  .venv/bin/python -c "{python}"',
        "",
        "  # the same question to several adapters at once, in one batch",
        f"  {variable}.venv/bin/loramux ask --url {url} '{QUESTION}' {asked}",
        "",
    ]
