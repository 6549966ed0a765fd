"""The mathematics of masked diffusion: corruption, loss and sampling.

This floor knows token ids and a function that returns logits. It knows no images, no tokenizer and no Trainer.
"""
