"""How the bundled tiny towers were made: tokenizer, vision tower and language tower from generated data."""
