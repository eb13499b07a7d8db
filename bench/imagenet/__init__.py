"""Training on ImageNet: python -m bench.imagenet"""
