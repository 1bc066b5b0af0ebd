"""Exports as jobs of a running server: durable records, one child process at a time, files to download."""
