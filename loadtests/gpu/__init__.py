"""What a CUDA device gives, in one call: `python -m loadtests.gpu`. See loadtests/gpu/README.md."""
