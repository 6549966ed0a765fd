"""The numbers printed in the paper and the published annotation files, computed again; baselines that never see the image."""
