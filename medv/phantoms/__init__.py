"""Phantoms: synthetic medical images that the library draws, with questions and facts whose answers are known."""
