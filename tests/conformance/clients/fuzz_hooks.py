"""What schemathesis cannot know: the name of a model that there is, or next to nothing would get past the lookup of it."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Whatever else is wrong with a body stays so."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
        return {**body, "model": "tiny"}
    return body
