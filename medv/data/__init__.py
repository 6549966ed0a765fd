"""The data floor: phantoms, readers of the real formats, images and the chat format."""
