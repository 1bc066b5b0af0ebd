"""What a model needs in memory, from its config alone: training it three ways, and serving it.

`model.py` reads the shapes; `training.py` and `serving.py` are arithmetic over them; `fit.py` holds the result against a
memory and says what would make it fit. Weights are neither loaded nor downloaded.
"""
