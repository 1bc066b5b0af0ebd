"""HTTP only: requests in OpenAI's format become prompts and sampling parameters, tokens become answers."""
