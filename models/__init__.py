"""Methods, networks, losses and hash codes in pure PyTorch."""
