"""Everything in loramux that knows what a request is: configuration, the engine, HTTP."""
