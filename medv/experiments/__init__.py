"""What the notebooks make and from what (`registry`), and what a notebook holds in its hands while it runs (`run`)."""
