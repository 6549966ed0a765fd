"""Training: the three stages of the paper on the Hugging Face Trainer, and the bundled towers."""
