"""Load tests: one HTTP client, named scenarios, and what a user would pick instead, measured in the same call.

Nothing here asserts a time; see README.md for how to read the figures.
"""


class BenchError(Exception):
    """The benchmark cannot go on; the message says why in one sentence."""
