"""SAM steps in other people's training loops.

forward.py       MSAM in a loop that cannot be changed: the model's forward moves the weights
"""
