"""SAM steps in other people's training loops, one module for each; each imports its package, and no other does.

forward.py       MSAM in a loop that cannot be changed: the model's forward moves the weights
transformers.py  SAMTrainer, a transformers.Trainer
lightning.py     SAMModule, a mixin for a LightningModule
accelerate.py    SAMStep, a step with gradient accumulation for Accelerate
timm.py          SAMScaler, for timm's NativeScaler
passes.py        what the last four share: the micro-batches of a step, run at w and all of them again at w + e
"""
