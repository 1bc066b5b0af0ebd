"""The base model: where it comes from (`demo.py`) and how it becomes resident (`loading.py`)."""
